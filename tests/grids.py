"""Comparisons without training: runs that are made up, with records as real ones have them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from lamina import record, runs
from lamina.compare.cells import Place
from lamina.compare.runners import Started
from lamina.config import RunConfig
from lamina.maths.metrics import AccuracyMatrix
from lamina.record import (
    BackboneRecord,
    CodeRecord,
    CostRecord,
    MachineRecord,
    MethodRecord,
    Record,
    StreamRecord,
    TaskRecord,
)
from lamina.runs.side_by_side import Process


def record_of(config: RunConfig, accuracy: float, tasks: int = 3) -> Record:
    """A record in which every accuracy is the same, in hundredths."""
    tasks = 1 if config.stream.joint else config.stream.first or tasks
    total = np.tril(np.full((tasks, tasks), 100))
    matrix = AccuracyMatrix(np.tril(np.full((tasks, tasks), round(100 * accuracy))), total)
    return Record(
        name=config.method["name"],
        created=datetime.now(UTC).isoformat(),
        seed=config.seed,
        split=config.evaluation.split,
        method=MethodRecord(name=config.method["name"]),
        config=config.model_dump(mode="json"),
        stream=StreamRecord(
            scenario="class-incremental",
            fingerprint="f" * 8,
            data="made up",
            kind="image",
            joint=config.stream.joint,
            tasks=tuple(TaskRecord(name=f"task-{t}", classes=(f"{t}",)) for t in range(tasks)),
        ),
        backbone=BackboneRecord(name="nano", hash="b" * 8),
        machine=MachineRecord(torch="2", python="3", cpu="abacus", threads=1, precision="fp32"),
        code=CodeRecord(version="0"),
        matrix=matrix,
        task_aware=matrix,
        task_inference_accuracy=(0.5,) * tasks,
        cost=CostRecord(
            seconds={"total": 10.0},
            peak_memory_mb=500.0,
            trainable_parameters=1200,
            stored_parameters=3400,
            memory_bytes=0,
        ),
    )


@dataclass
class Ended:
    """A process that has done its work."""

    code: int
    pid: int = 1

    def poll(self) -> int | None:
        return self.code

    def wait(self) -> int:
        return self.code

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


@dataclass
class MadeUp:
    """A runner of cells that are done at once. accuracy: of a run, or None where it fails."""

    accuracy: Callable[[RunConfig], float | None]
    started: list[RunConfig] = field(default_factory=list)
    side_by_side: int = 1
    pause: float = 0.0

    def start(self, cells: Sequence[Started]) -> list[Process]:
        return [self.start_one(cell) for cell in cells]

    def leave(self) -> str | None:
        return None

    def reason(self, place: Place) -> str:
        return ""

    def start_one(self, cell: Started) -> Process:
        place = cell.place
        config = runs.load_config(place.config, [])
        self.started.append(config)
        accuracy = self.accuracy(config)
        if accuracy is None:
            place.log.write_text("==== \nit begins\nerror: the loss is nan\n")
            return Ended(2)
        place.run.mkdir(exist_ok=True)
        record.write(record_of(config, accuracy), place.run)
        return Ended(0)


@dataclass
class Told:
    """A viewer that keeps what it is told."""

    lines: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.lines.append(text)

    def show(self, *_: object) -> None: ...


def write_grid(folder: Path, text: str, name: str = "grid.yaml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name
