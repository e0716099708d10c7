"""The engine: a state machine over (task, phase, step) that can be stopped anywhere and goes on to the same bits.

    begin ──> train ──> end ──> evaluate ──> begin of the next task ──> ... ──> done
              step 0..n

After every phase, and within `train` after a given time, everything that matters is saved; what `begin` prepared for training
is saved with the first steps. `begin`, `end` and `evaluate` depend only on what was saved before them, so an interrupted one
is simply done again from its start. Nothing random has a state: order, augmentation and initial weights are functions of
(seed, task, epoch, step, sample).
"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamina.config import ConsolidationConfig, EvaluationConfig, TrainingConfig
from lamina.engine import checkpoint, distil, optim
from lamina.engine.ahead import ahead
from lamina.engine.consolidation import Consolidation
from lamina.engine.evaluate import Answers, answers
from lamina.engine.graphs import WORTH_IT, Gradients
from lamina.engine.order import in_order, positions_of_step, set_torch_seed, steps_per_epoch
from lamina.errors import CheckpointError, MethodError, TrainingError
from lamina.learner import Learner
from lamina.methods.base import Method, Pass, Step
from lamina.metrics import AccuracyMatrix, negative_flips
from lamina.streams import Stream
from lamina.types import Augment, Batch, Examples, Task

Phase = Literal["begin", "train", "end", "evaluate", "done"]
MOMENTS_EPOCH = {"begin": -1, "end": -2}
"""Augmentation in passes that are not training: epochs of their own."""
FORMAT = 2
"""Of what a checkpoint holds. It goes up with every change that an older or newer lamina could not read."""
LOSS_POINTS = 40
"""How many losses of a task are recorded."""


class Interrupted(Exception):
    """Raised out of `Loop.run` after a request to stop."""


@dataclass(frozen=True)
class Position:
    """Where a run is. step counts the training steps done in this task."""

    task: int = 0
    phase: Phase = "begin"
    step: int = 0


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something a watcher may show: what is being done, and how far it is."""

    task: int
    phase: Phase | Literal["load", "parallel"]
    done: int = 0
    total: int = 0
    loss: float | None = None
    accuracy: float | None = None
    seconds: float = 0.0
    at_work: str | None = None
    """What processes that train side by side are doing."""
    note: str | None = None
    """Something worth saying once, for example that a damaged checkpoint was passed over."""


class Loop:
    """Takes a learner and a method through a stream.

    identity: fingerprints of configuration, stream and weights; a checkpoint with other ones is refused.
    on_event: called with every step and at the end of every phase. should_stop: asked between steps and batches.
    keep_chain: where to note what the method has made of each task. replay: where another run noted it; nothing is trained
    then, and only what happens around the method is done.
    views: epoch e of training sees augmentation e mod views; None: every epoch one of its own.
    trained: for tasks that other processes train, the folder of their checkpoints; what they learnt is taken from there.
    Raises MethodError where the method does not fit the scenario of the stream, or the consolidation.
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
        keep_chain: Path | None = None,
        replay: Path | None = None,
        trained: Mapping[int, Path] | None = None,
        views: int | None = None,
    ) -> None:
        if stream.scenario not in method.scenarios:
            raise MethodError(
                f"method {method.name!r} does not fit a {stream.scenario}-incremental stream; it is made for "
                f"{', '.join(method.scenarios)}. `lamina methods` shows which methods fit."
            )
        self.learner, self.method, self.stream = learner, method, stream
        self.training, self.evaluation, self.seed = training, evaluation, seed
        self.checkpoints, self.checkpoint_seconds = checkpoints, checkpoint_seconds
        self.identity = {"format": str(FORMAT)} | dict(identity or {})
        self.on_event, self.should_stop, self.on_save = on_event, should_stop, on_save
        around = consolidation or ConsolidationConfig()
        self.consolidation = Consolidation(around, method, None if replay is None else self._past)
        self.consolidation.check(learner)
        self.keep_chain, self.replay = keep_chain, replay
        self.teacher: dict[str, Tensor] = {}
        self.trained = trained or {}
        self.views = views
        self.position = Position()
        self.matrix, self.known_task = AccuracyMatrix.empty(), AccuracyMatrix.empty()
        self.right_task: list[list[int]] = []
        self.last_answers: dict[str, Tensor] = {}
        self.lineage: list[dict[str, Any]] = []
        self.losses: list[tuple[int, int, float]] = []
        self.clock: dict[str, Any] = {"seconds": {}, "tasks": {}, "learnt": {}, "examples": 0}
        self._optimizer_state: dict[str, Tensor] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._damaged: list[Path] = []

    # -- the state machine ------------------------------------------------------------------------------------------

    def run(self, until: Phase = "done") -> None:
        """Go on from the position to the end of the stream, or until this phase comes. Raises Interrupted when asked to
        stop, TrainingError where the loss is not finite."""
        phases: dict[Phase, Callable[[Task], Position]] = {
            "begin": self._begin,
            "train": self._train,
            "end": self._end,
            "evaluate": self._evaluate,
        }
        while self.position.phase != until:
            phase, task = self.position.phase, self.stream[self.position.task]
            started, self.consolidation.spared = time.perf_counter(), 0.0
            following = phases[phase](task)
            seconds = time.perf_counter() - started + self.consolidation.spared
            if phase != "train":  # which keeps its own time, so that little of it is lost in a crash
                self._spend(phase, seconds)
            self._tell(phase, done=1, total=1, seconds=seconds)
            self.position = following
            if following.phase != "train":
                self.save()

    def _begin(self, task: Task) -> Position:
        set_torch_seed(self.seed, "begin", task.name)
        self.consolidation.begin(self.learner, self._pass("begin", task))
        if self.replay is not None:
            self.lineage.append({"task": task.name})
            return Position(self.position.task, "end")
        if self.training.distil and self.learner.head.tasks:
            self.teacher = distil.teacher_of(self.learner)
        per_epoch = steps_per_epoch(len(task.train), self.training.batch_size)
        self.method.total_rate = optim.total_rate(self.training, per_epoch, later=self.position.task > 0)
        self.method.begin(self.learner, task, self._pass("begin", task))
        self.lineage.append(
            {
                "task": task.name,
                "trainable_parameters": sum(p.numel() for p in self.learner.trainable().values()),
                "steps": self._steps(task) if self.method.trains else 0,
            }
        )
        return Position(self.position.task, "train" if self.method.trains else "end")

    def _train(self, task: Task) -> Position:
        if self.position.task in self.trained:
            return self._take(task)
        with self.learner.in_halves():
            return self._descend(task)

    def _descend(self, task: Task) -> Position:
        """The training steps that are left of a task."""
        parameters = self.learner.trainable()
        later = self.position.task > 0
        rate = optim.adapter_rate(self.training, later=later)
        self._optimizer = optim.make_optimizer(parameters, self.training, self.learner.undecayed(), later=later)
        optim.restore_optimizer(self._optimizer, parameters, self._optimizer_state)
        per_epoch, steps = steps_per_epoch(len(task.train), self.training.batch_size), self._steps(task)
        since = time.perf_counter()
        first = self.position.step
        gradients = self._gradients(task, parameters.values())
        makers = (partial(self._training_batch, task, step, step // per_epoch) for step in range(first, steps))
        for step, batch in enumerate(ahead(makers, self.learner.device), first):
            stopping = self.should_stop()
            if stopping or time.perf_counter() - since >= self.checkpoint_seconds:
                self._spend("train", time.perf_counter() - since)
                self.save()
                since = time.perf_counter()
            if stopping:
                raise Interrupted
            epoch = step // per_epoch
            factor = optim.rate_factor(self.training, epoch)
            optim.set_rate(self._optimizer, factor)
            loss = self._step(task, batch, Step(step, steps, rate * factor), parameters, gradients)
            self.position = Position(self.position.task, "train", step + 1)
            if step % max(1, steps // LOSS_POINTS) == 0 or step == steps - 1:
                self.losses.append((self.position.task, step, loss))
            self._tell("train", done=step + 1, total=steps, loss=loss)
        self._spend("train", time.perf_counter() - since)
        self._optimizer, self._optimizer_state, self.teacher = None, {}, {}
        return Position(self.position.task, "end", steps)

    def trained_aside(self, number: int) -> checkpoint.Loaded | None:
        """The state at the end of a task's training in another process; None where that is not over."""
        loaded = self._newest(self.trained[number])
        end = Position(number, "end", self._steps(self.stream[number]))
        return loaded if loaded and Position(**loaded.documents["state"]["position"]) == end else None

    def _take(self, task: Task) -> Position:
        """What another process has trained of this task, as if it had been trained here."""
        loaded = self.trained_aside(self.position.task)
        if loaded is None:
            raise CheckpointError(
                f"{self.trained[self.position.task]} does not hold all that task {task.name!r} has trained. `lamina resume` "
                f"trains the rest."
            )
        self.learner.take(loaded.tensors["learner"])
        self.losses += [(number, step, loss) for number, step, loss in loaded.documents["state"]["losses"]]
        self.clock["examples"] += loaded.documents["clock"]["examples"]
        self._spend("train", loaded.documents["clock"]["seconds"]["train"])
        steps = self._steps(task)
        self._tell("train", done=steps, total=steps, loss=self.losses[-1][2])
        return Position(self.position.task, "end", steps)

    def _training_batch(self, task: Task, step: int, epoch: int) -> Batch:
        size = self.training.batch_size
        positions = positions_of_step(len(task.train), size, step, seed=self.seed, task=task.name)
        view = epoch if self.views is None else epoch % self.views
        return task.train.batch(positions, Augment(self.seed, view)).to(self.learner.device)

    def _gradients(self, task: Task, parameters: Collection[nn.Parameter]) -> Gradients:
        def loss(batch: Batch) -> Tensor:
            fitting = self.method.loss(self.learner, batch, task)
            if not self.teacher:
                return fitting
            return fitting + self.training.distil * distil.divergence(self.learner, self.teacher, batch, task)

        size = self.training.batch_size
        alike = self.learner.backbone.kind == "image" and self.learner.reuse is None
        enough = self.training.epochs * (len(task.train) // size) >= WORTH_IT
        on_card = self.learner.device.type == "cuda"
        recorded = size if on_card and alike and enough else None
        return Gradients(loss, list(parameters), recorded, lambda text: self._tell("train", note=text))

    def _step(
        self, task: Task, batch: Batch, step: Step, parameters: Mapping[str, nn.Parameter], gradients: Gradients
    ) -> float:
        """One training step; its loss."""
        assert self._optimizer is not None
        set_torch_seed(self.seed, "step", task.name, step.done)
        value = gradients(batch).item()
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} in task {task.name!r} at step {step.done + 1}. The last good state is in "
                f"{self.checkpoints}. A smaller training.lr (now {self.training.lr}) or training.clip=1 usually helps."
            )
        self.method.after_backward(self.learner)
        if self.training.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), self.training.clip)
        self._optimizer.step()
        self.method.after_step(self.learner, step)
        self.clock["examples"] += len(batch)
        return value

    def _end(self, task: Task) -> Position:
        set_torch_seed(self.seed, "end", task.name)
        if self.replay is not None:
            self._relearn(self.replay)
        else:
            self.method.end(self.learner, task, self._pass("end", task))
        if self.keep_chain is not None:
            self._keep(self.keep_chain)
        self.consolidation.end(self.learner, task, self._pass("end", task))
        if self.learner.reuse is not None:
            self.learner.reuse.free(task.train.rows_n)
        return Position(self.position.task, "evaluate")

    def _evaluate(self, task: Task) -> Position:
        now = self.position.task
        measured = range(len(self.stream) if self.evaluation.unseen else now + 1)
        with self.learner.folded(), self.learner.in_halves():  # folded once for all of them
            found = {j: self._answers(self.stream[j]) for j in measured}
        self.matrix = self.matrix.with_row({j: (a.correct, len(a.labels_n)) for j, a in found.items()})
        self.known_task = self.known_task.with_row(
            {j: (a.correct_known_task, len(a.labels_n)) for j, a in found.items()}
        )
        self.right_task.append([int(found[j].right_task_n.sum()) for j in range(now + 1)])
        old = [(self.last_answers[str(j)].numpy(), found[j]) for j in range(now)]
        flips = [negative_flips(before, a.classes_n, a.labels_n) for before, a in old]
        self.lineage[now] |= {
            "negative_flips": sum(flips) / len(flips) if flips else None,
            "accuracy_when_learnt": found[now].correct / max(len(found[now].labels_n), 1),
            "stored_parameters": self.learner.stored_parameters(),
            "memory_bytes": self.method.memory_bytes + self.consolidation.memory_bytes,
        }
        self.last_answers = {str(j): torch.from_numpy(a.classes_n) for j, a in found.items()}
        self.clock["learnt"][str(now)] = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        self._tell("evaluate", accuracy=float(self.matrix.accuracy_ij[now, : now + 1].mean()))
        if now + 1 == len(self.stream):
            return Position(now, "done")
        return Position(now + 1, "begin")

    # -- passes over data -------------------------------------------------------------------------------------------

    def _pass(self, phase: Literal["begin", "end"], task: Task) -> Pass:
        def batches(*, augmented: bool) -> Iterator[Batch]:
            augment = Augment(self.seed, MOMENTS_EPOCH[phase]) if augmented else None
            return self._batches(phase, task.train, augment)

        return batches

    def _past(self) -> Iterator[tuple[Task, Pass]]:
        return ((task, self._pass("end", task)) for task in self.stream.tasks[: self.position.task])

    def _batches(self, phase: Phase, examples: Examples, augment: Augment | None = None) -> Iterator[Batch]:
        done = 0
        makers = (
            partial(lambda positions: examples.batch(positions, augment).to(self.learner.device), positions)
            for positions in in_order(len(examples), self.evaluation.batch_size)
        )
        for batch in ahead(makers, self.learner.device):
            if self.should_stop():
                raise Interrupted
            yield batch
            done += len(batch)
            self._tell(phase, done=done, total=len(examples))

    def _answers(self, task: Task) -> Answers:
        return answers(
            self.learner,
            self.consolidation,
            task.split(self.evaluation.split),
            lambda examples: self._batches("evaluate", examples),
            task.name,
            told=self.stream.tells_task,
        )

    def _steps(self, task: Task) -> int:
        return self.training.epochs * steps_per_epoch(len(task.train), self.training.batch_size)

    # -- what survives a crash --------------------------------------------------------------------------------------

    def save(self) -> None:
        started = time.perf_counter()
        optimizer_state = self._optimizer_state
        if self._optimizer is not None:
            optimizer_state = optim.optimizer_tensors(self._optimizer, self.learner.trainable())
        state = {
            "position": asdict(self.position),
            "identity": self.identity,
            "matrix": self.matrix.as_dict(),
            "known_task": self.known_task.as_dict(),
            "right_task": self.right_task,
            "lineage": self.lineage,
            "losses": self.losses,
            "outline": self.learner.outline(),
        }
        tensors = {
            "learner": self.learner.tensors(),
            "memory": self.method.memory,
            "optimizer": optimizer_state,
            "answers": self.last_answers,
        }
        if self.consolidation.memory:
            tensors["consolidation"] = self.consolidation.memory
        if self.teacher:
            tensors["teacher"] = self.teacher
        for directory in self._damaged:
            checkpoint.set_aside(directory)
        self._damaged = []
        checkpoint.save(self.checkpoints, {"state": state, "clock": self.clock}, tensors, self.on_save)
        self._spend("checkpoint", time.perf_counter() - started)

    def restore(self) -> None:
        """Go to the newest whole checkpoint, if there is one, and tell what was damaged on the way. The learner and the
        method must be new. Raises CheckpointError where none is whole, or where it belongs to
        another configuration, stream, or backbone.
        """
        loaded = self._newest(self.checkpoints)
        if loaded is None:
            return
        state, tensors = loaded.documents["state"], loaded.tensors
        self.learner.restore(state["outline"], tensors["learner"], self.method.branch_type)
        # Copies, laid out in memory as fresh tensors are: the last bits of a product depend on where its factors begin.
        self.method.memory = self._placed(tensors["memory"])
        self.consolidation.memory = {n: value.clone() for n, value in tensors.get("consolidation", {}).items()}
        self.teacher = self._placed(tensors.get("teacher", {}))
        self.position = Position(**state["position"])
        self.matrix = AccuracyMatrix.from_dict(state["matrix"])
        self.known_task = AccuracyMatrix.from_dict(state["known_task"])
        self.right_task, self.lineage = state["right_task"], state["lineage"]
        self.losses = [(task, step, loss) for task, step, loss in state["losses"]]
        self.last_answers, self._optimizer_state = tensors["answers"], tensors["optimizer"]
        self.clock |= loaded.documents["clock"]
        self._damaged = list(loaded.damaged)
        for damage in loaded.damaged.values():
            self._tell(self.position.phase, note=f"{damage}. Going on from checkpoint {loaded.number}, which is whole.")

    def _keep(self, chain: Path) -> None:
        """Note what the method has made of the tasks so far, before any consolidation."""
        tensors = {"learner": self.learner.tensors(), "memory": self.method.memory}
        documents = {"outline": self.learner.outline(), "lineage": self.lineage[-1]}
        checkpoint.save(chain, documents, tensors, number=self.position.task + 1)

    def _relearn(self, chain: Path) -> None:
        """Be what the method had made of the tasks up to this one."""
        documents, tensors = checkpoint.load(chain / f"{self.position.task + 1:06d}")
        self.lineage[-1] |= documents["lineage"]
        self.learner.reset()
        self.learner.restore(documents["outline"], tensors["learner"], self.method.branch_type)
        self.method.memory = self._placed(tensors["memory"])

    def _placed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies where the learner is."""
        return {name: value.to(self.learner.device, copy=True) for name, value in tensors.items()}

    def _newest(self, folder: Path) -> checkpoint.Loaded | None:
        """The newest whole checkpoint there, which must be of this configuration, stream and backbone."""
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

    # -- watching ---------------------------------------------------------------------------------------------------

    def _tell(self, phase: Phase, **facts: Any) -> None:
        self.on_event(Event(task=self.position.task, phase=phase, **facts))

    def _spend(self, phase: str, seconds: float) -> None:
        self.clock["seconds"][phase] = self.clock["seconds"].get(phase, 0.0) + seconds
        if phase == "train":
            task = str(self.position.task)
            self.clock["tasks"][task] = self.clock["tasks"].get(task, 0.0) + seconds
