"""Drawings of a comparison: the ranking with intervals, accuracy against time, curves over tasks, matrices."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from lamina.compare import stats
from lamina.compare.rows import ONLY_JOINT, RowRuns, by_run
from lamina.maths import metrics
from lamina.maths.metrics import Floats
from lamina.report import Drawing, charts
from lamina.report.charts import COLOURS, Estimate, Point, Series, Spot

SHOWN = COLOURS - 1
"""Most rows that get a colour of their own, the best ones. The baseline gets another, and the rest are thin and grey."""

NAMED = 8
"""Most rows that all have their names beside their points."""


def drawings(rows: Mapping[str, RowRuns], baseline: str | None) -> list[Drawing]:
    """Returns the charts of one stream; none of rows without a run."""
    rows = {name: row for name, row in rows.items() if row.spread(_key(row))[0] is not None}
    if len(rows) < 2:
        return []
    ranked = sorted(rows, key=lambda name: -(rows[name].spread(_key(rows[name]))[0] or 0.0))
    styles: dict[str, int | None] = {name: k if k < SHOWN else None for k, name in enumerate(ranked)}
    if baseline in styles and styles[baseline] is None:
        styles[baseline] = SHOWN
    found = [_ranking(rows, ranked, styles)]
    if timed := [name for name in ranked if rows[name].spread("seconds")[0]]:
        found.append(_against_time(rows, timed, styles))
    if several := [name for name in ranked if not _joint(rows[name])]:
        found += _curves(rows, several, styles)
    return found


def matrices(rows: Mapping[str, RowRuns]) -> list[tuple[str, Markup]]:
    """Returns the accuracy matrix of every row, the mean over its runs, by name of the row."""
    low = _floor([100 * _mean_matrix(row) for row in rows.values() if row.runs and not _joint(row)])
    found = []
    for name, row in rows.items():
        if not row.runs or _joint(row) or row.runs[0].record.matrix.tasks < 2:
            continue
        mean_ij = 100 * _mean_matrix(row)
        names = [str(j + 1) for j in range(mean_ij.shape[1])]

        def tooltip(i: int, j: int, mean_ij: Floats = mean_ij) -> str:
            return f"task {j + 1} after task {i + 1}: {mean_ij[i, j]:.1f} %"

        found.append((name, charts.heat_map(f"Accuracy matrix of {name}", "", mean_ij, tooltip, names, names, low)))
    return found


def _key(row: RowRuns) -> str:
    return ONLY_JOINT if _joint(row) else "final_accuracy"


def _joint(row: RowRuns) -> bool:
    return any(run.joint for run in row.runs)


def _floor(values: Sequence[Floats]) -> float:
    lowest = min((float(np.nanmin(v)) for v in values if v.size), default=0.0)
    return max(0.0, min(90.0, 10 * math.floor(lowest / 10 + 1e-9)))


def _mean_matrix(row: RowRuns) -> Floats:
    shape = row.runs[0].record.matrix.correct_ij.shape
    same = [run.record.matrix.accuracy_ij for run in row.runs if run.record.matrix.correct_ij.shape == shape]
    mean: Floats = np.mean(same, axis=0)
    return mean


def _ranking(rows: Mapping[str, RowRuns], ranked: Sequence[str], styles: Mapping[str, int | None]) -> Drawing:
    estimates = []
    for name in ranked:
        values = by_run(rows[name].runs, _key(rows[name]))
        low, high = stats.interval(stats.units(values)) or (None, None)
        single = [100 * value for value in values.values()]
        ends = (None, None) if low is None or high is None else (100 * low, 100 * high)
        mean = sum(single) / len(single)
        estimates.append(Estimate(name=name, values=single, mean=mean, low=ends[0], high=ends[1], style=styles[name]))
    counts = sorted({len(stats.units(by_run(rows[name].runs, _key(rows[name])))) for name in ranked} - {1})
    covered = " and ".join(f"{100 * stats.coverage(n):.0f} % for {n}" for n in counts)
    bar = (
        "Bar: its interval over class orders, or over seeds of the one order. It covers the centre with probability "
        f"{covered}. It holds the spread that all rows share; the differences from the baseline in the table do not. "
        if covered
        else ""
    )
    everything = np.array([value for one in estimates for value in one.values])
    span = (_floor([everything]), float(min(100.0, 10 * math.ceil(everything.max() / 10))))
    title = "Final accuracy"
    told = "; ".join(f"{one.name} {one.mean:.1f}" for one in estimates)
    return Drawing(
        title=title,
        svg=charts.strips(title, told, estimates, x_range=span, x_name="%"),
        note=f"Dots: runs. Upright stroke: their mean. {bar}Rows of joint training: micro accuracy.",
    )


def _against_time(rows: Mapping[str, RowRuns], ranked: Sequence[str], styles: Mapping[str, int | None]) -> Drawing:
    spots = []
    for name in ranked:
        row = rows[name]
        accuracy, seconds = row.spread(_key(row))[0], row.spread("seconds")[0]
        assert accuracy is not None
        assert seconds is not None
        spots.append(Spot(name=name, x=seconds, y=100 * accuracy, style=styles[name]))
    front = pareto([(spot.x, spot.y) for spot in spots])
    few = len(spots) <= NAMED
    spots = [Spot(name=s.name, x=s.x, y=s.y, style=s.style, labelled=few or (s.x, s.y) in front) for s in spots]
    heights = np.array([spot.y for spot in spots])
    span = (_floor([heights]), float(min(100.0, 10 * math.ceil(heights.max() / 10))))
    title = "Accuracy against time"
    told = "; ".join(f"{s.name} {s.y:.1f} % in {s.x:.0f} s" for s in spots)
    return Drawing(
        title=title,
        svg=charts.scatter(
            title, told, spots, y_range=span, x_name="seconds of a run", y_name="final accuracy, %", front=front
        ),
        note="Dotted line: rows that no other row beats in both. "
        + ("" if few else "They have their names; hover the others. ")
        + "Joint training has its micro accuracy.",
    )


def pareto(points: Sequence[Point]) -> list[Point]:
    """Returns the points (cost, value) that no other one beats in both, by rising cost."""
    found: list[Point] = []
    for cost, value in sorted(points, key=lambda p: (p[0], -p[1])):
        if not found or value > found[-1][1]:
            found.append((cost, value))
    return found


def _curves(rows: Mapping[str, RowRuns], ranked: Sequence[str], styles: Mapping[str, int | None]) -> list[Drawing]:
    series = []
    for name in ranked:
        lengths = {run.record.matrix.tasks for run in rows[name].runs}
        if len(lengths) != 1 or lengths == {1}:
            continue
        mean_i = np.mean([metrics.incremental_accuracy(run.record.matrix) for run in rows[name].runs], axis=0)
        points = [(i, 100 * float(v)) for i, v in enumerate(mean_i, start=1) if not math.isnan(v)]
        label = name if styles[name] is not None else None
        series.append(
            Series(name=name, points=points, style=styles[name], label=label, markers=styles[name] is not None)
        )
    if not series:
        return []
    low = _floor([np.array([y for s in series for _, y in s.points])])
    title = "Accuracy after each task"
    svg = charts.lines(
        title,
        "; ".join(f"{s.name} ends at {s.points[-1][1]:.1f}" for s in series),
        series,
        x_name="tasks learnt",
        y_name="accuracy, %",
        x_range=(1, max(s.points[-1][0] for s in series)),
        y_range=(low, 100.0),
        write=lambda value: f"{value:.1f} %",
    )
    note = "Mean over tasks learnt so far, and over runs."
    if any(one.style is None for one in series):
        note += " Thin grey lines: rows further down; hover one for its name."
    return [Drawing(title=title, svg=svg, note=note)]
