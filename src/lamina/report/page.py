"""From the records of runs to the page. Every figure is computed from the recorded counts by lamina.maths.metrics.

A record is the JSON of RUN/results.json. Whatever a record lacks is shown as an en dash, never guessed.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, Template

from lamina.errors import RunError
from lamina.maths import metrics
from lamina.maths.metrics import DEFINITIONS, AccuracyMatrix
from lamina.report import charts
from lamina.report.charts import Series
from lamina.report.text import count, interval, known, number, percent, plain, points, scaled, seconds, signed

RECORD_FORMAT = 2
"""The value of "format" in the records this version reads."""
REQUIRED = ("name", "method", "stream", "matrix")
LOSS_POINTS = 160
"""Most points drawn of a loss curve; longer ones are averaged over equal stretches."""
TITLES = {
    "final_accuracy": "Final accuracy",
    "average_accuracy": "Average accuracy",
    "forgetting": "Forgetting",
    "task_aware_accuracy": "Task-aware accuracy",
    "final_accuracy_micro": "Final accuracy (micro)",
    "average_accuracy_micro": "Average accuracy (micro)",
    "learning_accuracy": "Learning accuracy",
    "backward_transfer": "Backward transfer",
    "forward_transfer": "Forward transfer",
    "task_inference_accuracy": "Task-inference accuracy",
}
IN_POINTS = ("forgetting", "backward_transfer", "forward_transfer")
PHASES = {
    "load": "loading data and weights",
    "begin": "preparing each task (method)",
    "train": "training",
    "end": "closing each task (method)",
    "evaluate": "evaluating",
    "checkpoint": "saving checkpoints",
}


# --- what is shown of one run ------------------------------------------------------------------------------------


def labels(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The name of each run; with its seed where names repeat, and with a number where that is not enough."""
    names = [str(r["name"]) for r in runs]
    seeds = [(r.get("config") or {}).get("seed") for r in runs]
    full = [
        f"{name} (seed {seed})" if names.count(name) > 1 and seed is not None else name
        for name, seed in zip(names, seeds, strict=True)
    ]
    seen: Counter[str] = Counter()
    unique = []
    for name in full:
        seen[name] += 1
        unique.append(f"{name} #{seen[name]}" if full.count(name) > 1 else name)
    return unique


def figures(run: Mapping[str, Any], matrix: AccuracyMatrix) -> dict[str, float | None]:
    """Every figure of TITLES; None where the record has no grounds for it."""
    noted = run.get("metrics") or {}
    told = run.get("task_inference_accuracy") or []
    values: dict[str, float | None] = dict.fromkeys(TITLES)
    for name in ("forward_transfer", "task_aware_accuracy", "task_inference_accuracy"):
        values[name] = noted.get(name)
    if matrix.tasks:
        values |= metrics.summary(matrix)
    if run.get("task_aware") and run["task_aware"]["correct"]:
        values["task_aware_accuracy"] = metrics.final_accuracy(AccuracyMatrix.from_dict(run["task_aware"]))
    if told:
        values["task_inference_accuracy"] = told[-1]
    return {name: value if known(value) else None for name, value in values.items()}


def figure_text(name: str, value: float | None) -> str:
    return points(value) if name in IN_POINTS else percent(value)


def sentences(run: Mapping[str, Any], matrix: AccuracyMatrix, values: Mapping[str, float | None]) -> str:
    """What was learnt, from which backbone, with what result, in plain words."""
    stream, backbone = run["stream"], run.get("backbone") or {}
    tasks = stream["tasks"]
    classes = len({c for t in tasks for c in t["classes"]})
    domains = len({t.get("domain") for t in tasks} - {None})
    within = count(classes, "class") + (f" in {count(domains, 'domain')}" if domains else "")
    source = f" of {stream['data']}" if stream.get("data") else ""
    start = ""
    if backbone.get("name"):
        size = backbone.get("parameters")
        start = f", starting from the backbone {backbone['name']}" + (f" ({scaled(size)} parameters)" if size else "")
    kind = {"image": "test images", "text": "test texts"}.get(str(backbone.get("kind")), "test examples")
    order = " one after the other" if len(tasks) > 1 else ""
    text = f"{run['method']['name']} learns {count(len(tasks), 'task')}{order}, {within}{source}{start}. "
    if not matrix.tasks:
        return text + "No task has been learnt yet."
    weighted, mean = values["final_accuracy_micro"] or 0.0, values["final_accuracy"] or 0.0
    agree = abs(weighted - mean) < 0.0005  # then say it once, without two roundings of one number
    right = percent(mean) if agree else percent(weighted)
    same = "" if agree else f" ({percent(mean)} when every task counts the same)"
    so_far = f"So far, after {matrix.tasks} of" if matrix.tasks < len(tasks) else "After"
    text += f"{so_far} {count(len(tasks), 'task')} it answers {right} of {kind} right{same}; "
    lost = values["forgetting"]
    if matrix.tasks == 1 or lost is None:
        return text + "with one task there is nothing to forget."
    if round(100 * lost, 1) < 0:
        return text + f"it forgot nothing: earlier tasks improved by {points(-lost)} on average."
    return text + (f"it forgot {points(lost)}." if round(100 * lost, 1) > 0 else "it forgot nothing.")


def heat_map(run: Mapping[str, Any], matrix: AccuracyMatrix, low: float) -> str:
    names = task_names(run, matrix)

    def tooltip(i: int, j: int) -> str:
        right, total = int(matrix.correct_ij[i, j]), int(matrix.total_ij[i, j])
        of = f"{right} of {total}; 95 %: {interval(right, total)}"
        return f"task {j + 1} after task {i + 1}: {percent(right / total)} ({of})"

    rows, columns = matrix.correct_ij.shape
    description = f"{rows} by {columns} matrix of accuracies in percent; the last row is {last_row(matrix)}."
    return charts.heat_map("Accuracy matrix", description, 100 * matrix.accuracy_ij, tooltip, names, low)


def last_row(matrix: AccuracyMatrix) -> str:
    return ", ".join(f"{100 * a:.1f}" for a in matrix.accuracy_ij[-1, : matrix.tasks])


def task_names(run: Mapping[str, Any], matrix: AccuracyMatrix) -> list[str]:
    names = [str(t["name"]) for t in run["stream"]["tasks"]]
    return names + [f"task {j + 1}" for j in range(len(names), matrix.correct_ij.shape[1])]


def numbered(values: Iterable[float]) -> list[charts.Point]:
    """Percentages against the number of tasks learnt, without the gaps."""
    return [(i, 100 * float(v)) for i, v in enumerate(values, start=1) if not math.isnan(v)]


def percent_text(value: float) -> str:
    return signed(f"{value:.1f} %")


def curves(run: Mapping[str, Any], matrix: AccuracyMatrix, low: float) -> list[dict[str, Any]]:
    """The small drawings of one run: accuracy after each task, each task over time, what each task lost."""
    names, last = task_names(run, matrix), matrix.tasks - 1
    a = matrix.accuracy_ij
    span: dict[str, Any] = {"x_range": (1, matrix.tasks), "y_range": (low, 100), "x_name": "tasks learnt"}
    acc = metrics.incremental_accuracy(matrix)
    weighted = metrics.incremental_accuracy_micro(matrix)
    both = [Series(name="mean over tasks", points=numbered(acc), style=0, accent=True)]
    legend: list[tuple[str, str]] = []
    agree = bool(np.nanmax(np.abs(weighted - acc), initial=0.0) < 0.0005)
    if not agree:
        legend = [(charts.key(0, accent=True), "mean over tasks"), (charts.key(1), "over examples")]
        both.insert(0, Series(name="over examples", points=numbered(weighted), style=1))
    tasks = [
        Series(
            name=f"task {j + 1} ({names[j]}): {percent(a[j, j])} when learnt, {percent(a[last, j])} at the end",
            points=[(j + 1 + i, 100 * float(v)) for i, v in enumerate(a[j:, j]) if not math.isnan(v)],
            label=str(j + 1),
        )
        for j in range(matrix.tasks)
    ]
    mean = Series(name="mean over tasks", points=numbered(acc), style=0, accent=True, markers=False)
    rows: list[tuple[str, float | None, float]] = []
    for j, lost in enumerate(metrics.forgetting_by_task(matrix)):
        end = 100 * float(a[last, j])
        best = None if math.isnan(lost) else end + 100 * float(lost)
        past = "just learnt" if best is None else f"best before {best:.1f} %, forgot {points(float(lost))}"
        rows.append((f"task {j + 1} ({names[j]}): {percent_text(end)} at the end, {past}", best, end))
    numbers = " to its number at the end" if matrix.tasks <= charts.LABELS else " (hover it for its name)"
    y_name, what = "accuracy, %", f"of {run['name']} after each of {matrix.tasks} tasks"
    ends = f"from {percent(acc[0])} after the first to {percent(acc[-1])} after the last task"
    return [
        {
            "title": "Accuracy after each task",
            "legend": legend,
            "note": "ACC_i: accuracy after task i on all tasks learnt so far, with every task counting the same or"
            " every example counting the same" + (" (here the two agree)." if agree else "."),
            "svg": charts.lines(
                "Accuracy after each task", f"ACC_i {what}, {ends}", both, y_name=y_name, write=percent_text, **span
            ),
        },
        {
            "title": "Each task over time",
            "legend": [],
            "note": f"One thin line per task, from the dot where it was learnt{numbers}; the heavy line is their mean.",
            "svg": charts.lines(
                "Each task over time", f"Accuracy on each task {what}", [*tasks, mean], y_name=y_name,
                write=percent_text, **span,
            ),
        },
        {
            "title": "What each task lost",
            "legend": [],
            "note": "Ring: best accuracy on the task before the last one was learnt. Dot: accuracy at the end. The line"
            " between them is what was forgotten (or gained, where the dot is higher).",
            "svg": charts.drops(
                "What each task lost", f"Best and last accuracy {what}", rows, y_range=(low, 100), y_name=y_name
            ),
        },
    ]  # fmt: skip


def loss_curve(run: Mapping[str, Any]) -> dict[str, Any] | None:
    noted = [(float(s), float(v)) for s, v in run.get("losses") or [] if v is not None and math.isfinite(v)]
    if len(noted) < 2:
        return None
    width = math.ceil(len(noted) / LOSS_POINTS)
    drawn = [tuple(np.mean(noted[k : k + width], axis=0)) for k in range(0, len(noted), width)]
    ends = np.cumsum([row.get("steps") or 0 for row in run.get("lineage") or []])
    high = max(v for _, v in drawn) or 1.0
    series = Series(name="training loss", points=drawn, style=0, accent=True, markers=False)
    svg = charts.lines(
        "Training loss",
        f"Training loss over {noted[-1][0]:g} steps, from {noted[0][1]:.3g} to {noted[-1][1]:.3g}",
        [series],
        x_name="step",
        y_name="loss",
        x_range=(noted[0][0], noted[-1][0]),
        y_range=(min(0.0, *(v for _, v in drawn)), high),
        write=lambda v: f"{v:.3g}",
        marks=[float(e) for e in ends[:-1] if noted[0][0] < e < noted[-1][0]] if len(ends) <= 30 else [],
    )
    averaged = f" Each point is the mean of {width} recorded values." if width > 1 else ""
    note = "Loss on the training batches. Dotted lines: where a task ended." + averaged
    return {"title": "Training loss", "legend": [], "note": note, "svg": svg}


def phases(cost: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """What each phase is, its seconds and its share of the total; what is in no phase is called other."""
    spent = {k: v for k, v in (cost.get("seconds") or {}).items() if k != "total" and known(v)}
    total = (cost.get("seconds") or {}).get("total") or sum(spent.values())
    if total - sum(spent.values()) > 0.05:
        spent["other"] = total - sum(spent.values())
    return [(PHASES.get(k, k), v, v / total if total else 0.0) for k, v in spent.items()]


def share(row: Mapping[str, Any]) -> float | None:
    return row["correct"] / row["total"] if row["total"] else None


def by_accuracy(row: Mapping[str, Any]) -> float:
    """Orders classes worst first, those without examples last."""
    return row["correct"] / row["total"] if row["total"] else 2.0


def run_view(run: Mapping[str, Any], label: str, style: int, low: float) -> dict[str, Any]:
    matrix, method = AccuracyMatrix.from_dict(run["matrix"]), run["method"]
    values = figures(run, matrix)
    notes = {}
    if matrix.tasks:
        right, total = (int(m[-1, : matrix.tasks].sum()) for m in (matrix.correct_ij, matrix.total_ij))
        notes["final_accuracy_micro"] = f"{right} of {total}, 95 % interval {interval(right, total)}"
    shown = [(TITLES[k], figure_text(k, v), DEFINITIONS[k], notes.get(k, "")) for k, v in values.items()]
    drawings = curves(run, matrix, low) if matrix.tasks > 1 else []
    loss = loss_curve(run)
    planned = len(run["stream"]["tasks"])
    learnt = {row["task"]: row for row in run.get("lineage") or []}
    link = str(method.get("link") or "")
    return {
        "label": label,
        "style": style % charts.COLOURS,
        "summary": sentences(run, matrix, values),
        "progress": f"{matrix.tasks} of {count(planned, 'task')}" if matrix.tasks < planned else "",
        "tasks": matrix.tasks,
        "headline": shown[:4],
        "further": shown[4:],
        "heat_map": heat_map(run, matrix, low) if matrix.tasks else None,
        "numbered": matrix.correct_ij.shape[1] <= charts.NUMBERED,
        "ahead": bool(np.triu(matrix.total_ij, 1).any()),
        "curves": drawings + ([loss] if loss else []),
        "classes": sorted(run.get("classes") or [], key=by_accuracy),
        "cost": run.get("cost") or {},
        "phases": phases(run.get("cost") or {}),
        "config": yaml.safe_dump(dict(run.get("config") or {}), sort_keys=False, allow_unicode=True).strip(),
        "lineage": [(task, learnt.get(task["name"], {})) for task in run["stream"]["tasks"]],
        "facts": {key: run.get(key) or {} for key in ("stream", "backbone", "code", "machine")},
        "created": run.get("created"),
        "skipped": [str(s) for s in run.get("skipped") or []],
        "method": {
            "title": plain(method.get("title") or method.get("name")),
            "source": ", ".join(str(method[k]) for k in ("authors", "venue") if method.get(k)),
            "link": link if link.startswith(("https://", "http://")) else "",
            "departures": [str(d) for d in method.get("departures") or []],
        },
    }


# --- several runs side by side -----------------------------------------------------------------------------------

COLUMNS = (
    ("Final accuracy", "final_accuracy", max),
    ("Average accuracy", "average_accuracy", max),
    ("Forgetting", "forgetting", min),
    ("Task-aware", "task_aware_accuracy", max),
    ("Time", "seconds", min),
    ("Trainable parameters", "trainable_parameters", min),
    ("Stored parameters", "stored_parameters", min),
    ("Memory kept", "memory_bytes", min),
)


def comparison(runs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The table, sorted by final accuracy with unfinished runs last, and the overlaid curves."""
    matrices = [AccuracyMatrix.from_dict(r["matrix"]) for r in runs]
    rows: list[dict[str, Any]] = []
    for i, (run, matrix) in enumerate(zip(runs, matrices, strict=True)):
        cost, planned = run.get("cost") or {}, len(run["stream"]["tasks"])
        values = figures(run, matrix) | {k: cost.get(k) for _, k, _ in COLUMNS[5:]}
        values["seconds"] = (cost.get("seconds") or {}).get("total")
        texts = [figure_text(k, values[k]) for _, k, _ in COLUMNS[:4]]
        texts += [seconds(values["seconds"]), *(scaled(values[k]) for _, k, _ in COLUMNS[5:7])]
        texts.append(scaled(values["memory_bytes"], "B"))
        done = matrix.tasks >= planned
        rows.append(
            {
                "index": i, "label": names[i], "key": charts.key(i), "values": values, "texts": texts, "done": done,
                "progress": "" if done else f"{matrix.tasks} of {count(planned, 'task')}",
            }
        )  # fmt: skip
    rows.sort(key=lambda r: (not r["done"], -(r["values"]["final_accuracy"] or 0.0)))
    finished = [r for r in rows if r["done"]]
    for row in rows:
        row["best"] = [False] * len(COLUMNS)
    for column, (_, name, pick) in enumerate(COLUMNS):
        ranked = [r for r in finished if known(r["values"][name])]
        best = pick((r["values"][name] for r in ranked), default=None)
        winning = {r["texts"][column] for r in ranked if r["values"][name] == best}
        if len({r["texts"][column] for r in ranked}) > 1:  # a star on every row, or on the only one, says nothing
            for row in ranked:
                row["best"][column] = row["texts"][column] in winning
    longest = max(m.tasks for m in matrices)
    drawings = []
    for title, function, note in (
        ("Accuracy after each task", metrics.incremental_accuracy, "ACC_i: mean over tasks j <= i of a[i, j]."),
        ("Forgetting after each task", metrics.forgetting_after, "Forgetting, had the stream ended at that task."),
    ):
        series = [
            Series(name=name, points=numbered(function(m)), style=i, label=name)
            for i, (name, m) in enumerate(zip(names, matrices, strict=True))
        ]
        heights = [y for s in series for _, y in s.points]
        forgot = function is metrics.forgetting_after
        lowest = min([100.0 if not forgot else 0.0, *heights])
        bounds = (lowest, max(1.0, *heights)) if forgot else (min(90.0, 10 * math.floor(lowest / 10)), 100.0)
        write_value: Callable[[float], str] = (lambda v: signed(f"{v:.1f}")) if forgot else percent_text
        final = "; ".join(f"{s.name} ends at {s.points[-1][1]:.1f}" for s in series if s.points)
        svg = charts.lines(
            title, final, series, x_name="tasks learnt", y_name="points" if forgot else "accuracy, %",
            x_range=(1, longest), y_range=bounds, write=write_value,
        ) if longest > 1 else ""  # fmt: skip
        drawings.append({"title": title, "svg": svg, "legend": [], "note": note})
    streams = {r["stream"].get("fingerprint") for r in runs}
    return {
        "columns": [title for title, _, _ in COLUMNS],
        "definitions": [(title, DEFINITIONS[key]) for title, key, _ in COLUMNS[:4]],
        "rows": rows,
        "curves": drawings if longest > 1 else [],
        "legend": [(charts.key(i), name) for i, name in enumerate(names)],
        "lead": lead(finished),
        "mixed": len(streams) > 1,
    }


def lead(finished: Sequence[Mapping[str, Any]]) -> str:
    """Who came first and by how much, in one sentence."""
    if len(finished) < 2:
        return ""
    first, second = finished[0], finished[1]
    ahead = round(100 * (first["values"]["final_accuracy"] - second["values"]["final_accuracy"]), 1)
    accuracy = first["texts"][0]
    if ahead == 0:
        return f"{first['label']} and {second['label']} have the same final accuracy, {accuracy}."
    return f"{first['label']} has the highest final accuracy, {accuracy}: {ahead:.1f} points above {second['label']}."


def floor_of(runs: Sequence[Mapping[str, Any]]) -> float:
    """Where all accuracy scales of the page start: the lowest measured accuracy, down to a multiple of ten."""
    matrices = (AccuracyMatrix.from_dict(r["matrix"]) for r in runs)
    learnt = [m.accuracy_ij[np.tril(m.total_ij > 0)] for m in matrices]  # above the diagonal: not learnt yet
    lowest = min((float(a.min()) for a in learnt if a.size), default=0.0)
    return min(90.0, math.floor(10 * lowest + 1e-9) * 10.0)


# --- the page ----------------------------------------------------------------------------------------------------


@cache
def template(package: str = "lamina.report", name: str = "template.html.j2") -> Template:
    """A template of ours, with the look and the words of the report."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {f.__name__: f for f in (percent, points, seconds, scaled, number, plain, share)}
    style = files("lamina.report").joinpath("style.css").read_text(encoding="utf-8")
    environment.globals |= {"interval": interval, "style": style}
    return environment.from_string(files(package).joinpath(name).read_text(encoding="utf-8"))


def render(runs: Sequence[Mapping[str, Any]], title: str | None = None) -> str:
    """The page as text. The same records give the same page."""
    if not runs:
        raise RunError("there is no run to report on: name at least one run directory")
    names, low = labels(runs), floor_of(runs)
    data = sorted({str(r["stream"]["data"]) for r in runs if r["stream"].get("data")})
    on = f" on {', '.join(data)}" if data else ""
    return template().render(
        title=title or (f"{names[0]}{on}" if len(runs) == 1 else f"{len(runs)} runs{on}"),
        compare=comparison(runs, names) if len(runs) > 1 else None,
        runs=[run_view(run, name, i, low) for i, (run, name) in enumerate(zip(runs, names, strict=True))],
        low=f"{low:g}",
        colours=range(charts.COLOURS),
    )


def write(runs: Sequence[Mapping[str, Any]], out: Path, *, title: str | None = None) -> Path:
    """Writes the page to `out`, whole or not at all, and returns `out`."""
    return write_text(render(runs, title), out)


def write_text(text: str, out: Path) -> Path:
    """Writes a file, whole or not at all, and returns `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return out


def read_record(run_directory: Path) -> dict[str, Any]:
    """The record of a run. RunError if it is absent, damaged, or of another format."""
    path = run_directory / "results.json"
    if not run_directory.is_dir():
        raise RunError(f"there is no run directory {run_directory}: check the path")
    if not path.is_file():
        raise RunError(
            f"{run_directory} holds no results.json: if its run was interrupted, go on with"
            f" `lamina resume {run_directory}`; otherwise it is not a run directory"
        )
    remedy = f"write it anew with `lamina resume {run_directory}`"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}): {remedy}") from error
    if not isinstance(record, dict):
        raise RunError(f"{path} is damaged (it holds a {type(record).__name__}, not a record): {remedy}")
    if record.get("format") != RECORD_FORMAT:
        raise RunError(
            f"{path} has format {record.get('format')!r}, and this version reads format {RECORD_FORMAT}:"
            " use the version of lamina that wrote it"
        )
    if missing := [name for name in REQUIRED if not record.get(name)]:
        raise RunError(f"{path} is damaged ({', '.join(missing)} missing): {remedy}")
    return record
