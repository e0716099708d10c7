"""Predictions of a learner on one task's examples: class, class if the task were given, and inferred task.

Shape letters: n examples, b batch, j outputs of the head, c classes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lamina.errors import TrainingError
from lamina.learner import Learner, class_scores
from lamina.types import Batch, Examples, Ints

ROUNDING = 0.05


class Predictor(Protocol):
    """A method, or what is deployed of it."""

    @property
    def uses_task(self) -> bool:
        """Whether `predict_task_aware` does more than `predict`."""
        ...

    def predict(self, learner: Learner, batch: Batch) -> Tensor: ...

    def predict_task_aware(self, learner: Learner, batch: Batch, task: str) -> Tensor: ...


@dataclass(frozen=True)
class Predictions:
    """Of one model on the examples of one task, in the order of the data. Shapes (n,)."""

    labels_n: Ints
    predicted_n: Ints
    """Predicted class id. The task's identity is not given, unless the stream gives it."""
    task_aware_n: Ints
    """Predicted class id if the task's identity is given; -1 where that task has no outputs yet."""
    task_inferred_n: Ints | None
    """1 where the winning output belongs to the example's own task; None for language models, which have no outputs."""

    @property
    def correct(self) -> int:
        return int((self.predicted_n == self.labels_n).sum())

    @property
    def task_aware_correct(self) -> int:
        return int((self.task_aware_n == self.labels_n).sum())


def predict_all(
    learner: Learner,
    predictor: Predictor,
    examples: Examples,
    batches: Callable[[Examples], Iterable[Batch]],
    task: str,
    *,
    task_aware: bool = False,
) -> Predictions:
    """Returns the predictions for all examples, with live branches folded. Scores are compared with the task and the labels
    only after they were computed.

    batches: cuts the examples it is given into batches. They come sorted by length, so that texts are padded little.
    task_aware: the task's identity is given at test time (task-incremental streams), so only its own outputs compete.
    Raises TrainingError where a score is NaN or infinite. Minus infinity is allowed: such an output is never predicted.
    """
    classes = list(dict.fromkeys(output.label for output in learner.outputs))
    own_j = torch.tensor([output.task == task for output in learner.outputs])
    label_j = torch.tensor([output.label for output in learner.outputs])
    class_c = torch.tensor(classes)
    order_n = np.argsort(examples.lengths(), kind="stable")
    found: list[tuple[Ints, ...]] = []
    with learner.folded():
        for batch in batches(examples.select(order_n)):
            scores_bj = _checked(predictor.predict(learner, batch).cpu(), task)
            predicted_b = class_c[class_scores(scores_bj, learner.outputs, classes).argmax(1)]
            aware_b = torch.full_like(predicted_b, -1)
            if own_j.any():
                aware_bj = scores_bj
                if predictor.uses_task:
                    aware_bj = _checked(predictor.predict_task_aware(learner, batch, task).cpu(), task)
                aware_b = label_j[aware_bj.masked_fill(~own_j, -torch.inf).argmax(1)]
            if task_aware:
                predicted_b = aware_b
            inferred_b = own_j[scores_bj.argmax(1)].long()
            found.append(tuple(t.numpy() for t in (batch.labels_b.cpu(), predicted_b, aware_b, inferred_b)))
    back_n = np.argsort(order_n)
    return Predictions(*(np.concatenate(column)[back_n] for column in zip(*found, strict=True)))


def correct_by_class(found: Predictions) -> dict[str, int]:
    """Returns the correct predictions of every class that has examples, by class id as text."""
    hit_n = found.predicted_n == found.labels_n
    return {str(label): int(hit_n[found.labels_n == label].sum()) for label in np.unique(found.labels_n).tolist()}


def depends_on_batch(
    learner: Learner, predictor: Predictor, examples: Examples, batches: Callable[[Examples], Iterable[Batch]]
) -> int:
    """Returns how many of these few examples have other scores alone than in one batch. Rounding differs with the batch, most
    in bf16, so a difference counts from ROUNDING of the spread of an example's scores."""
    with learner.folded():
        whole_bj = torch.cat([predictor.predict(learner, batch).cpu() for batch in batches(examples)])
        alone = [next(iter(batches(examples.select(np.array([k]))))) for k in range(len(examples))]
        alone_bj = torch.cat([predictor.predict(learner, batch).cpu() for batch in alone])
    kept_bj = whole_bj.isfinite() & alone_bj.isfinite()
    spread_b = whole_bj.masked_fill(~kept_bj, -torch.inf).amax(1) - whole_bj.masked_fill(~kept_bj, torch.inf).amin(1)
    size_b = whole_bj.masked_fill(~kept_bj, 0.0).abs().amax(1)
    apart_b = (whole_bj - alone_bj).masked_fill(~kept_bj, 0.0).abs().amax(1)
    other_b = (whole_bj.isfinite() != alone_bj.isfinite()).any(1) | (
        apart_b > ROUNDING * spread_b.maximum(0.01 * size_b)
    )
    return int(other_b.sum())


def _checked(scores_bj: Tensor, task: str) -> Tensor:
    if not (scores_bj < torch.inf).all():  # NaN is not less than anything
        raise TrainingError(
            f"a score of task {task!r} is NaN or infinite. Training diverged, or an input is not finite: check the data, and "
            f"use a smaller training.lr."
        )
    return scores_bj
