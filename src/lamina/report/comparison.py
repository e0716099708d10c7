"""The comparison of several runs on the page: a table and their curves."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lamina.maths import metrics
from lamina.maths.metrics import DEFINITIONS
from lamina.record import Record
from lamina.report import charts
from lamina.report.charts import Series
from lamina.report.run_view import TITLES, Drawing, metric_text, numbered, percent_text
from lamina.report.text import count, known, scaled, seconds, signed


@dataclass(frozen=True)
class Column:
    title: str
    key: str
    pick: Callable[..., float]
    """max or min: which value is the best."""
    write: Callable[[Any], str]


ACCURACIES = {"final_accuracy": max, "average_accuracy": max, "forgetting": min, "task_aware_accuracy": max}


def _metric_column(key: str, pick: Callable[..., float]) -> Column:
    return Column(TITLES[key], key, pick, lambda value: metric_text(key, value))


COLUMNS = (
    *(_metric_column(key, pick) for key, pick in ACCURACIES.items()),
    Column("Time", "total_seconds", min, seconds),
    Column("Trainable parameters", "trainable_parameters", min, scaled),
    Column("Stored parameters", "stored_parameters", min, scaled),
    Column("Memory kept", "memory_bytes", min, lambda value: scaled(value, "B")),
)


@dataclass
class Line:
    """A run as a row of the table."""

    index: int
    label: str
    key: str
    progress: str
    values: Mapping[str, float | None]
    best: list[bool] = field(default_factory=lambda: [False] * len(COLUMNS))

    @property
    def texts(self) -> list[str]:
        return [column.write(self.values[column.key]) for column in COLUMNS]


def comparison(runs: Sequence[Record], names: Sequence[str]) -> dict[str, Any]:
    """Returns the table, sorted by final accuracy with unfinished runs last, and the curves of all runs."""
    lines = [_line(i, run, name) for i, (run, name) in enumerate(zip(runs, names, strict=True))]
    lines.sort(key=lambda line: (bool(line.progress), -(line.values["final_accuracy"] or 0.0)))
    finished = [line for line in lines if not line.progress]
    _mark_best(finished)
    several = max(run.matrix.tasks for run in runs) > 1
    return {
        "columns": [column.title for column in COLUMNS],
        "definitions": [(TITLES[key], DEFINITIONS[key]) for key in ACCURACIES],
        "rows": lines,
        "curves": [_accuracy_curves(runs, names), _forgetting_curves(runs, names)] if several else [],
        "legend": [(charts.key(i), name) for i, name in enumerate(names)],
        "lead": lead(finished),
        "mixed": len({run.stream.fingerprint for run in runs}) > 1,
    }


def _line(index: int, run: Record, name: str) -> Line:
    planned, cost = len(run.stream.tasks), run.cost
    found = {key: value if known(value) else None for key, value in asdict(run.metrics).items()}
    values = {column.key: getattr(cost, column.key, None) for column in COLUMNS} | found
    progress = f"{run.matrix.tasks} of {count(planned, 'task')}" if run.matrix.tasks < planned else ""
    return Line(index=index, label=name, key=charts.key(index), progress=progress, values=values)


def _mark_best(lines: Sequence[Line]) -> None:
    """Marks every value that is written like the best of its column, where values differ."""
    for k, column in enumerate(COLUMNS):
        ranked = [(value, line) for line in lines if (value := line.values[column.key]) is not None]
        best = column.pick((value for value, _ in ranked), default=None)
        winning = {line.texts[k] for value, line in ranked if value == best}
        if len({line.texts[k] for _, line in ranked}) > 1:  # a star on every row, or on the only one, says nothing
            for _, line in ranked:
                line.best[k] = line.texts[k] in winning


def lead(finished: Sequence[Line]) -> str:
    """Returns one sentence: which run has the highest accuracy, and by how much."""
    if len(finished) < 2:
        return ""
    first, second = finished[:2]
    ahead = round(100 * ((first.values["final_accuracy"] or 0.0) - (second.values["final_accuracy"] or 0.0)), 1)
    accuracy = first.texts[0]
    if ahead == 0:
        return f"{first.label} and {second.label} have the same final accuracy, {accuracy}."
    return f"{first.label} has the highest final accuracy, {accuracy}: {ahead:.1f} points above {second.label}."


def _series(runs: Sequence[Record], names: Sequence[str], function: Callable[..., Any]) -> list[Series]:
    return [
        Series(name=name, points=numbered(function(run.matrix)), style=i, label=name)
        for i, (name, run) in enumerate(zip(names, runs, strict=True))
    ]


def _drawing(title: str, note: str, series: Sequence[Series], **chart: Any) -> Drawing:
    final = "; ".join(f"{s.name} ends at {s.points[-1][1]:.1f}" for s in series if s.points)
    longest = max(x for s in series for x, _ in s.points)
    svg = charts.lines(title, final, series, x_name="tasks learnt", x_range=(1, longest), **chart)
    return Drawing(title=title, svg=svg, note=note)


def _accuracy_curves(runs: Sequence[Record], names: Sequence[str]) -> Drawing:
    series = _series(runs, names, metrics.incremental_accuracy)
    lowest = min([100.0, *(y for s in series for _, y in s.points)])
    bounds = min(90.0, 10 * math.floor(lowest / 10)), 100.0
    note = "Accuracy on all tasks learnt so far, averaged over tasks."
    return _drawing(
        "Accuracy after each task", note, series, y_name="accuracy, %", y_range=bounds, write=percent_text
    )  # fmt: skip


def _forgetting_curves(runs: Sequence[Record], names: Sequence[str]) -> Drawing:
    series = _series(runs, names, metrics.forgetting_after)
    heights = [y for s in series for _, y in s.points]
    return _drawing(
        "Forgetting after each task",
        "Forgetting if the stream ended at that task.",
        series,
        y_name="points",
        y_range=(min([0.0, *heights]), max(1.0, *heights)),
        write=lambda value: signed(f"{value:.1f}"),
    )
