"""The section of the page about one run. A missing value is shown as an en dash, never guessed."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import yaml

from lamina.maths import metrics
from lamina.maths.metrics import DEFINITIONS, FORMULAS, AccuracyMatrix, Floats
from lamina.record import ClassRecord, CostRecord, LineageRecord, PredictionRecord, Record
from lamina.report import charts
from lamina.report.charts import Series
from lamina.report.text import count, interval, percent, plain, points, scaled, signed

LOSS_POINTS = 160
"""Most points drawn of a loss curve; longer ones are averaged over equal stretches."""
HEADLINES = 4
"""How many of TITLES stand at the top of every run."""
TITLES = {
    "final_accuracy": "Final accuracy",
    "average_accuracy": "Average accuracy",
    "forgetting": "Forgetting",
    "task_aware_accuracy": "Task-aware accuracy",
    "final_accuracy_micro": "Final micro accuracy",
    "average_accuracy_micro": "Average micro accuracy",
    "learning_accuracy": "Learning accuracy",
    "backward_transfer": "Backward transfer",
    "forward_transfer": "Forward transfer",
    "task_inference_accuracy": "Task-inference accuracy",
    "zero_shot_accuracy": "Zero-shot accuracy",
    "backward_transfer_trace": "Backward transfer (TRACE)",
    "perplexity_before": "Perplexity before",
    "perplexity_after": "Perplexity after",
}
IN_POINTS = ("forgetting", "backward_transfer", "backward_transfer_trace", "forward_transfer")
OF_LANGUAGE = ("zero_shot_accuracy", "backward_transfer_trace", "perplexity_before", "perplexity_after")
"""Shown for language models only."""
PHASES = {
    "load": "loading data and weights",
    "begin": "before each task",
    "train": "training",
    "end": "after each task",
    "evaluate": "evaluation",
    "checkpoint": "saving checkpoints",
}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A chart with its title, legend and caption."""

    title: str
    svg: str
    note: str
    legend: Sequence[tuple[str, str]] = ()


def metric_text(name: str, value: float | None) -> str:
    if name.startswith("perplexity") and value is not None and not math.isnan(value):
        return f"{value:.2f}"
    return points(value) if name in IN_POINTS else percent(value)


def sentences(run: Record) -> str:
    """Returns a summary: the tasks, the backbone and the result."""
    stream, backbone = run.stream, run.backbone
    tasks = stream.tasks
    classes = len({name for task in tasks for name in task.classes})
    domains = len({task.domain for task in tasks} - {None})
    within = count(classes, "class") + (f" in {count(domains, 'domain')}" if domains else "")
    source = f" of {stream.data}" if stream.data else ""
    start = ""
    if backbone:
        start = f", starting from the backbone {backbone.name}"
        start += f" ({scaled(backbone.parameters)} parameters)" if backbone.parameters else ""
    order = " one after the other" if len(tasks) > 1 else ""
    text = f"{run.method.name} learns {count(len(tasks), 'task')}{order}, {within}{source}{start}."
    if run.cost.kept_examples:
        kept = count(run.cost.kept_examples, "training example")
        text += f" It keeps {kept} of the tasks it has learnt and trains on them again."
    return f"{text} {result(run, len(tasks))}"


def result(run: Record, planned: int) -> str:
    """Returns the result in one or two sentences."""
    learnt, found = run.matrix.tasks, run.metrics
    if not learnt:
        return "No task has been learnt yet."
    micro, mean = found.final_accuracy_micro, found.final_accuracy
    agree = abs(micro - mean) < 0.0005  # then say it once, without two roundings of one number
    also = "" if agree else f" (mean over tasks: {percent(mean)})"
    kind = {"image": "test images", "text": "test texts"}.get(
        (run.backbone and run.backbone.kind) or "", "test examples"
    )
    verb, kind = ("predicts", "test examples") if run.language else ("classifies", kind)
    so_far = f"So far, after {learnt} of" if learnt < planned else "After"
    text = f"{so_far} {count(planned, 'task')}, it {verb} {percent(micro)} of {kind} correctly{also}."
    if run.language and not math.isnan(found.zero_shot_accuracy):
        text += f" Before the stream, the mean over tasks was {percent(found.zero_shot_accuracy)}."
    lost = round(100 * found.forgetting, 1)
    if learnt == 1:
        return text + " With one task there is nothing to forget."
    if lost < 0:
        return text + f" It forgets nothing: earlier tasks improve by {points(-found.forgetting)} on average."
    return text + (f" Forgetting is {points(found.forgetting)}." if lost > 0 else " It forgets nothing.")


def heat_map(run: Record, low: float) -> str:
    matrix, names = run.matrix, task_names(run)

    def tooltip(i: int, j: int) -> str:
        correct, total = int(matrix.correct_ij[i, j]), int(matrix.total_ij[i, j])
        of = f"{correct} of {total}; 95 %: {interval(correct, total)}"
        return f"task {j + 1} after task {i + 1}: {percent(correct / total)} ({of})"

    rows, columns = matrix.correct_ij.shape
    last = ", ".join(f"{100 * a:.1f}" for a in matrix.accuracy_ij[-1, : matrix.tasks])
    description = f"{rows} by {columns} matrix of accuracies in percent; the last row is {last}."
    return charts.heat_map(
        "Accuracy matrix", description, 100 * matrix.accuracy_ij, tooltip, names, task_labels(run), low
    )


def task_names(run: Record) -> list[str]:
    names = [task.name for task in run.stream.tasks]
    return names + [f"task {j + 1}" for j in range(len(names), run.matrix.correct_ij.shape[1])]


def task_labels(run: Record) -> list[str]:
    """Returns what charts write for each task: its number, with its name where that says more, as a domain's does."""
    counted = re.compile(r"task[- ]\d+")
    return [str(j) if counted.fullmatch(name) else f"{j} {name}" for j, name in enumerate(task_names(run), start=1)]


def numbered(values: Iterable[float], first: int = 1) -> list[charts.Point]:
    """Returns percentages against the number of tasks learnt, without the gaps."""
    return [(i, 100 * float(v)) for i, v in enumerate(values, start=first) if not math.isnan(v)]


def percent_text(value: float) -> str:
    return signed(f"{value:.1f} %")


def curves(run: Record, low: float) -> list[Drawing]:
    """Returns the small charts of one run: accuracy after each task, each task over time, forgetting of each task."""
    if run.matrix.tasks < 2:
        return []
    span: dict[str, Any] = {
        "x_range": (1, run.matrix.tasks),
        "y_range": (low, 100),
        "x_name": "tasks learnt",
        "y_name": "accuracy, %",
        "write": percent_text,
    }
    acc = metrics.incremental_accuracy(run.matrix)
    what = f"of {run.name} after each of {run.matrix.tasks} tasks"
    return [_mean_curve(run, acc, what, span), _task_curves(run, acc, what, span), _forgetting_by_task(run, what, low)]


def _mean_curve(run: Record, acc: Floats, what: str, span: Mapping[str, Any]) -> Drawing:
    micro = metrics.incremental_accuracy_micro(run.matrix)
    lines = [Series(name="mean over tasks", points=numbered(acc), style=0, accent=True)]
    agree = bool(np.nanmax(np.abs(micro - acc), initial=0.0) < 0.0005)
    legend: list[tuple[str, str]] = []
    if not agree:
        legend = [(charts.key(0, accent=True), "mean over tasks"), (charts.key(1), "micro: over test examples")]
        lines.insert(0, Series(name="micro: over test examples", points=numbered(micro), style=1))
    ends = f"from {percent(acc[0])} after the first to {percent(acc[-1])} after the last task"
    title = "Accuracy after each task"
    return Drawing(
        title=title,
        legend=legend,
        note="Accuracy on all tasks learnt so far." + (" Mean over tasks and micro accuracy agree." if agree else ""),
        svg=charts.lines(title, f"Accuracy {what}, {ends}", lines, **span),
    )


def _task_curves(run: Record, acc: Floats, what: str, span: Mapping[str, Any]) -> Drawing:
    a, last, names, labels = run.matrix.accuracy_ij, run.matrix.tasks - 1, task_names(run), task_labels(run)
    lines = [
        Series(
            name=f"task {j + 1} ({names[j]}): {percent(a[j, j])} when learnt, {percent(a[last, j])} at the end",
            points=numbered(a[j:, j], first=j + 1),
            label=labels[j],
        )
        for j in range(run.matrix.tasks)
    ]
    lines.append(Series(name="mean over tasks", points=numbered(acc), style=0, accent=True, markers=False))
    name = "its number or name stands at its end" if run.matrix.tasks <= charts.LABELS else "hover a line for its name"
    title = "Each task over time"
    return Drawing(
        title=title,
        note=f"One thin line per task, from the dot where it was learnt; {name}. Heavy line: mean over tasks.",
        svg=charts.lines(title, f"Accuracy on each task {what}", lines, **span),
    )


def _forgetting_by_task(run: Record, what: str, low: float) -> Drawing:
    names = task_names(run)
    rows: list[tuple[str, float | None, float]] = []
    for j, lost in enumerate(metrics.forgetting_by_task(run.matrix)):
        end = 100 * float(run.matrix.accuracy_ij[-1, j])
        best = None if math.isnan(lost) else end + 100 * float(lost)
        past = "just learnt" if best is None else f"best before {best:.1f} %, forgetting {points(float(lost))}"
        rows.append((f"task {j + 1} ({names[j]}): {percent_text(end)} at the end, {past}", best, end))
    title = "Forgetting of each task"
    return Drawing(
        title=title,
        note="Ring: best accuracy on the task before the last task was learnt. Dot: final accuracy. The line between them is "
        "the forgetting, or the gain where the dot is higher.",
        svg=charts.drops(
            title, f"Best and final accuracy {what}", rows, y_range=(low, 100), y_name="accuracy, %"
        ),
    )  # fmt: skip


def loss_curve(run: Record) -> list[Drawing]:
    noted = [(float(step), loss) for step, loss in run.losses if math.isfinite(loss)]
    if len(noted) < 2:
        return []
    width = math.ceil(len(noted) / LOSS_POINTS)
    drawn = [tuple(np.mean(noted[k : k + width], axis=0)) for k in range(0, len(noted), width)]
    ends = np.cumsum([entry.steps or 0 for entry in run.lineage])
    svg = charts.lines(
        "Training loss",
        f"Training loss over {noted[-1][0]:g} steps, from {noted[0][1]:.3g} to {noted[-1][1]:.3g}",
        [Series(name="training loss", points=drawn, style=0, accent=True, markers=False)],
        x_name="step",
        y_name="loss",
        x_range=(noted[0][0], noted[-1][0]),
        y_range=(min(0.0, *(v for _, v in drawn)), max(v for _, v in drawn) or 1.0),
        write=lambda v: f"{v:.3g}",
        marks=[float(e) for e in ends[:-1] if noted[0][0] < e < noted[-1][0]] if len(ends) <= 30 else [],
    )
    averaged = f" Each point is the mean of {width} recorded values." if width > 1 else ""
    note = "Loss of training batches, with what the method adds to it. Dotted lines: end of a task." + averaged
    return [Drawing(title="Training loss", note=note, svg=svg)]


def phases(cost: CostRecord) -> list[tuple[str, float, float]]:
    """Returns each phase, its seconds and its share of the total; what is in no phase is called other."""
    spent = {phase: value for phase, value in cost.seconds.items() if phase != "total" and value is not None}
    total = cost.total_seconds or sum(spent.values())
    if total - sum(spent.values()) > 0.05:
        spent["other"] = total - sum(spent.values())
    return [(PHASES.get(phase, phase), value, value / total if total else 0.0) for phase, value in spent.items()]


def _worst_first(entry: ClassRecord) -> float:
    """Orders classes by accuracy, those without examples last."""
    return 2.0 if entry.accuracy is None else entry.accuracy


def _method(run: Record) -> dict[str, Any]:
    method = run.method
    link = method.link or ""
    return {
        "title": plain(method.title or method.name),
        "source": ", ".join(part for part in (method.authors, method.venue) if part),
        "link": link if link.startswith(("https://", "http://")) else "",
        "departures": method.departures,
    }


def _metrics(run: Record) -> list[tuple[str, str, str, str]]:
    """Returns title, value, definition and formula of every metric."""
    notes, matrix = dict(FORMULAS), run.matrix
    if matrix.tasks:
        correct, total = (int(m[-1, : matrix.tasks].sum()) for m in (matrix.correct_ij, matrix.total_ij))
        notes["final_accuracy_micro"] += f": {correct} of {total}, 95 % interval {interval(correct, total)}"
    found = asdict(run.metrics)
    shown = {k: title for k, title in TITLES.items() if run.language is not None or k not in OF_LANGUAGE}
    return [(title, metric_text(k, found[k]), DEFINITIONS[k], notes.get(k, "")) for k, title in shown.items()]


def run_view(run: Record, label: str, style: int, low: float) -> dict[str, Any]:
    """Returns the values of the template for a run. low: where accuracy scales start, in percent."""
    matrix, planned, shown = run.matrix, len(run.stream.tasks), _metrics(run)
    learnt = {entry.task: entry for entry in run.lineage}
    return {
        "label": label,
        "style": style % charts.COLOURS,
        "summary": sentences(run),
        "progress": f"{matrix.tasks} of {count(planned, 'task')}" if matrix.tasks < planned else "",
        "headline": [one for one in shown if one[0] in headlines(run)],
        "metrics": shown,
        "heat_map": heat_map(run, low) if matrix.tasks else None,
        "numbered": matrix.correct_ij.shape[1] <= charts.NUMBERED,
        "ahead": bool(np.triu(matrix.total_ij, 1).any()),
        "curves": curves(run, low) + loss_curve(run),
        "classes": sorted(run.classes, key=_worst_first),
        "phases": phases(run.cost),
        "config": yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True).strip() if run.config else "",
        "lineage": [(task, learnt.get(task.name) or LineageRecord(task=task.name)) for task in run.stream.tasks],
        "machine": {name: value for name, value in run.machine if value is not None},
        "method": _method(run),
        "predictions": predictions(run),
        "record": run,
    }


def headlines(run: Record) -> list[str]:
    """Returns the titles of the metrics at the top of a run; the others are folded away."""
    own = ("zero_shot_accuracy", "backward_transfer", "perplexity_before", "perplexity_after") if run.language else ()
    return [*[*TITLES.values()][:HEADLINES], *(TITLES[key] for key in own)]


def predictions(run: Record) -> list[tuple[str, list[PredictionRecord]]]:
    """Returns the recorded predictions of a language model, task by task."""
    if run.language is None:
        return []
    tasks = dict.fromkeys(one.task for one in run.language.predictions)
    return [(task, [one for one in run.language.predictions if one.task == task]) for task in tasks]


def lowest_shown(runs: Sequence[Record]) -> float:
    """Returns where all accuracy scales of the page start: the lowest measured accuracy, down to a multiple of ten."""

    def measured(matrix: AccuracyMatrix) -> Floats:
        found: Floats = matrix.accuracy_ij[np.tril(matrix.total_ij > 0)]  # above the diagonal: not learnt yet
        return found

    lowest = min((float(a.min()) for run in runs if (a := measured(run.matrix)).size), default=0.0)
    return min(90.0, math.floor(10 * lowest + 1e-9) * 10.0)
