"""What a paper adds, and nothing else: the interface every method implements.

The engine calls, for each task of the stream and in this order: `begin` once; then for every batch `loss`, and around
the optimiser's step `after_backward` and `after_step`; then `end` once; and `predict` whenever it evaluates. A method
keeps what must survive a crash in `memory`, a flat dict of tensors, and in the learner. `begin` and `end` may be run
again from their start after a crash, so they depend on nothing but the learner, the memory and the task.

Shape letters: b batch, r rows of the head.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.adapters import Branch, LowRank
from lamina.config import MethodConfig as MethodConfig
from lamina.learner import Learner
from lamina.rng import seed_of
from lamina.types import Batch, Task

Scenario = Literal["class", "domain", "task", "mixed"]
SCENARIOS: tuple[Scenario, ...] = ("class", "domain", "task", "mixed")
SHARED = "shared"
"""The branch of methods that have one adapter for all tasks."""


@dataclass(frozen=True, kw_only=True)
class Departure:
    """Where this code differs from the paper's text, or the released code does, and the switch that decides it."""

    what: str
    whose: Literal["ours", "released code"]
    switch: str | None = None


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a method comes from."""

    title: str
    authors: str
    venue: str
    link: str
    departures: tuple[Departure, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method asks of its user."""

    horizon: bool = False
    """It is better for knowing the number of tasks in advance."""
    stored_examples: int = 0
    """Training examples kept per class."""
    growth: str
    """How what it keeps grows with the number of tasks, in words. Head rows, one per class and task, go without saying."""
    operations: str
    """How the operations of a training step, of an answer, and of what is done once around them grow with the number of
    tasks, in words. Head rows, which every answer goes through, go without saying."""


class Refusal(NamedTuple):
    """A part of what happens around methods that one cannot be combined with: any value of it but the default."""

    part: Literal["init", "merging", "drift", "classifier"]
    why: str


class Pass(Protocol):
    """One pass over the training examples of the current task, in a fixed order."""

    def __call__(self, *, augmented: bool) -> Iterator[Batch]:
        """augmented: with the training transform; otherwise with that of evaluation."""
        ...


class Step(NamedTuple):
    """Where training is within a task."""

    done: int
    """Steps of this task before this one."""
    total: int
    """Steps of the task."""
    rate: float
    """Learning rate of the adapters in this step."""


C = TypeVar("C", bound=MethodConfig)


class Method(ABC, Generic[C]):
    """Subclasses state the class attributes, and override what their paper changes."""

    name: ClassVar[str]
    advice: ClassVar[str]
    """One line on when to choose it."""
    paper: ClassVar[Paper]
    needs: ClassVar[Needs]
    config_type: ClassVar[type[MethodConfig]]
    scenarios: ClassVar[tuple[Scenario, ...]] = SCENARIOS
    branch_type: ClassVar[type[Branch]] = LowRank
    trains: ClassVar[bool] = True
    """False for a method without gradient steps: the engine goes from `begin` straight to `end`."""
    refuses: ClassVar[tuple[Refusal, ...]] = ()
    """What of `consolidation` it cannot be combined with."""
    independent: ClassVar[bool] = False
    """True where what a task trains depends on nothing that earlier tasks left, and training changes nothing but what
    `Learner.trainable` names: tasks may then be trained side by side. `begin` and `end` are called in order all the same."""

    def __init__(self, config: C, horizon: int | None = None) -> None:
        """horizon: how many tasks the stream has, None where it is open-ended."""
        self.config = config
        self.horizon = horizon
        self.memory: dict[str, Tensor] = {}
        self.total_rate = 1.0
        """Sum of the adapters' learning rates over the steps of a task. The engine says it before each `begin`."""

    @abstractmethod
    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        """Prepare for a task: add rows to the head, and branches."""

    def loss(self, learner: Learner, batch: Batch, task: Task) -> Tensor:
        """What a training step descends. Unless a method says otherwise: cross-entropy over the task's own rows.

        Within a task it is one function of the batch and of tensors whose numbers may change and whose place may not: it may
        be recorded once and replayed."""
        return local_cross_entropy(learner, batch, task)

    def after_backward(self, learner: Learner) -> None:
        """After the gradients are there, before the optimiser's step."""

    def after_step(self, learner: Learner, step: Step) -> None:
        """After the optimiser's step."""

    @abstractmethod
    def end(self, learner: Learner, task: Task, batches: Pass) -> None:
        """Consolidate a learnt task: finish branches, update the memory."""

    def features(self, learner: Learner, batch: Batch) -> Tensor:
        """What the scores of each example are made from, (b, d) float32. One example never depends on the others."""
        return learner.features(batch)

    def predict(self, learner: Learner, batch: Batch) -> Tensor:
        """Scores of all rows of the head, (b, r) float32. The score of one example never depends on the others."""
        scores_br: Tensor = learner.head(self.features(learner, batch))
        return scores_br

    def predict_task_aware(self, learner: Learner, batch: Batch, task: str) -> Tensor:
        """The scores (b, r) if it were known that all examples are of this task; only that task's rows count. Unless a
        method does more with the task than choose rows: those of `predict`."""
        return self.predict(learner, batch)

    @property
    def uses_task(self) -> bool:
        """Whether `predict_task_aware` does more than `predict`."""
        return type(self).predict_task_aware is not Method.predict_task_aware

    @abstractmethod
    def memory_bound(self, learner: Learner) -> int:
        """Upper bound, in bytes, of what `memory` holds after the tasks learnt so far."""

    @property
    def memory_bytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.memory.values())


def add_shared_lora(learner: Learner, task: Task, rank: int) -> None:
    """The beginning of a task where one adapter goes on: rows of the head and, in the first task, the adapter. It is the
    same, bit for bit, for every method that has one: without what they add, all of them are sequential LoRA."""
    learner.head.freeze()
    learner.head.add(task.name, task.classes)
    for site in learner.sites.values():
        if SHARED not in site.live():
            generator = torch.Generator().manual_seed(seed_of("finetune", torch.initial_seed(), site.name))
            site.add(SHARED, LowRank.fresh(site.d_out, site.d_in, rank, generator))


def local_labels(task: Task, labels_b: Tensor) -> Tensor:
    """Positions (b,) of class ids among the task's own rows."""
    return _positions(task.classes, labels_b.device)[labels_b]


@lru_cache(maxsize=8)
def _positions(classes: tuple[int, ...], device: torch.device) -> Tensor:
    """Of every class id up to the largest of these, -1 for the others. Kept: a card would have to wait for a new one in every
    step."""
    order = torch.full((max(classes) + 1,), -1)
    order[list(classes)] = torch.arange(len(classes))
    return order.to(device)


def local_cross_entropy(learner: Learner, batch: Batch, task: Task) -> Tensor:
    """Cross-entropy over the rows of the current task only; the rows of older tasks are neither computed nor trained."""
    return F.cross_entropy(learner.task_logits(batch, task.name), local_labels(task, batch.labels_b))


def describe(method: type[Method[Any]]) -> dict[str, Any]:
    """A method as plain data: for `lamina methods` and for the record of a run."""
    return {
        "name": method.name,
        "title": method.paper.title,
        "authors": method.paper.authors,
        "venue": method.paper.venue,
        "link": method.paper.link,
        "departures": [
            f"{d.what} ({d.whose}{f'; switch: {d.switch}' if d.switch else ''})" for d in method.paper.departures
        ],
        "advice": method.advice,
        "scenarios": list(method.scenarios),
        "independent": method.independent,
        "horizon": method.needs.horizon,
        "stored_examples": method.needs.stored_examples,
        "growth": method.needs.growth,
        "operations": method.needs.operations,
        "around": dict(method.config_type.around),
        "settings": {
            name: {
                "default": field.get_default(),
                "type": str(field.annotation).replace("typing.", "")
                if not isinstance(field.annotation, type)
                else field.annotation.__name__,
                "what": field.description or "",
            }
            for name, field in method.config_type.model_fields.items()
        },
    }
