"""Create, resume and evaluate runs: one method on one stream, in a directory that can be killed and resumed."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from lamina import record, report
from lamina.config import RunConfig
from lamina.engine import checkpoint
from lamina.engine.evaluate import predict_all
from lamina.engine.loop import Event, Loop
from lamina.engine.order import in_order
from lamina.engine.state import Position
from lamina.errors import RunError
from lamina.record import Record
from lamina.runs import side_by_side
from lamina.runs.directory import locked, refuse_other, refuse_used, saved, with_whole_paths
from lamina.runs.environment import now
from lamina.runs.record import record_of
from lamina.runs.setup import MakeLoop, Setup, Watch
from lamina.runs.signals import stop_on_signals
from lamina.speed import keeping_memory
from lamina.types import Batch, Examples, Split


def create(config: RunConfig, out: Path, watch: Watch = lambda *_: None, *, make_loop: MakeLoop = Loop) -> Record:
    """Run in a new directory, from the start to the end, and return the record. make_loop: another loop, for experiments.

    Raises RunError where the directory holds something already, DataError, BackboneError, ConfigError or MethodError
    where the run cannot begin (nothing is left behind then), Interrupted when asked to stop by SIGINT or SIGTERM.
    """
    refuse_used(out)
    config = with_whole_paths(config)
    setup = Setup(config, None, watch)
    loop = setup.loop(out, make_loop)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out} cannot be made ({error.strerror}). Choose another directory with --out.") from error
    with locked(out):
        refuse_used(out)  # by a run that began meanwhile
        checkpoint.replace_text(out / "environment.json", json.dumps(setup.environment, indent=1) + "\n")
        checkpoint.replace_text(out / "config.json", config.model_dump_json(indent=1) + "\n")
        return _work(setup, loop, out, watch)


def resume(out: Path, watch: Watch = lambda *_: None, jobs: int | None = None, *, make_loop: MakeLoop = Loop) -> Record:
    """Go on with a run from its newest whole checkpoint; a finished one returns its record at once. jobs: tasks trained at
    a time from now on, where that is not what the run began with. make_loop: the one the run began with.

    Raises RunError where the directory is not a run or in use, CheckpointError where its state is damaged or belongs to
    other data, weights or settings.
    """
    refuse_other(out)
    with locked(out):
        config, environment = saved(out)
        if (out / record.FILE).exists():
            return record.read(out)
        setup = Setup(config.model_copy(update={"jobs": jobs or config.jobs}), environment, watch)
        return _work(setup, setup.loop(out, make_loop), out, watch)


def evaluate(out: Path, split: Split = "test") -> list[dict[str, Any]]:
    """Measure the newest model of a run on each task it has learnt: names, counts of right answers, and of examples."""
    config, environment = saved(out)
    setup = Setup(config, environment)
    loop = setup.loop(out)
    loop.restore()
    learnt = {row.task for row in loop.learner.outputs}
    found = []

    def batches(examples: Examples) -> Iterator[Batch]:
        positions = in_order(len(examples), config.evaluation.batch_size)
        return (examples.batch(p).to(loop.learner.device) for p in positions)

    with keeping_memory(), closing(setup.accelerated):
        for task in setup.stream:
            examples = task.split(split)
            if task.name in learnt and len(examples):
                answer = predict_all(
                    loop.learner, loop.consolidation, examples, batches, task.name, task_aware=setup.stream.task_aware
                )
                found.append(
                    {
                        "task": task.name,
                        "correct": answer.correct,
                        "task_aware_correct": answer.task_aware_correct,
                        "total": len(examples),
                    }
                )
    if not found:
        raise RunError(f"{out}: no task is learnt yet, or none has {split} examples. `lamina resume {out}` goes on.")
    return found


def train_task(out: Path, number: int, parent: int, watch: Watch) -> None:
    """Train one task of a run in a folder of its own, for the process `parent`; stop when that one is gone."""
    config, environment = saved(out)
    folder = side_by_side.place(out, number)
    with locked(folder, wait=True), stop_on_signals() as asked:
        setup = Setup(config, environment)
        loop = setup.loop(folder)
        loop.move_to(Position(number))
        loop.on_event = lambda event: watch(setup.stream, event)
        loop.should_stop = lambda: asked() or os.getppid() != parent
        with keeping_memory(), closing(setup.accelerated):
            loop.restore()
            loop.run(until="end")


def _work(setup: Setup, loop: Loop, out: Path, watch: Watch) -> Record:
    def on_event(event: Event) -> None:
        if event.seconds:
            with (out / "events.jsonl").open("a", encoding="utf-8") as log:
                line = dataclasses.asdict(event) | {"time": now(), "task": setup.stream[event.task].name}
                log.write(json.dumps(line) + "\n")
        watch(setup.stream, event)

    with stop_on_signals() as should_stop, keeping_memory(), closing(setup.accelerated):
        loop.on_event, loop.should_stop = on_event, should_stop
        loop.restore()
        loop.spend("load", time.perf_counter() - setup.started)
        if setup.config.jobs > 1 or (out / "parallel").exists():
            _train_side_by_side(setup, loop, out)
        loop.run()
    found = record_of(setup, loop)
    shutil.rmtree(out / "parallel", ignore_errors=True)
    report.write([found], out / "report.html")
    checkpoint.replace_text(out / record.FILE, json.dumps(found.to_json(), indent=1) + "\n")  # last: all is done
    return found


def _train_side_by_side(setup: Setup, loop: Loop, out: Path) -> None:
    """All tasks whose training has not begun in the loop, which then takes what other processes have trained."""
    now = loop.position
    begun = now.phase in ("end", "evaluate", "done") or now.step > 0
    names = {n: task.name for n, task in enumerate(setup.stream) if n >= now.task + begun}
    loop.trained = {n: side_by_side.place(out, n) / "checkpoints" for n in names}
    left = {n: name for n, name in names.items() if loop.trained_aside(n) is None}
    if not left:
        return
    started, total = time.perf_counter(), len(setup.stream)

    def show(done: int, at_work: str, seconds: float = 0.0) -> None:
        done += total - len(left)
        loop.on_event(Event(task=now.task, phase="parallel", done=done, total=total, workers=at_work, seconds=seconds))

    try:
        side_by_side.train(out, left, setup.config.jobs, show, loop.should_stop)
        show(len(left), "", time.perf_counter() - started)
    finally:
        clock = loop.state.clock
        spent = (clock.parallel_seconds or 0.0) + time.perf_counter() - started
        loop.state = dataclasses.replace(loop.state, clock=dataclasses.replace(clock, parallel_seconds=spent))
        loop.save()
