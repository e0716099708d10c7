"""From the records of runs to the page. Every figure is computed from the recorded counts by lamina.metrics.

A record is the JSON of RUN/results.json. Whatever a record lacks is shown as an en dash, never guessed.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined, Template

from lamina import metrics
from lamina.errors import RunError
from lamina.metrics import DEFINITIONS, AccuracyMatrix
from lamina.report import charts
from lamina.report.charts import Series

RECORD_FORMAT = 1
"""The value of "format" in the records this version reads."""
REQUIRED = ("name", "method", "stream", "matrix")
DASH = "–"
LOSS_POINTS = 160
"""Most points drawn of a loss curve; longer ones are averaged over equal stretches."""
TITLES = {
    "final_accuracy": "Final accuracy",
    "average_accuracy": "Average accuracy",
    "forgetting": "Forgetting",
    "final_accuracy_oracle": "Final accuracy, task known",
    "final_accuracy_weighted": "Final accuracy over examples",
    "average_accuracy_weighted": "Average accuracy over examples",
    "learning_accuracy": "Learning accuracy",
    "backward_transfer": "Backward transfer",
    "forward_transfer": "Forward transfer",
    "task_id_accuracy": "Task told right",
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


# --- numbers as text ---------------------------------------------------------------------------------------------


def known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def signed(text: str) -> str:
    """With a real minus sign, and without one on a zero."""
    return text.replace("-", "−") if any(c in "123456789" for c in text) else text.replace("-", "")


def percent(share: float | None, digits: int = 1) -> str:
    return signed(f"{100 * share:.{digits}f} %") if share is not None and known(share) else DASH


def points(share: float | None) -> str:
    """A difference of two accuracies."""
    return signed(f"{100 * share:.1f}") + " points" if share is not None and known(share) else DASH


def interval(correct: int, total: int) -> str:
    low, high = metrics.wilson_interval(correct, total)
    return f"{100 * low:.1f} to {100 * high:.1f} %" if total else DASH


def seconds(value: float | None) -> str:
    if value is None or not known(value):
        return DASH
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def scaled(value: float | None, unit: str = "") -> str:
    """Three figures and a decimal prefix: 4.05 M, 120 kB."""
    if value is None or not known(value):
        return DASH
    power = next((p for p in (4, 3, 2, 1) if abs(value) >= 999.5 * 1000 ** (p - 1)), 0)
    number = f"{value:g}" if power == 0 else f"{value / 1000**power:#.3g}".rstrip(".")
    prefix = ("", "k", "M", "G", "T")[power] if unit else ("", "k", "M", "billion", "trillion")[power]
    return f"{number} {prefix}{unit}".rstrip()


def number(value: Any, digits: int = 3) -> str:
    return signed(f"{value:.{digits}g}") if known(value) and isinstance(value, int | float) else DASH


def count(how_many: int, thing: str) -> str:
    plural = thing if how_many == 1 else thing[:-2] + "sses" if thing.endswith("ss") else thing + "s"
    return f"{how_many} {plural.replace('sssses', 'sses')}"


def plain(value: Any) -> str:
    return DASH if not known(value) or value == "" else str(value)


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
    told = run.get("task_id_accuracy") or []
    values: dict[str, float | None] = dict.fromkeys(TITLES)
    for name in ("forward_transfer", "final_accuracy_oracle", "task_id_accuracy"):
        values[name] = noted.get(name)
    if matrix.tasks:
        values |= metrics.summary(matrix)
    if run.get("oracle") and run["oracle"]["correct"]:
        values["final_accuracy_oracle"] = metrics.final_accuracy(AccuracyMatrix.from_dict(run["oracle"]))
    if told:
        values["task_id_accuracy"] = told[-1]
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
    weighted, mean = percent(values["final_accuracy_weighted"]), percent(values["final_accuracy"])
    same = "" if weighted == mean else f" ({mean} when every task counts the same)"
    so_far = f"So far, after {matrix.tasks} of" if matrix.tasks < len(tasks) else "After"
    text += f"{so_far} {count(len(tasks), 'task')} it answers {weighted} of {kind} right{same}; "
    lost = values["forgetting"]
    if matrix.tasks == 1 or lost is None:
        return text + "with one task there is nothing to forget."
    if round(100 * lost, 1) < 0:
        return text + f"it forgot nothing: earlier tasks improved by {points(-lost)} on average."
    return text + (f"it forgot {points(lost)}." if round(100 * lost, 1) > 0 else "it forgot nothing.")


def heat_map(run: Mapping[str, Any], matrix: AccuracyMatrix, low: float) -> str:
    names = task_names(run, matrix)

    def tooltip(i: int, j: int) -> str:
        right, total = int(matrix.correct_tt[i, j]), int(matrix.total_tt[i, j])
        share = f"{percent(right / total)}, {right} of {total} right, 95 % interval {interval(right, total)}"
        return f"after task {i + 1}, on task {j + 1} ({names[j]}): {share}"

    size = matrix.tasks
    description = f"{size} by {size} matrix of accuracies in percent; the last row is {last_row(matrix)}."
    return charts.heat_map("Accuracy matrix", description, 100 * matrix.accuracy_tt, tooltip, names, low)  # type: ignore[arg-type]


def last_row(matrix: AccuracyMatrix) -> str:
    return ", ".join(f"{100 * a:.1f}" for a in matrix.accuracy_tt[-1])


def task_names(run: Mapping[str, Any], matrix: AccuracyMatrix) -> list[str]:
    names = [str(t["name"]) for t in run["stream"]["tasks"]]
    return names + [f"task {i + 1}" for i in range(len(names), matrix.tasks)]


def numbered(values: Iterable[float]) -> list[charts.Point]:
    """Percentages against the number of tasks learnt, without the gaps."""
    return [(i, 100 * float(v)) for i, v in enumerate(values, start=1) if not math.isnan(v)]


def percent_text(value: float) -> str:
    return signed(f"{value:.1f} %")


def curves(run: Mapping[str, Any], matrix: AccuracyMatrix, style: int, low: float) -> list[dict[str, str]]:
    """The small drawings of one run: accuracy after each task, each task over time, what each task lost."""
    names, last = task_names(run, matrix), matrix.tasks - 1
    a, span = matrix.accuracy_tt, {"x_range": (1, matrix.tasks), "y_range": (low, 100), "x_name": "tasks learnt"}
    acc = metrics.incremental_accuracy(matrix)
    both = [
        Series(name="over examples", points=numbered(metrics.incremental_accuracy_weighted(matrix)), style=1),
        Series(name="mean over tasks", points=numbered(acc), style=0, accent=True),
    ]
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
    y_name, what = "accuracy, %", f"of {run['name']} after each of {matrix.tasks} tasks"
    ends = f"from {percent(acc[0])} after the first to {percent(acc[-1])} after the last task"
    return [
        {
            "title": "Accuracy after each task",
            "legend": [(charts.key(0), "mean over tasks"), (charts.key(1), "over examples")],
            "note": "ACC_i: accuracy after task i on all tasks learnt so far, with every task counting the same or"
            " every example counting the same.",
            "svg": charts.lines(
                "Accuracy after each task", f"ACC_i {what}, {ends}", both, y_name=y_name, write=percent_text, **span
            ),
        },
        {
            "title": "Each task over time",
            "legend": [],
            "note": "One thin line per task, from the dot where it was learnt to its number at the end; the heavy line"
            " is their mean.",
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
                "What each task lost", "; ".join(r[0] for r in rows), rows, y_range=(low, 100), y_name=y_name
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


def cost_view(cost: Mapping[str, Any]) -> dict[str, Any]:
    spent = {k: v for k, v in (cost.get("seconds") or {}).items() if k != "total" and known(v)}
    total = (cost.get("seconds") or {}).get("total") or sum(spent.values())
    if total - sum(spent.values()) > 0.05:
        spent["other"] = total - sum(spent.values())
    inference = cost.get("inference_cost")
    return {
        "phases": [(PHASES.get(k, k), seconds(v), v / total if total else 0.0) for k, v in spent.items()],
        "total": seconds(total or None),
        "rows": [
            ("Training steps", plain(cost.get("steps"))),
            ("Training speed", number(cost.get("train_examples_per_second")) + " examples/s"
             if known(cost.get("train_examples_per_second")) else DASH),
            ("Time outside training", percent(cost.get("outside_training_share"))),
            ("Peak memory", scaled(cost["peak_memory_mb"] * 1e6, "B") if known(cost.get("peak_memory_mb")) else DASH),
            ("Trainable parameters", scaled(cost.get("trainable_parameters"))),
            ("Stored parameters", scaled(cost.get("stored_parameters"))),
            ("Memory kept between tasks", scaled(cost.get("memory_bytes"), "B")),
            ("Inference cost", f"{inference:.2f} × the bare backbone" if known(inference) else DASH),
        ],
    }  # fmt: skip


def facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What it ran on."""
    stream, backbone, code = run["stream"], run.get("backbone") or {}, run.get("code") or {}
    version = " ".join(["lamina", plain(code.get("version"))])
    rows = [
        ("Started", plain(run.get("created"))),
        ("Data", plain(stream.get("data"))),
        ("Scenario", plain(stream.get("scenario"))),
        ("Stream fingerprint", plain(stream.get("fingerprint"))),
        ("Backbone", plain(backbone.get("name"))),
        ("Backbone hash", plain(backbone.get("hash"))),
        ("Code", version + (f", commit {code['commit']}" if code.get("commit") else "")),
    ]
    return rows + [(k.replace("_", " ").capitalize(), plain(v)) for k, v in (run.get("machine") or {}).items()]


def lineage(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    learnt = {row["task"]: row for row in run.get("lineage") or []}
    rows = []
    for i, task in enumerate(run["stream"]["tasks"], start=1):
        row = learnt.get(task["name"], {})
        rows.append(
            {
                "number": i,
                "name": task["name"] + (f" ({task['domain']})" if task.get("domain") else ""),
                "classes": [str(c) for c in task["classes"]],
                "cells": [
                    plain(row.get("learnt")).replace("T", " ").replace("Z", " UTC"),
                    plain(row.get("steps")),
                    f"{number(row.get('loss_first'))} → {number(row.get('loss_last'))}" if row else DASH,
                    seconds(row.get("seconds")),
                    f"{percent(row.get('accuracy_when_learnt'))} → {percent(row.get('accuracy_at_end'))}"
                    if row
                    else DASH,
                    percent(row.get("negative_flips")),
                ],
            }
        )
    return rows


def class_rows(run: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Name, task, right of total, accuracy, interval; worst first, those without examples last."""
    rows = sorted(run.get("classes") or [], key=lambda c: c["correct"] / c["total"] if c["total"] else 2.0)
    return [
        (plain(c["name"]), plain(c.get("task")), f"{c['correct']} of {c['total']}",
         percent(c["correct"] / c["total"] if c["total"] else None), interval(c["correct"], c["total"]))
        for c in rows
    ]  # fmt: skip


def run_view(run: Mapping[str, Any], label: str, style: int, low: float) -> dict[str, Any]:
    matrix, method = AccuracyMatrix.from_dict(run["matrix"]), run["method"]
    values = figures(run, matrix)
    notes = {}
    if matrix.tasks:
        right, total = int(matrix.correct_tt[-1].sum()), int(matrix.total_tt[-1].sum())
        notes["final_accuracy_weighted"] = f"{right} of {total}, 95 % interval {interval(right, total)}"
    shown = [(TITLES[k], figure_text(k, v), DEFINITIONS[k], notes.get(k, "")) for k, v in values.items()]
    drawings = curves(run, matrix, style, low) if matrix.tasks > 1 else []
    loss = loss_curve(run)
    planned = len(run["stream"]["tasks"])
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
        "numbered": matrix.tasks <= charts.NUMBERED,
        "curves": drawings + ([loss] if loss else []),
        "classes": class_rows(run),
        "cost": cost_view(run.get("cost") or {}),
        "config": yaml.safe_dump(run.get("config") or {}, sort_keys=False, allow_unicode=True).strip(),
        "lineage": lineage(run),
        "facts": facts(run),
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
    ("Task known", "final_accuracy_oracle", max),
    ("Time", "seconds", min),
    ("Trainable parameters", "trainable_parameters", min),
    ("Stored parameters", "stored_parameters", min),
    ("Memory kept", "memory_bytes", min),
)


def comparison(runs: Sequence[Mapping[str, Any]], names: Sequence[str], low: float) -> dict[str, Any]:
    """The table, sorted by final accuracy with unfinished runs last, and the overlaid curves."""
    matrices = [AccuracyMatrix.from_dict(r["matrix"]) for r in runs]
    rows = []
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
    for title, key, function in (
        ("Accuracy after each task", "average_accuracy", metrics.incremental_accuracy),
        ("Forgetting after each task", "forgetting", metrics.forgetting_after),
    ):
        series = [
            Series(name=name, points=numbered(function(m)), style=i, label=name)
            for i, (name, m) in enumerate(zip(names, matrices, strict=True))
        ]
        heights = [y for s in series for _, y in s.points]
        forgot = key == "forgetting"
        bounds = (min(0.0, *heights), max(1.0, *heights)) if forgot else (low, 100.0)
        final = "; ".join(f"{s.name} ends at {s.points[-1][1]:.1f}" for s in series if s.points)
        svg = charts.lines(
            title, final, series, x_name="tasks learnt", y_name="points" if forgot else "accuracy, %",
            x_range=(1, longest), y_range=bounds, write=lambda v, f=forgot: signed(f"{v:.1f}{'' if f else ' %'}"),
        ) if longest > 1 else ""  # fmt: skip
        drawings.append({"title": title, "svg": svg, "legend": [], "note": DEFINITIONS[key]})
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
    matrices = [AccuracyMatrix.from_dict(r["matrix"]) for r in runs]
    lowest = min((float(np.nanmin(m.accuracy_tt)) for m in matrices if m.total_tt.any()), default=0.0)
    return min(90.0, math.floor(10 * lowest + 1e-9) * 10.0)


# --- the page ----------------------------------------------------------------------------------------------------


@cache
def template() -> Template:
    source = files("lamina.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source)


def render(runs: Sequence[Mapping[str, Any]], title: str | None = None) -> str:
    """The page as text. The same records give the same page."""
    if not runs:
        raise RunError("there is no run to report on: name at least one run directory")
    names, low = labels(runs), floor_of(runs)
    data = sorted({str(r["stream"]["data"]) for r in runs if r["stream"].get("data")})
    on = f" on {', '.join(data)}" if data else ""
    return template().render(
        title=title or (f"{names[0]}{on}" if len(runs) == 1 else f"{len(runs)} runs{on}"),
        compare=comparison(runs, names, low) if len(runs) > 1 else None,
        runs=[run_view(run, name, i, low) for i, (run, name) in enumerate(zip(runs, names, strict=True))],
        low=f"{low:g}",
        colours=range(charts.COLOURS),
    )


def write(runs: Sequence[Mapping[str, Any]], out: Path, *, title: str | None = None) -> Path:
    """Writes the page to `out`, whole or not at all, and returns `out`."""
    page = render(runs, title)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
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
