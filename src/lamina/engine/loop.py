"""Loop: a state machine over (task, phase, step) that can be stopped anywhere and resumes to the same bits on a CPU.

    begin ──> train ──> end ──> evaluate ──> begin of the next task ──> ... ──> done
              step 0..n

Everything that matters is saved after every phase, and within `train` after a given time; what `begin` prepared is saved
with the first steps. `begin`, `end` and `evaluate` depend only on what was saved before them, so an interrupted one is
repeated from its start. No random generator has a state: order, augmentation and initial weights are functions of (seed,
task, epoch, step, sample).
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from lamina.config import ConsolidationConfig, EvaluationConfig, RehearsalConfig, TrainingConfig
from lamina.data.streams import Stream
from lamina.engine import checkpoint, optim
from lamina.engine.batches import Order
from lamina.engine.completions import questions as as_questions
from lamina.engine.consolidate import Consolidation
from lamina.engine.finite import check_finite
from lamina.engine.fitting import check_language, check_rehearsal
from lamina.engine.measure import Features, Measure, Memos
from lamina.engine.order import in_order, set_torch_seed, steps_per_epoch
from lamina.engine.rehearsal import Kept
from lamina.engine.state import Loss, Phase, Position, RunState, TaskEntry, now
from lamina.engine.steps import Planned, Steps
from lamina.errors import CheckpointError, MethodError, TrainingError
from lamina.learner import Learner
from lamina.maths.metrics import AccuracyMatrix
from lamina.methods.base import Method, Pass, Step
from lamina.types import Augment, Batch, Examples, Task

MOMENTS_EPOCH = {"begin": -1, "end": -2}
"""Augmentation in passes that are not training: epochs of their own."""
FORMAT = 3
"""Of the content of a checkpoint. It changes whenever an older or newer lamina could not read it."""
LOSS_POINTS = 40
"""How many losses of a task are recorded."""


class Interrupted(Exception):
    """Raised out of `Loop.run` after a request to stop."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Progress that a watcher may show."""

    task: int
    phase: Phase | Literal["load", "parallel"]
    done: int = 0
    total: int = 0
    loss: float | None = None
    accuracy: float | None = None
    seconds: float = 0.0
    workers: str | None = None
    """What processes that train side by side are doing."""
    note: str | None = None
    """Something worth saying once, for example that a damaged checkpoint was skipped."""


class Loop:
    """Takes a learner and a method through a stream.

    identity: fingerprints of configuration, stream and weights; a checkpoint with other ones is refused.
    on_event: called with every step and at the end of every phase. should_stop: asked between steps and batches.
    trained: for tasks trained by other processes, the folder of their checkpoints, from which their result is taken.
    steps: how batches and gradients are made; `lamina.speed.accelerate` returns a faster way. text: tokens of a text from
    outside the stream in windows, whose perplexity is measured with every task (language models only).
    Raises MethodError where the method does not fit the scenario of the stream, the consolidation, or rehearsal.
    """

    def __init__(
        self,
        *,
        learner: Learner,
        method: Method[Any],
        stream: Stream,
        training: TrainingConfig,
        evaluation: EvaluationConfig,
        seed: int,
        checkpoints: Path,
        checkpoint_seconds: float = 30.0,
        identity: Mapping[str, str] | None = None,
        on_event: Callable[[Event], None] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
        on_save: Callable[[str], None] = lambda _: None,
        consolidation: ConsolidationConfig | None = None,
        rehearsal: RehearsalConfig | None = None,
        trained: Mapping[int, Path] | None = None,
        steps: Steps | None = None,
        text: Sequence[Tensor] = (),
    ) -> None:
        if stream.scenario not in method.scenarios:
            raise MethodError(
                f"method {method.name!r} does not fit a {stream.scenario}-incremental stream; it is made for "
                f"{', '.join(method.scenarios)}. `lamina methods` shows which methods fit."
            )
        self.rehearsal = rehearsal or RehearsalConfig()
        check_rehearsal(self.rehearsal, type(method))
        check_language(learner, method, stream.scenario)
        self.learner, self.method, self.stream = learner, method, stream
        working = WeakMethod(self._working)  # not a cycle: what a loop has mapped is freed with it
        method.working = lambda done, total: (found := working()) and found(done, total)
        self.training, self.evaluation, self.seed = training, evaluation, seed
        self.checkpoints, self.checkpoint_seconds = checkpoints, checkpoint_seconds
        self.identity = {"format": str(FORMAT)} | dict(identity or {})
        self.on_event, self.should_stop, self.on_save = on_event, should_stop, on_save
        self.consolidation = Consolidation(consolidation or ConsolidationConfig(), method)
        self.consolidation.check(learner)
        self.trained = trained or {}
        self.steps, self.text = steps or Steps(), text
        self.state = RunState()
        self.last_predictions: dict[str, Tensor] = {}
        """Class id predicted for every test example after the last task, by the number of its task."""
        self._optimizer_state: dict[str, Tensor] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._damaged: list[Path] = []
        self._features: Features = {}  # of test examples, where no later task changes them
        self._memos: dict[int, Memos] = {}

    @property
    def position(self) -> Position:
        return self.state.position

    @property
    def matrix(self) -> AccuracyMatrix:
        return self.state.matrix

    def move_to(self, position: Position) -> None:
        self.state = replace(self.state, position=position)

    def kept(self) -> Kept:
        """Returns the examples kept of finished tasks."""
        return Kept(self.stream.tasks[: self.position.task], self.rehearsal.per_class, self.rehearsal.ratio)

    # -- the state machine --------------------------------------------------------------------------------------------

    def run(self, until: Phase = "done") -> None:
        """Continue from the position to the end of the stream, or to the first phase of this name.

        Raises Interrupted when asked to stop, TrainingError where the loss or a result is not finite.
        """
        phases: dict[Phase, Callable[[Task], Position]] = {
            "begin": self._begin,
            "train": self._train,
            "end": self._end,
            "evaluate": self._evaluate,
        }
        while self.position.phase != until:
            phase, task = self.position.phase, self.stream[self.position.task]
            started = time.perf_counter()
            following = phases[phase](task)
            seconds = time.perf_counter() - started
            if phase != "train":  # training keeps its own time, so that little of it is lost in a crash
                self.spend(phase, seconds)
            self._tell(phase, done=1, total=1, seconds=seconds)
            self.move_to(following)
            if following.phase != "train":
                self.save()

    def _begin(self, task: Task) -> Position:
        if self.position.task == 0 and self.state.language is None:
            self.state = self.measure().before(self.state)
        set_torch_seed(self.seed, "begin", task.name)
        self.consolidation.begin(self.learner, self.pass_over("begin", task))
        self.begin_method(task)
        trained = sum(p.numel() for p in self.learner.trainable().values()) if self._trains() else 0
        entry = TaskEntry(task=task.name, trainable_parameters=trained, steps=self._count(task))
        self.state = replace(self.state, lineage=(*self.state.lineage, entry))
        return Position(self.position.task, "train" if self._trains() else "end")

    def begin_method(self, task: Task) -> None:
        """What the method does at the beginning of a task."""
        self._note_single_class(task)
        training, per_epoch = self._plan(task)
        self.method.total_rate = optim.total_rate(training, per_epoch, later=self.position.task > 0)
        self.method.begin(self.learner, task, self.pass_over("begin", task))

    def _train(self, task: Task) -> Position:
        steps = self._count(task)
        if self.position.task in self.trained:
            self._take(task)
        else:
            self.descend(task, steps)
        check_finite(self.learner.trainable(), f"trained parameters of task {task.name!r}", self.training.lr)
        return Position(self.position.task, "end", steps)

    def descend(self, task: Task, steps: int) -> None:
        """The remaining training steps of a task."""
        parameters = self.learner.trainable()
        later = self.position.task > 0
        rate = optim.adapter_rate(self.training, later=later)
        self._optimizer = optim.make_optimizer(parameters, self.training, self.learner.undecayed(), later=later)
        optim.restore_optimizer(self._optimizer, parameters, self._optimizer_state)
        size = self.training.batch_size
        training, per_epoch = self._plan(task)
        kept = self.kept()
        own = partial(self.method.loss, self.learner, task=task)
        gradients = self.steps.gradients(
            kept.loss(self.learner, own, partial(self.method.in_training, self.learner)),
            [*parameters.values()],
            Planned(kept.with_new(size), training.epochs * (len(task.train) // size), self.note),
        )
        since, first = time.perf_counter(), self.position.step
        order = Order(task.train, size, seed=self.seed, task=task.name, by_length=self.learner.generates)
        makers = (
            partial(self._training_batch, task, order, step, step // per_epoch, kept) for step in range(first, steps)
        )
        for step, batch in enumerate(self.steps.batches(makers), first):
            stopping = self.should_stop()
            if stopping or time.perf_counter() - since >= self.checkpoint_seconds:
                self.spend("train", time.perf_counter() - since)
                check_finite(parameters, f"trained parameters of task {task.name!r}", self.training.lr)
                self.save()
                since = time.perf_counter()
            if stopping:
                raise Interrupted
            factor = optim.rate_factor(training, step // per_epoch)
            optim.set_rate(self._optimizer, factor)
            loss = self._step(task, batch, Step(step, steps, rate * factor), parameters, gradients)
            losses = self.state.losses
            if step % max(1, steps // LOSS_POINTS) == 0 or step == steps - 1:
                losses = (*losses, Loss(self.position.task, step, loss))
            self.state = replace(self.state, position=Position(self.position.task, "train", step + 1), losses=losses)
            self._tell("train", done=step + 1, total=steps, loss=loss)
        self.spend("train", time.perf_counter() - since)
        self._optimizer, self._optimizer_state = None, {}

    def _step(
        self,
        task: Task,
        batch: Batch,
        step: Step,
        parameters: Mapping[str, nn.Parameter],
        gradients: Callable[[Batch], Tensor],
    ) -> float:
        """Does one training step and returns its loss."""
        assert self._optimizer is not None
        set_torch_seed(self.seed, "step", task.name, step.done)
        value = gradients(batch).item()
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} in task {task.name!r} at step {step.done + 1}. The last good state is in "
                f"{self.checkpoints}. Start again with a smaller training.lr (now {self.training.lr}) or training.clip=1."
            )
        self.method.after_backward(self.learner)
        if self.training.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), self.training.clip)
        self._optimizer.step()
        self.method.after_step(self.learner, step)
        clock = self.state.clock
        self.state = replace(self.state, clock=replace(clock, examples=clock.examples + len(batch)))
        return value

    def _training_batch(self, task: Task, order: Order, step: int, epoch: int, kept: Kept) -> Batch:
        new = task.train.batch(order.positions(step), Augment(self.seed, epoch))
        return kept.mixed(new, self.seed, task.name, step).to(self.learner.device)

    def trained_aside(self, number: int) -> checkpoint.Loaded | None:
        """Returns the state at the end of a task's training in another process; None if that has not finished."""
        loaded = self._newest(self.trained[number])
        end = Position(number, "end", self._count(self.stream[number]))
        return loaded if loaded and Position(**loaded.documents["state"]["position"]) == end else None

    def _take(self, task: Task) -> None:
        """Take over what another process has trained of this task."""
        loaded = self.trained_aside(self.position.task)
        if loaded is None:
            raise CheckpointError(
                f"{self.trained[self.position.task]} does not hold the finished training of task {task.name!r}. "
                f"`lamina resume` trains the rest."
            )
        theirs = RunState.from_json(loaded.documents["state"], loaded.documents["clock"])
        self.learner.set_trainable(loaded.tensors["learner"])
        clock = replace(self.state.clock, examples=self.state.clock.examples + theirs.clock.examples)
        self.state = replace(self.state, losses=self.state.losses + theirs.losses, clock=clock)
        for text in theirs.notes:
            self.note(text)
        self.spend("train", theirs.clock.seconds["train"])
        steps = self._count(task)
        self._tell("train", done=steps, total=steps, loss=theirs.losses[-1].value)

    def _end(self, task: Task) -> Position:
        set_torch_seed(self.seed, "end", task.name)
        self.end_method(task)
        self.consolidation.end(self.learner, task, self.pass_over("end", task))
        kept = self.learner.tensors() | self.method.memory | self.consolidation.memory
        check_finite(kept, f"result of task {task.name!r}", self.training.lr)
        return Position(self.position.task, "evaluate")

    def end_method(self, task: Task) -> None:
        """What the method does at the end of a task."""
        self.method.end(self.learner, task, self.pass_over("end", task))

    def _evaluate(self, task: Task) -> Position:
        current = self.position.task
        state, self.last_predictions = self.measure().after(self.state, current, self.last_predictions)
        self.state = state.with_entry(
            stored_parameters=self.learner.stored_parameters(),
            memory_bytes=self.method.memory_bytes + self.consolidation.memory_bytes,
        )
        clock = self.state.clock
        self.state = replace(self.state, clock=replace(clock, finished={**clock.finished, str(current): now()}))
        self._tell("evaluate", accuracy=float(self.matrix.accuracy_ij[current, : current + 1].mean()))
        return Position(current, "done") if current + 1 == len(self.stream) else Position(current + 1, "begin")

    def _working(self, done: int, total: int) -> None:
        """Tell the watcher how far long work of a method is. Raises Interrupted when asked to stop."""
        if self.should_stop():
            raise Interrupted
        self._tell(self.position.phase, done=done, total=total)

    # -- passes over data -----------------------------------------------------------------------------------------------

    def pass_over(self, phase: Literal["begin", "end"], task: Task) -> Pass:
        """Returns what a method is given to go through the training data of a task."""

        def batches(*, augmented: bool) -> Iterator[Batch]:
            augment = Augment(self.seed, MOMENTS_EPOCH[phase]) if augmented else None
            return self._batches(phase, task.train, augment)

        return batches

    def _batches(
        self, phase: Phase, examples: Examples, augment: Augment | None = None, *, questions: bool = False
    ) -> Iterator[Batch]:
        done = 0
        make = partial(as_questions, examples) if questions else partial(examples.batch, augment=augment)
        makers = (
            partial(lambda positions: make(positions).to(self.learner.device), positions)
            for positions in in_order(len(examples), self.evaluation.batch_size)
        )
        for batch in self.steps.batches(makers):
            if self.should_stop():
                raise Interrupted
            yield batch
            done += len(batch)
            self._tell(phase, done=done, total=len(examples))

    def measure(self) -> Measure:
        """Returns what measures the learner of this loop."""
        if self._trains():
            self._features = {}
        lasting = self.consolidation.config.classifier != "own" and not self.method.trains_on(self.position.task + 1)
        return Measure(
            self.learner,
            self.consolidation,
            self.stream,
            self.evaluation,
            lambda examples, questions: self._batches("evaluate", examples, questions=questions),
            self.text,
            self._features if lasting else None,
            self._memos if self.consolidation.selects and len(self.stream) > 1 else None,
        )

    def _count(self, task: Task) -> int:
        """Returns the number of training steps of a task."""
        training, per_epoch = self._plan(task)
        return training.epochs * per_epoch if self._trains() else 0

    def _plan(self, task: Task) -> tuple[TrainingConfig, int]:
        """Returns the settings of training for a task, and its steps per epoch."""
        per_epoch = steps_per_epoch(len(task.train), self.training.batch_size)
        return optim.for_task(self.training, per_epoch), per_epoch

    def _trains(self) -> bool:
        """Whether the current task has training steps."""
        return self.method.trains_on(self.position.task)

    # -- what survives a crash ------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the next checkpoint. Raises CheckpointError where it cannot be written."""
        started = time.perf_counter()
        for directory in self._damaged:
            checkpoint.set_aside(directory)
        self._damaged = []
        checkpoint.save(self.checkpoints, *self.content(), self.on_save)
        self.spend("checkpoint", time.perf_counter() - started)

    def content(self) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """Returns the documents and tensors of a checkpoint: the inverse of `adopt`."""
        optimizer_state = self._optimizer_state
        if self._optimizer is not None:
            optimizer_state = optim.optimizer_tensors(self._optimizer, self.learner.trainable())
        state = {"identity": self.identity, "outline": self.learner.outline(), **self.state.to_json()}
        tensors = {
            "learner": self.learner.tensors(),
            "memory": self.method.memory,
            "optimizer": optimizer_state,
            "predictions": self.last_predictions,
        }
        if self.consolidation.memory:
            tensors["consolidation"] = self.consolidation.memory
        return {"state": state, "clock": asdict(self.state.clock)}, tensors

    def restore(self) -> None:
        """Go to the newest whole checkpoint, if there is one, and note those that were damaged. The learner and the method
        must be new.

        Raises CheckpointError where none is whole, or where it belongs to another configuration, stream, or backbone.
        """
        loaded = self._newest(self.checkpoints)
        if loaded is None:
            return
        self.adopt(loaded.documents, loaded.tensors)
        self._damaged = list(loaded.damaged)
        for damage in loaded.damaged.values():
            self._tell(
                self.position.phase, note=f"{damage}. Continuing from checkpoint {loaded.number}, which is whole."
            )

    def adopt(self, documents: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over the documents and tensors of a checkpoint. The learner and the method must be new."""
        self.state = RunState.from_json(documents["state"], documents["clock"])
        restore(self.learner, self.method, self.consolidation, documents["state"]["outline"], tensors)
        self.last_predictions, self._optimizer_state = dict(tensors["predictions"]), dict(tensors["optimizer"])

    def _newest(self, folder: Path) -> checkpoint.Loaded | None:
        """Returns the newest whole checkpoint, which must be of this configuration, stream and backbone."""
        loaded = checkpoint.load_newest(folder)
        if loaded is None:
            return None
        for what, value in self.identity.items():
            found = loaded.documents["state"]["identity"].get(what)
            if found != value:
                raise CheckpointError(
                    f"checkpoint {loaded.number} in {folder} was made with another {what} ({found}, now {value}). Restore "
                    f"what changed, or start a new run."
                )
        return loaded

    def _note_single_class(self, task: Task) -> None:
        of_classes = self._trains() and not self.learner.generates
        if of_classes and len(task.classes) == 1 and not len(self.kept()):
            self.note(
                f"task {task.name!r} has a single class: the cross-entropy over its own outputs is 0, so adapters learn "
                f"nothing from it. Learn two or more classes at a time, or use a method without training (`prototype`)."
            )

    # -- progress -------------------------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Record something that a user should know, and tell the watcher."""
        if text not in self.state.notes:
            self.state = replace(self.state, notes=(*self.state.notes, text))
        self._tell(self.position.phase, note=text)

    def spend(self, phase: str, seconds: float) -> None:
        task = self.position.task if phase == "train" else None
        self.state = replace(self.state, clock=self.state.clock.spent(phase, seconds, task))

    def _tell(self, phase: Phase, **facts: Any) -> None:
        self.on_event(Event(task=self.position.task, phase=phase, **facts))


def restore(
    learner: Learner,
    method: Method[Any],
    consolidation: Consolidation,
    outline: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Give a new learner, method and consolidation what a checkpoint holds of them."""
    learner.restore(outline, tensors["learner"], method.branch_type)
    # Copies, laid out in memory as fresh tensors are: the last bits of a product depend on where its factors begin.
    method.memory = {name: value.to(learner.device, copy=True) for name, value in tensors["memory"].items()}
    consolidation.memory = {name: value.clone() for name, value in tensors.get("consolidation", {}).items()}
