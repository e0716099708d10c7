"""How the cost of every method grows with the number of tasks: time per training step and prediction, memory, disk.

    python benchmarks/growth.py                                   measures; an hour. It can be stopped at any time: methods
                                                                  that are in the records are not measured again
    python benchmarks/growth.py --tasks 10 --methods ewc,color --out runs/growth.jsonl        a minute
    python benchmarks/growth.py --page docs/results/growth.md     page and plot from the records; nothing is measured

Every method learns one stream of 200 tasks, of two new classes each, in a process of its own. Streams of 10 and 50 tasks are
its prefixes (except for methods that use the number of tasks, which are given 200). Points are 1, 2, 5, 10, ... tasks.
The images are random: their content does not change the cost. Backbone: the embedded `nano` at 32 px, fp32, adapters of rank
10 on k and v of every block. All times are CPU times of one thread, which other work on the machine hardly changes; on an idle
machine they equal wall-clock time.
"""

import argparse
import gc
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import psutil
import torch

from lamina import __version__, backbones, data
from lamina.config import EvaluationConfig, TrainingConfig
from lamina.data import streams
from lamina.data.streams import Stream
from lamina.engine.loop import Loop
from lamina.engine.state import Position
from lamina.learner import Learner
from lamina.methods import METHODS
from lamina.report import charts
from lamina.report.text import scaled
from lamina.speed import accelerate
from lamina.types import Batch, Examples, Task

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "docs" / "results" / "records" / "growth.jsonl"
TASKS, MEASURED_AFTER, SHOWN = 200, (1, 2, 5, 10, 20, 50, 100, 200), (1, 10, 50, 200)
CLASSES, PER_CLASS, TEST_SHARE, BATCH, RANK, PREDICTED = 2, 16, 0.2, 16, 10, 64
EPOCHS = 8
"""Of a task that is measured, so that a median has enough steps; the others have one."""
WARM_UP = 2
"""Steps at the beginning of a task that are not counted."""
REPEATS = 5
SETTINGS: dict[str, dict[str, Any]] = {"taskarithmetic": {"memory_per_class": 2, "memory_epochs": 1}}
"""Beside the rank; otherwise the defaults. With those, fine-tuning on the stored examples of 200 tasks would take hours."""

Point = dict[str, float | None]
Record = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------ measuring


class Measured(Loop):
    """A loop that measures after some of the tasks, instead of evaluating, and saves only then."""

    def __init__(self, wanted: Collection[int], predicted: Batch, **settings: Any) -> None:
        super().__init__(**settings)
        self.wanted, self.predicted = wanted, predicted
        self.points: list[Point] = []
        self.step_times: list[float] = []
        self.begin_and_end = 0.0

    def save(self) -> None:
        """Does nothing after a phase: 800 checkpoints of up to 200 tasks would take too long."""

    def _begin(self, task: Task) -> Position:
        self.step_times, self.begin_and_end = [], 0.0
        measured = self.position.task + 1 in self.wanted
        self.training = self.training.model_copy(update={"epochs": EPOCHS if measured else 1})
        started = time.process_time()
        position = super()._begin(task)
        self.begin_and_end += time.process_time() - started
        return position

    def _end(self, task: Task) -> Position:
        started = time.process_time()
        position = super()._end(task)
        self.begin_and_end += time.process_time() - started
        return position

    def _step(self, *arguments: Any) -> float:
        started = time.process_time()
        loss = super()._step(*arguments)
        self.step_times.append(time.process_time() - started)
        return loss

    def _evaluate(self, task: Task) -> Position:  # noqa: ARG002
        now = self.position.task + 1
        if now in self.wanted:
            self.points.append(self.point())
            say(f"{self.method.name}: {now} of {len(self.stream)} tasks")
        return Position(now - 1, "done") if now == len(self.stream) else Position(now, "begin")

    @property
    def step_seconds(self) -> float | None:
        return float(np.median(self.step_times[WARM_UP:])) if self.step_times else None

    def point(self) -> Point:
        def predict() -> None:
            with self.learner.folded():
                self.method.predict(self.learner, self.predicted)

        def fold() -> None:
            with self.learner.folded():
                pass

        super().save()
        newest = max(path for path in self.checkpoints.iterdir() if path.name.isdigit())
        gc.collect()
        return {
            "tasks": self.position.task + 1,
            "resident_bytes": psutil.Process().memory_info().rss,
            "checkpoint_bytes": sum(path.stat().st_size for path in newest.iterdir()),
            "memory_bytes": self.method.memory_bytes,
            "stored_parameters": self.learner.stored_parameters(),
            "step_seconds": self.step_seconds,
            "prediction_seconds_per_image": median_of(predict) / len(self.predicted),
            "fold_seconds": median_of(fold),
            "begin_and_end_seconds": self.begin_and_end,
        }


def median_of(work: Callable[[], None]) -> float:
    found = []
    for _ in range(1 + REPEATS):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return float(np.median(found[1:]))


def make_stream(tasks: int, cache: Path) -> tuple[Stream, Batch]:
    """Returns a stream of random images, and a batch of them to predict."""
    per_class = math.ceil(PER_CLASS / (1 - TEST_SHARE))
    count = tasks * CLASSES * per_class
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    names = [f"class {number}" for number in range(tasks * CLASSES)]
    source = data.from_arrays(
        images, np.arange(count) % len(names), class_names=names, test_fraction=TEST_SHARE, name="noise"
    )
    transform = data.ImageTransform(size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    labelled = data.load_images(source, transform, cache=cache)
    stream = streams.make_stream(labelled, streams.class_plan(labelled, tasks), "class", per_class=PER_CLASS)
    rows_n = np.arange(PREDICTED) % count
    return stream, Examples(labelled.table, rows_n, labelled.labels_n[rows_n]).batch(np.arange(PREDICTED))


def settings_of(name: str) -> dict[str, Any]:
    rank = {"rank": RANK} if "rank" in METHODS[name].config_type.model_fields else {}
    return rank | SETTINGS.get(name, {})


def measure(name: str, tasks: int) -> Record:
    """One method, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        stream, predicted = make_stream(tasks, Path(folder) / "cache")

        def loop_over(part: Stream, wanted: Collection[int], checkpoints: str) -> Measured:
            method, learner = METHODS[name], Learner(backbones.load("nano", image_size=32))
            return Measured(
                wanted,
                predicted,
                learner=learner,
                steps=accelerate(learner),
                method=method(method.config_type(**settings_of(name)), tasks),
                stream=part,
                training=TrainingConfig(batch_size=BATCH),
                evaluation=EvaluationConfig(),
                seed=0,
                checkpoints=Path(folder) / checkpoints,
                checkpoint_seconds=math.inf,
            )

        loop = loop_over(stream, MEASURED_AFTER, "checkpoints")
        loop.run()
        again = loop_over(stream.first(1), (1,), "again")
        again.run()
    return {
        "method": name,
        "tasks": tasks,
        "settings": settings_of(name),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"system": sys.platform, "cores": os.cpu_count(), "threads": 1},
        "versions": {"lamina": __version__, "torch": torch.__version__},
        "points": loop.points,
        "again": again.points[0],
    }


def collect(names: Sequence[str], tasks: int, out: Path) -> list[str]:
    """Measure the methods that are not in the records. Returns the names of those that failed."""
    done, failed = {record["method"] for record in read(out, tasks)}, []
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name in done:
            say(f"{name}: in {out} already")
            continue
        command = [sys.executable, __file__, "--alone", name, "--tasks", str(tasks)]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if found.returncode:
            failed.append(name)
            continue
        line = found.stdout.splitlines()[-1]
        print(line, flush=True)
        cut_short = out.exists() and out.read_text(encoding="utf-8")[-1:] not in ("", "\n")
        with out.open("a", encoding="utf-8") as file:
            file.write(("\n" if cut_short else "") + line + "\n")
    return failed


def read(records: Path, tasks: int) -> list[Record]:
    """Returns the records of streams of this length, in the order of the methods. Lines that are not JSON are skipped."""
    found: dict[str, Record] = {}
    for line in records.read_text(encoding="utf-8").splitlines() if records.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            say(f"{records}: skipped a line that is not JSON; its method will be measured again")
            continue
        if record["tasks"] == tasks:
            found[record["method"]] = record
    return [found[name] for name in METHODS if name in found]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------- the page

BLOCK = re.compile(r"(<!-- growth -->\n).*(<!-- /growth -->)", re.DOTALL)
START = "# Growth with the number of tasks\n\n<!-- growth -->\n<!-- /growth -->\n"


def in_seconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def in_bytes(count: float) -> str:
    return scaled(count, "B")


QUANTITIES: dict[str, tuple[str, Callable[[float], str]]] = {
    "step_seconds": ("A training step of 16 images", in_seconds),
    "prediction_seconds_per_image": ("Prediction per image, in a batch of 64, folding included", in_seconds),
    "resident_bytes": ("Resident memory of the process", in_bytes),
    "checkpoint_bytes": ("A checkpoint on disk", in_bytes),
    "fold_seconds": ("Folding the live branches before a prediction, and undoing it", in_seconds),
    "begin_and_end_seconds": ("Beginning and end of a task, without training steps", in_seconds),
    "memory_bytes": ("Memory of the method, which is also part of a checkpoint", in_bytes),
    "stored_parameters": ("Parameters stored in the learner, including the head", scaled),
}
PANELS = {
    "step_seconds": ("training step", "ms", 1e3),
    "prediction_seconds_per_image": ("prediction of one image", "ms", 1e3),
    "resident_bytes": ("resident memory", "MB", 1e-6),
    "checkpoint_bytes": ("checkpoint on disk", "MB", 1e-6),
}


def write_page(page: Path, records: Sequence[Record], tasks: int) -> None:
    text = page.read_text(encoding="utf-8") if page.exists() else START
    if not BLOCK.search(text):
        sys.exit(
            f"{page} has no line <!-- growth --> followed by a line <!-- /growth -->. Add both: tables go between them."
        )
    plot = page.with_suffix(".svg")
    block = content(records, tasks, plot.name)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(BLOCK.sub(lambda m: f"{m[1]}\n{block}\n{m[2]}", text), encoding="utf-8")
    if records:
        plot.write_text(drawing(records), encoding="utf-8")


def content(records: Sequence[Record], tasks: int, plot: str) -> str:
    laws = [[f"`{name}`", method.needs.storage, method.needs.cost] for name, method in METHODS.items()]
    parts = [table(["method", "stored", "cost per step and prediction"], laws, numbers=False)]
    if not records:
        return "\n\n".join([*parts, "Nothing has been measured yet.", ""])
    parts.append(f"![Time per step and per prediction, resident memory and checkpoint size of every method]({plot})")
    shown = [n for n in SHOWN if n <= tasks]
    for key, (title, write) in QUANTITIES.items():
        rows = [[f"`{r['method']}`", *row(r, key, shown, write)] for r in records]
        last = f"{shown[-1]} over {shown[0]}"
        parts.append(f"**{title}**, by the number of tasks learnt\n\n{table(['method', *map(str, shown), last], rows)}")
    drift = [r["again"]["step_seconds"] / at(r, 1)["step_seconds"] for r in records if r["again"]["step_seconds"]]
    if drift:
        parts.append(
            f"Steps of task 1, repeated on a new learner at the end of the stream, took {min(drift):.2f} to "
            f"{max(drift):.2f} times as long as at its beginning: the machine itself may have changed by as much."
        )
    parts.append(facts(records, tasks))
    return "\n\n".join([*parts, ""])


def at(record: Record, tasks: int) -> Point:
    return next(point for point in record["points"] if point["tasks"] == tasks)


def row(record: Record, key: str, shown: Sequence[int], write: Callable[[float], str]) -> list[str]:
    values = [at(record, tasks)[key] for tasks in shown]
    texts = ["–" if value is None else write(value) for value in values]
    return [*texts, f"{values[-1] / values[0]:.2f}" if values[0] and values[-1] else "–"]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    rule = "|---" + ("|---:" if numbers else "|---") * (len(columns) - 1) + "|"
    return "\n".join([f"| {' | '.join(columns)} |", rule, *(f"| {' | '.join(line)} |" for line in rows)])


def facts(records: Sequence[Record], tasks: int) -> str:
    def each(key: str) -> str:
        return ", ".join(sorted({str(r[key]) if isinstance(r[key], str) else listed(r[key]) for r in records}))

    def listed(values: Mapping[str, Any]) -> str:
        return " ".join(f"{key} {value}" for key, value in values.items())

    special = "; ".join(f"`{name}` {listed(values)}" for name, values in SETTINGS.items())
    return (
        f"Streams of {tasks} tasks; {each('date')}; {each('machine')}; {each('versions')}. Rank {RANK}, and {special}; "
        f"otherwise the defaults. A task that is measured has {EPOCHS} epochs, the others have one. The time of a step is the "
        f"median over the task without its first {WARM_UP} steps, that of folding and prediction the median of {REPEATS} "
        "repeats. All are CPU times of one thread."
    )


# ------------------------------------------------------------------------------------------------------------- the plot

WIDTH, HEIGHT, GUTTER = 560.0, 330.0, 106.0
STYLE = """
svg { --s0:#0b5fa5; --s1:#b34700; --s2:#00735c; --s3:#97387f; --s4:#6d5c00; --s5:#4b4f5c; background:#fff }
text { font: 12px system-ui, "Noto Sans", "Liberation Sans", sans-serif; fill: #1b1f24 }
.a { font-weight: 600 } .t { fill: #59626c } .e { text-anchor: end } .c { text-anchor: middle } .label { fill: var(--c) }
.g { stroke: #d9dee3; fill: none } .l { stroke: var(--c); stroke-width: 1.6; fill: none } .m { fill: var(--c) }
.leader { stroke: var(--c); stroke-width: .8; stroke-dasharray: 1 2; fill: none }
"""


def drawing(records: Sequence[Record]) -> str:
    """Returns four panels with logarithmic axes: slope 1 is a cost proportional to the number of tasks, slope 0 a constant."""
    parts = [charts.tag("style", STYLE), charts.tag("rect", width="100%", height="100%", fill="#fff")]
    for number, (key, (title, unit, factor)) in enumerate(PANELS.items()):
        found = {r["method"]: [(p["tasks"], factor * p[key]) for p in r["points"] if p[key]] for r in records}
        lines = {name: points for name, points in found.items() if points}
        inside = panel(f"{title}, {unit}", lines) if lines else []
        place = f"translate({WIDTH * (number % 2):g} {HEIGHT * (number // 2):g})"
        parts.append(charts.tag("g", *inside, transform=place))
    size = {"width": 2 * WIDTH, "height": 2 * HEIGHT}
    xmlns = "http://www.w3.org/2000/svg"
    return (
        str(charts.drawing("Growth with the number of tasks", "One line per method", parts, xmlns=xmlns, **size)) + "\n"
    )


def panel(title: str, lines: Mapping[str, Sequence[charts.Point]]) -> list[str]:
    values = [y for points in lines.values() for _, y in points]
    tasks = sorted({x for points in lines.values() for x, _ in points})
    low, high = min(values) / 1.1, max(values) * 1.1
    frame = charts.Frame(
        (math.log10(tasks[0]), math.log10(tasks[-1])),
        (math.log10(low), math.log10(high)),
        left=54.0,
        right=WIDTH - GUTTER,
        bottom=HEIGHT - 46,
    )
    parts: list[str] = [charts.tag("text", title, class_="a", x=8, y=14)]
    for value in marks(low, high):
        y = frame.y(math.log10(value))
        parts.append(charts.tag("path", class_="g", d=f"M{frame.left:g} {y:.1f}H{frame.right:g}"))
        parts.append(charts.tag("text", f"{value:g}", class_="t e", x=frame.left - 6, y=y + 4))
    for value in tasks:
        parts.append(charts.tag("text", f"{value:g}", class_="t c", x=frame.x(math.log10(value)), y=frame.bottom + 18))
    middle = (frame.left + frame.right) / 2
    parts.append(charts.tag("text", "tasks learnt", class_="t c", x=middle, y=frame.bottom + 36))
    ends = [frame.y(math.log10(points[-1][1])) for points in lines.values()]
    for (name, points), label in zip(lines.items(), charts.spread(ends, 14, frame.top, frame.bottom), strict=True):
        style = list(METHODS).index(name)
        spots = [(frame.x(math.log10(x)), frame.y(math.log10(y))) for x, y in points]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        drawn = [
            charts.tag("path", class_="l", d=path, stroke_dasharray=charts.dash(style)),
            *(charts.marker(style, x, y) for x, y in spots),
            charts.tag(
                "path",
                class_="leader",
                d=f"M{spots[-1][0] + 5:.1f} {spots[-1][1]:.1f}L{frame.right + 12:.1f} {label:.1f}",
            ),
            charts.tag("text", name, class_="label", x=frame.right + 15, y=label + 4),
        ]
        parts.append(charts.tag("g", *drawn, style=charts.colour(style)))
    return parts


def marks(low: float, high: float) -> list[float]:
    """Returns the numbers of a logarithmic axis."""
    if high < 10 * low:
        return [value for value in charts.ticks(low, high, 5) if value > 0]
    digits = (1, 2, 5) if high < 1000 * low else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=TASKS, help=f"length of the stream ({TASKS})")
    parser.add_argument("--methods", default=",".join(METHODS), help="separated by commas (default: all)")
    parser.add_argument(
        "--out", type=Path, default=RECORDS, help="records, JSON lines; remove a line to measure it again"
    )
    parser.add_argument("--page", type=Path, help="write this page and its plot from the records, without measuring")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tasks not in MEASURED_AFTER:
        parser.error(f"--tasks {options.tasks}: choose one of {', '.join(map(str, MEASURED_AFTER))}")
    if options.alone:
        print(json.dumps(measure(options.alone, options.tasks)))
    elif options.page:
        write_page(options.page, read(options.out, options.tasks), options.tasks)
    else:
        names = options.methods.split(",")
        if unknown := sorted(set(names) - set(METHODS)):
            parser.error(f"--methods: no {', '.join(unknown)}; there are {', '.join(METHODS)}")
        if failed := collect(names, options.tasks, options.out):
            sys.exit(f"failed: {', '.join(failed)}; the others are in {options.out}")


if __name__ == "__main__":
    main()
