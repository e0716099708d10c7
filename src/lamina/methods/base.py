"""The interface that every method implements: what its paper adds, and nothing else.

For each task the engine calls, in this order: `begin` once; for every batch `loss`, then `after_backward` and `after_step`
around the optimiser's step; `end` once. It calls `predict` whenever it evaluates. Everything that must survive a crash is
in the learner and in `memory`, a flat dict of tensors. A crash may repeat `begin` and `end` from their start, so they
depend on the learner, the memory and the task only.

Shape letters: b batch, d width of the features, j outputs of the head, c classes of the task.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lamina import rng
from lamina.adapters import Branch, LowRank
from lamina.config import MethodConfig as MethodConfig
from lamina.errors import DataError
from lamina.learner import Learner, local_labels
from lamina.types import Batch, Examples, Ints, Task

Scenario = Literal["class", "domain", "task", "mixed"]
SCENARIOS: tuple[Scenario, ...] = ("class", "domain", "task", "mixed")
SHARED = "shared"
"""Name of the branch of methods that train one adapter on all tasks."""


@dataclass(frozen=True)
class Departure:
    """A difference between this code, or the released code, and the paper; and the setting that decides it."""

    what: str
    whose: Literal["ours", "released code"]
    switch: str | None = None
    of_classifiers: bool = False
    """Whether it says nothing about language models, which have no classifier."""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """The source of a method."""

    title: str
    authors: str
    venue: str
    link: str
    departures: tuple[Departure, ...] = ()


Cost = Literal["none", "constant", "linear"]
"""How a cost grows with the number of tasks."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method asks of its user. The outputs of the head, one per class and task, are not mentioned: all methods have
    them."""

    task_count: bool = False
    """Whether it uses the number of tasks of the stream, where that is known."""
    stored_examples: int = 0
    """Training examples stored per class."""
    per_task: str
    """What every task adds to the storage, in a few words."""
    storage: str
    """The same in whole sentences, with what is stored once."""
    step: Cost = "constant"
    """Operations of a training step."""
    prediction: Cost = "constant"
    """Operations of one prediction."""
    extra: str = ""
    """Sentences about other operations, such as passes over the data around a task."""

    @property
    def cost_per_task(self) -> str:
        """What every task adds: to the storage, and to which operations."""
        if self.step == self.prediction == "linear":
            return f"{self.per_task}; slower throughout"
        costs = (("steps", self.step), ("predictions", self.prediction))
        return "; ".join([self.per_task, *(f"slower {name}" for name, cost in costs if cost == "linear")])

    @property
    def cost(self) -> str:
        """Returns the growth of all operations with the number of tasks, in sentences."""
        step, prediction = (c.replace("linear", "linear in the number of tasks") for c in (self.step, self.prediction))
        if step == prediction:
            return f"Cost per training step and per prediction: {step}. {self.extra}".strip()
        return f"Cost per training step: {step}. Cost per prediction: {prediction}. {self.extra}".strip()


class Refusal(NamedTuple):
    """A part of consolidation that a method cannot be combined with. Only the default of that part is accepted."""

    part: Literal["init", "merging", "drift", "classifier"]
    why: str


class Pass(Protocol):
    """One pass over the training examples of the current task, in a fixed order."""

    def __call__(self, *, augmented: bool) -> Iterator[Batch]:
        """augmented: apply the training transform; otherwise that of evaluation."""
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
    """A subclass sets the class attributes, implements `begin`, and overrides what its paper changes."""

    name: ClassVar[str]
    advice: ClassVar[str]
    """When to use it, in one line."""
    paper: ClassVar[Paper]
    needs: ClassVar[Needs]
    config_type: ClassVar[type[MethodConfig]]
    scenarios: ClassVar[tuple[Scenario, ...]] = SCENARIOS
    branch_type: ClassVar[type[Branch]] = LowRank
    trains: ClassVar[bool] = True
    """False for a method without training steps: the engine goes from `begin` straight to `end`."""
    first_session: ClassVar[bool] = False
    """Whether it trains on the first task only."""
    refuses: ClassVar[tuple[Refusal, ...]] = ()
    """The parts of `consolidation` that it cannot be combined with."""
    selects: ClassVar[bool] = False
    """Whether `predicting` depends on the task, if it is given."""
    routes_training: ClassVar[bool] = False
    """Whether `loss` selects adapters for the time of its forward only."""
    refuses_language: ClassVar[str] = ""
    """Why it cannot adapt a causal language model; empty if it can."""
    independent: ClassVar[bool] = False
    """True if the training of a task depends on nothing that earlier tasks left, and updates nothing but
    `Learner.trainable`. Tasks may then be trained side by side. `begin` and `end` are still called in order."""

    def __init__(self, config: C, task_count: int | None = None) -> None:
        """task_count: number of tasks of the stream; None if it is open-ended."""
        self.config = config
        self.task_count = task_count
        self.memory: dict[str, Tensor] = {}
        self.total_rate = 1.0
        """Sum of the adapters' learning rates over the steps of a task. The engine sets it before each `begin`."""
        self.classifies = True
        """Whether its own classifier is deployed, not a unified one. The engine sets it."""
        self.working: Callable[[int, int], None] = lambda *_: None
        """To be called now and then during long work in `begin` or `end`, with how much is done, and of how much. It ends the
        work where a stop is asked for. The engine sets it."""

    @abstractmethod
    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        """Prepare for a task: add outputs to the head, and branches."""

    def loss(self, learner: Learner, batch: Batch, task: Task) -> Tensor:
        """Returns the loss () of a training step. By default: the learner's own loss of the task.

        Within a task it must be one function of the batch and of tensors that may change in value but not in place, so
        that its operations can be recorded once and replayed.
        """
        return learner.loss(batch, task)

    def in_training(self, learner: Learner) -> AbstractContextManager[None]:
        """Within the context the learner computes as in a training step. Rehearsal enters it. By default: as it is."""
        return nullcontext()

    def after_backward(self, learner: Learner) -> None:
        """Called when the gradients are computed, before the optimiser's step."""

    def after_step(self, learner: Learner, step: Step) -> None:
        """Called after the optimiser's step."""

    def end(self, learner: Learner, task: Task, batches: Pass) -> None:
        """Finish a trained task: finish its branches, update the memory, freeze the head. By default: the last."""
        learner.head.freeze()

    def features(self, learner: Learner, batch: Batch) -> Tensor:
        """Returns the input of the classifier, (b, d) float32. No example depends on the others."""
        return learner.features(batch)

    def predict(self, learner: Learner, batch: Batch) -> Tensor:
        """Returns the scores of all outputs, (b, j) float32. No example depends on the others."""
        scores_bj: Tensor = learner.head(self.features(learner, batch))
        return scores_bj

    def predict_task_aware(self, learner: Learner, batch: Batch, task: str) -> Tensor:
        """Returns scores (b, j), given that all examples are of this task. Only its outputs are used. A method overrides it
        if the task's identity does more than select outputs."""
        return self.predict(learner, batch)

    @contextmanager
    def predicting(self, learner: Learner, batch: Batch, task: str | None = None) -> Iterator[None]:
        """Within the context the learner completes these prompts, as far as a method selects adapters per input. By default
        it does not. task: given that all examples are of this task. For language models only."""
        yield

    @classmethod
    def trains_on(cls, number: int) -> bool:
        """Whether it has training steps in this task (0-based)."""
        return cls.trains and not (cls.first_session and number)

    @property
    def uses_task(self) -> bool:
        """Whether `predict_task_aware` does more than `predict`."""
        return type(self).predict_task_aware is not Method.predict_task_aware

    def memory_bound(self, learner: Learner) -> int:
        """Returns an upper bound on the bytes of `memory` after the tasks learnt so far."""
        return 0

    @property
    def memory_bytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.memory.values())


def add_shared_lora(learner: Learner, task: Task, rank: int) -> None:
    """Begin a task of a method that trains one adapter on all tasks: add outputs and, in the first task, the adapter. All
    such methods start from the same bits, so without their additions they are sequential LoRA."""
    learner.add_outputs(task)
    for site in learner.sites.values():
        if SHARED not in site.live():
            site.add(SHARED, site.fresh_lora(rank, "finetune"))


def set_means(learner: Learner, task: Task, batches: Pass, metric: str) -> None:
    """Set a task's outputs to the means of its classes. Raises DataError for a class without examples."""
    block = learner.head.block(task.name)
    sums_cd = block.weight.new_zeros(block.weight.shape, dtype=torch.float64)
    counts_c = block.weight.new_zeros(len(task.classes), dtype=torch.float64)
    with learner.folded():
        for batch in batches(augmented=False):
            positions_b = local_labels(task, batch.labels_b)
            sums_cd.index_add_(0, positions_b, learner.features(batch).double())
            counts_c += torch.bincount(positions_b, minlength=len(task.classes))
    if (counts_c == 0).any():
        empty = [c for c, n in zip(task.classes, counts_c, strict=True) if n == 0]
        raise DataError(f"task {task.name!r} has no training example of class ids {empty}: a mean needs at least one")
    weight_cd, bias_c = as_linear(sums_cd / counts_c[:, None], metric)
    block.load_state_dict({"weight": weight_cd.float(), "bias": bias_c.float()})


def as_linear(means_cd: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Returns the weight (c, d) and bias (c,) of a linear classifier from class means (c, d): see the top of this file."""
    if metric == "cosine":
        return F.normalize(means_cd, dim=1), means_cd.new_zeros(len(means_cd))
    return means_cd, -means_cd.square().sum(1) / 2


def under(memory: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors whose name starts with `prefix/`, without it."""
    return {key.removeprefix(f"{prefix}/"): value for key, value in memory.items() if key.startswith(f"{prefix}/")}


def growing_threshold(epsilon: float, learnt: int, task_count: int | None) -> float:
    """Returns ε_t = ε + (1 - ε) t / T, with t = 0 in the first task (released code of InfLoRA). Beyond T tasks the last
    value holds; without a task count ε is constant."""
    return epsilon if task_count is None else epsilon + (1 - epsilon) * min(learnt, task_count - 1) / task_count


def hashed_order(examples: Examples, seed: int) -> Ints:
    """Returns positions of all examples in an order that depends on the seed and on their rows in the data only."""
    return np.argsort(rng.bits(examples.known_as_n, seed), kind="stable")


def describe(method: type[Method[Any]], *, language: bool = False) -> dict[str, Any]:
    """Returns a method as plain data, for `lamina methods` and for the record of a run. language: of a language model."""
    return {
        "name": method.name,
        "title": method.paper.title,
        "authors": method.paper.authors,
        "venue": method.paper.venue,
        "link": method.paper.link,
        "departures": [
            f"{d.what} ({d.whose}{f'; switch: {d.switch}' if d.switch else ''})"
            for d in method.paper.departures
            if not (language and d.of_classifiers)
        ],
        "advice": method.advice,
        "scenarios": list(method.scenarios),
        "independent": method.independent,
        "rehearses": method.trains_on(1),
        "task_count": method.needs.task_count,
        "stored_examples": method.needs.stored_examples,
        "storage": method.needs.storage,
        "cost": method.needs.cost,
        "around": dict(method.config_type.around),
        "around_language": dict(method.config_type.around_language),
        "refuses_language": method.refuses_language,
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
