"""Create, resume and evaluate runs: one method on one stream, in a directory that can be killed and resumed."""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lamina import data, record, report
from lamina.config import RunConfig, differences, fingerprint
from lamina.engine import checkpoint
from lamina.engine import world as processes
from lamina.engine.completions import Examiner, questions
from lamina.engine.evaluate import predict_all
from lamina.engine.loop import Event, Interrupted, Loop
from lamina.engine.order import in_order
from lamina.engine.state import Position, now
from lamina.engine.world import World
from lamina.errors import CheckpointError, ConfigError, RunError
from lamina.learner import LanguageLearner
from lamina.methods import METHODS
from lamina.record import Record
from lamina.runs import directory, side_by_side
from lamina.runs.directory import Begun, begun, locked
from lamina.runs.record import record_of
from lamina.runs.setup import MakeLoop, Setup, Watch
from lamina.runs.signals import stop_on_signals
from lamina.runs.tracking import Tracking, check_trackers
from lamina.speed import keeping_memory
from lamina.types import Batch, Examples, Split


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Predictions of a run's newest model for one task."""

    task: str
    correct: int
    task_aware_correct: int
    """Correct predictions if the task's identity is given."""
    total: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def task_aware_accuracy(self) -> float:
        return self.task_aware_correct / self.total


def create(config: RunConfig, out: Path, watch: Watch = lambda *_: None, *, make_loop: MakeLoop = Loop) -> Record:
    """Run in a new directory, from the start to the end. Returns the record. make_loop: another loop, for experiments.

    Raises RunError where the directory holds something already or lies inside the data; DataError, BackboneError, ConfigError
    or MethodError where the run cannot begin (nothing is left behind then); Interrupted when asked to stop by SIGINT or
    SIGTERM.
    """
    check_trackers(config)
    if processes.launched():
        return _together(processes.join(), config, out, watch, make_loop)
    directory.refuse_used(out)
    directory.refuse_inside_data(out, config.data.source)
    setup = Setup(directory.with_whole_paths(config), None, watch)
    loop = setup.loop(out, make_loop)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out} cannot be made ({error.strerror}). Choose another directory with --out.") from error
    with locked(out):
        directory.refuse_used(out)  # by a run that began meanwhile
        directory.begin(out, setup)
        return _work(setup, loop, out, watch)


def resume(
    out: Path,
    watch: Watch = lambda *_: None,
    jobs: int | None = None,
    source: str | None = None,
    *,
    make_loop: MakeLoop = Loop,
) -> Record:
    """Continue a run from its newest whole checkpoint. Returns the record, at once if the run is finished.

    jobs: tasks trained in parallel from now on; None: as before. source: where the same data lies now; None: where it lay.
    make_loop: the one the run began with.
    Raises RunError where the directory is not a run or in use, CheckpointError where its state is damaged or belongs to
    other data, weights or settings.
    """
    directory.refuse_other(out)
    if processes.launched():
        return _together(processes.join(), None, out, watch, make_loop, jobs=jobs, source=source)
    if done := directory.finished(out):
        return done
    with locked(out):
        if done := directory.finished(out):  # by a run that ended meanwhile
            return done
        if (out / record.FILE).exists():
            note = f"{out / record.FILE} is damaged, and is made anew from the checkpoint"
            watch(None, Event(task=0, phase="evaluate", note=note))
        start = begun(out)
        config = _moved(start.config, source)
        setup = Setup(config.model_copy(update={"jobs": jobs or config.jobs}), start.environment, watch)
        loop = _loop(setup, start, out, make_loop)
        if source is not None or jobs is not None:
            directory.begin(out, setup)  # for later commands, and the processes of the run
        return _work(setup, loop, out, watch)


def evaluate(
    out: Path,
    split: Split = "test",
    watch: Watch = lambda *_: None,
    *,
    source: str | None = None,
    fall_back: bool = False,
) -> list[Measured]:
    """Measure the newest model of a run on each task it has finished. The watch is told which task is not finished.

    source: where the same data lies now; None: where it lay. fall_back: measure the newest whole checkpoint where a newer one
    is damaged.
    Raises CheckpointError for a damaged checkpoint unless fall_back is set; RunError where there is nothing to measure.
    """
    start = begun(out)
    _refuse_damaged(out, fall_back)
    setup = Setup(_moved(start.config, source), start.environment, watch)
    loop = _loop(setup, start, out)
    loop.on_event = lambda event: watch(setup.stream, event)
    loop.restore()
    position = loop.position
    finished = position.task + (position.phase in ("evaluate", "done"))
    if finished < len(setup.stream):
        name = setup.stream[finished].name
        note = f"task {name!r} is not finished: not measured"
        if position.phase in ("train", "end"):
            note += ". The weights are in training for it: the accuracy on earlier tasks may differ when it is finished"
        watch(setup.stream, Event(task=finished, phase="evaluate", note=note))
    with keeping_memory(), closing(setup.accelerated):
        numbers = [number for number in range(finished) if len(setup.stream[number].split(split))]
        found = [_measure(loop, number, setup.stream[number].split(split)) for number in numbers]
    if not finished:
        raise RunError(f"{out}: no task is finished yet. `lamina resume {out}` continues the run.")
    if not found:
        raise RunError(f"{out}: no finished task has {split} examples. Choose another --split.")
    return found


def train_task(out: Path, number: int, parent: int, watch: Watch) -> None:
    """Train one task of a run in a folder of its own, for the process `parent`. Stops when that process is gone."""
    start = begun(out)
    folder = side_by_side.place(out, number)
    with locked(folder, wait=True), stop_on_signals() as asked:
        setup = Setup(start.config, start.environment)
        loop = setup.loop(folder)
        loop.move_to(Position(number))
        loop.on_event = lambda event: watch(setup.stream, event)
        loop.should_stop = lambda: asked() or os.getppid() != parent
        with keeping_memory(), closing(setup.accelerated):
            loop.restore()
            loop.run(until="end")


def _moved(config: RunConfig, source: str | None) -> RunConfig:
    """Returns the configuration with the data at another place, if one is given. Raises RunError where there is none."""
    if source is None:
        place = Path(config.data.source)
        if place.is_absolute() and not place.exists():
            raise RunError(
                f"the data of this run is no longer at {place}. If it was moved, give its place with --data."
            )
        return config
    return directory.with_whole_paths(
        config.model_copy(update={"data": config.data.model_copy(update={"source": source})})
    )


def _loop(setup: Setup, start: Begun, out: Path, make_loop: MakeLoop = Loop) -> Loop:
    """Returns the loop of a run that has begun. Raises CheckpointError naming what has changed in its data."""
    _refuse_other_data(setup, start, out)
    return setup.loop(out, make_loop)


def _refuse_other_data(setup: Setup, start: Begun, out: Path) -> None:
    if start.source["stream"] != setup.stream.fingerprint:
        changed = data.difference(start.source["data"]["classes"], setup.source["classes"])
        raise CheckpointError(
            f"{out}: the data at {setup.config.data.source} is not the data this run began with: {changed}. Restore it, or "
            f"start a new run."
        )


def _refuse_damaged(out: Path, fall_back: bool) -> None:
    """Raises CheckpointError for a damaged newest checkpoint, unless an older one may be measured."""
    loaded = checkpoint.load_newest(out / "checkpoints")
    if loaded and loaded.damaged and not fall_back:
        raise CheckpointError(
            f"{'; '.join(loaded.damaged.values())}. The newest whole checkpoint is {loaded.number}: measure it with "
            f"--fall-back, or train the rest again with `lamina resume {out}`."
        )


def _measure(loop: Loop, number: int, examples: Examples) -> Measured:
    """Returns the predictions of a loop's learner for these examples of a task."""
    task = loop.stream[number].name

    def batches(examples: Examples, *, asked: bool = False) -> Iterator[Batch]:
        make = partial(questions, examples) if asked else examples.batch
        for positions_b in in_order(len(examples), loop.evaluation.batch_size):
            yield make(positions_b).to(loop.learner.device)
            done = int(positions_b[-1]) + 1
            loop.on_event(Event(task=number, phase="evaluate", done=done, total=len(examples)))

    learner, deployed = loop.learner, loop.consolidation
    if isinstance(learner, LanguageLearner):
        examiner = Examiner(learner, deployed, task, loop.evaluation.max_new_tokens)
        found = examiner.ask(examples, partial(batches, asked=True)).predictions
    else:
        found = predict_all(learner, deployed, examples, batches, task, task_aware=loop.stream.task_aware)
    return Measured(
        task=task,
        correct=found.correct,
        task_aware_correct=found.task_aware_correct,
        total=len(examples),
    )


def _together(
    world: World,
    config: RunConfig | None,
    out: Path,
    watch: Watch,
    make_loop: MakeLoop,
    *,
    jobs: int | None = None,
    source: str | None = None,
) -> Record:
    """Make or continue a run by the processes that `torchrun` starts and, where one is lost, starts again. All see the
    directory of the run; the first one writes there. config: None where a run is to be continued. jobs, source: as in `resume`.

    Raises what `create` and `resume` raise; RunError where the directory holds a run of other settings.
    """
    setup: Setup | None = None
    with processes.noticing_losses(), ExitStack() as stack:
        if world.is_first:
            whole = None if config is None else directory.with_whole_paths(config)
            if whole is not None:
                directory.refuse_inside_data(out, whole.data.source)
                out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out))
            if whole is not None and not (out / directory.CONFIG).exists():
                directory.refuse_used(out)
                _refuse_side_by_side(whole, world)
                setup = Setup(whole, None, watch, world=world)
                directory.begin(out, setup)
            else:
                found = begun(out)
                if whole is not None and _what(found.config) != _what(whole):
                    keys = [key for key, *_ in differences(found.config.model_dump(), whole.model_dump())]
                    raise RunError(
                        f"{out} holds a run of other settings ({', '.join(keys[:5])}). Choose another --out."
                    )
                if not directory.finished(out):
                    more = {"jobs": jobs or found.config.jobs}
                    wanted = whole or _moved(found.config, source).model_copy(update=more)
                    _refuse_side_by_side(wanted, world)
                    setup = Setup(wanted, found.environment, watch, world=world)
                    _refuse_other_data(setup, found, out)
                    directory.write_config(out, wanted)
        world.wait()
        if done := directory.finished(out):
            world.wait()
            return done
        start = begun(out)
        setup = setup or Setup(start.config, start.environment, watch, world=world)
        try:
            return _work(setup, _loop(setup, start, out, make_loop), out, watch)
        finally:
            if sys.exc_info()[0] in (None, Interrupted):  # after another error, the others may not come
                world.wait()


def _refuse_side_by_side(config: RunConfig, world: World) -> None:
    if config.jobs > 1 and world.size > 1:
        raise ConfigError(
            f"jobs = {config.jobs}: tasks are trained in parallel by one process, and torchrun started several for this run. "
            "Give --jobs 1."
        )


def _what(config: RunConfig) -> tuple[str, str, str]:
    """Returns what two configurations of the same run have in common."""
    return fingerprint(config, METHODS[config.method["name"]].config_type), config.data.source, config.backbone.name


def _work(setup: Setup, loop: Loop, out: Path, watch: Watch) -> Record:
    world = setup.world
    if not world.is_first:
        loop.save = lambda: None  # type: ignore[method-assign]

    def on_event(event: Event) -> None:
        if event.seconds and world.size > 1:
            world.check_same(_mark(loop), "what was learnt")
        if not world.is_first:
            return
        if event.seconds:
            with (out / "events.jsonl").open("a", encoding="utf-8") as log:
                line = dataclasses.asdict(event) | {"time": now(), "task": setup.stream[event.task].name}
                log.write(json.dumps(line) + "\n")
        watch(setup.stream, event)
        tracked.event(event, setup.stream, loop.state)

    def note(text: str) -> None:
        watch(None, Event(task=0, phase="evaluate", note=text))

    tracked = Tracking(setup.config if world.is_first else RunConfig(), out, note)
    with stop_on_signals() as should_stop, keeping_memory(), closing(setup.accelerated), closing(tracked):
        loop.on_event, loop.should_stop = on_event, lambda: world.any(should_stop())
        loop.restore()
        loop.spend("load", time.perf_counter() - setup.started)
        if world.size == 1 and (setup.config.jobs > 1 or (out / "parallel").exists()):
            _train_side_by_side(setup, loop, out)
        loop.run()
    found = record_of(setup, loop)
    if not world.is_first:
        return found
    shutil.rmtree(out / "parallel", ignore_errors=True)
    report.write([found], out / "report.html")
    record.write(found, out)  # last: it says that all is done
    return found


def _mark(loop: Loop) -> str:
    """Returns a hash of what the learner holds."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(loop.learner.tensors().items()):
        digest.update(f"|{name}|".encode() + tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _is_trained(loop: Loop, number: int, out: Path) -> bool:
    """Returns whether another process has finished the training of a task. What it left damaged is removed."""
    try:
        return loop.trained_aside(number) is not None
    except CheckpointError as error:
        folder = side_by_side.place(out, number)
        note = f"{error}\nTask {loop.stream[number].name!r} is trained again."
        loop.on_event(Event(task=loop.position.task, phase="parallel", note=note))
        shutil.rmtree(folder)
        return False


def _train_side_by_side(setup: Setup, loop: Loop, out: Path) -> None:
    """Train in other processes all tasks whose training has not begun in the loop, which then takes the result."""
    position = loop.position
    has_begun = position.phase in ("end", "evaluate", "done") or position.step > 0
    names = {n: task.name for n, task in enumerate(setup.stream) if n >= position.task + has_begun}
    loop.trained = {n: side_by_side.place(out, n) / "checkpoints" for n in names}
    left = {n: name for n, name in names.items() if not _is_trained(loop, n, out)}
    if not left:
        return
    started, total = time.perf_counter(), len(setup.stream)

    def show(done: int, at_work: str, seconds: float = 0.0) -> None:
        done += total - len(left)
        loop.on_event(
            Event(task=position.task, phase="parallel", done=done, total=total, workers=at_work, seconds=seconds)
        )

    try:
        side_by_side.train(out, left, setup.config.jobs, show, loop.should_stop)
        show(len(left), "", time.perf_counter() - started)
    finally:
        clock = loop.state.clock
        spent = (clock.parallel_seconds or 0.0) + time.perf_counter() - started
        loop.state = dataclasses.replace(loop.state, clock=dataclasses.replace(clock, parallel_seconds=spent))
        loop.save()
