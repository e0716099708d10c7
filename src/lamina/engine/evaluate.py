"""Measure a learner on one task's examples: what it answers, what it would answer if told the task, and which task it
takes each example to be from.

Shape letters: n examples, b batch, r rows of the head, c classes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lamina.head import class_scores
from lamina.learner import Learner
from lamina.types import Batch, Examples, Ints


class Predictor(Protocol):
    """A method, or what is deployed of it."""

    @property
    def routes(self) -> bool:
        """Whether `predict_told` does more than `predict`."""
        ...

    def predict(self, learner: Learner, batch: Batch) -> Tensor: ...

    def predict_told(self, learner: Learner, batch: Batch, task: str) -> Tensor: ...


@dataclass(frozen=True)
class Answers:
    """Of one model on the examples of one task, in the order of the data. Shapes (n,)."""

    labels_n: Ints
    classes_n: Ints
    """Class id answered: the task unknown, unless the stream tells it."""
    known_task_n: Ints
    """Class id answered if the task were told; -1 where that task has no rows yet."""
    right_task_n: Ints
    """1 where the winning row belongs to the example's own task."""

    @property
    def correct(self) -> int:
        return int((self.classes_n == self.labels_n).sum())

    @property
    def correct_known_task(self) -> int:
        return int((self.known_task_n == self.labels_n).sum())


def answers(
    learner: Learner,
    predictor: Predictor,
    examples: Examples,
    batches: Callable[[Examples], Iterable[Batch]],
    task: str,
    *,
    told: bool = False,
) -> Answers:
    """Runs folded. Only after it has answered are its scores compared with the task's name and the labels.
    batches: cuts the examples it is given into batches. They come in the order of their length, so that texts of a batch
    are padded little.
    told: the task of every example is known when testing (task-incremental streams), so only its own rows compete."""
    classes = list(dict.fromkeys(row.label for row in learner.rows))
    own_r = torch.tensor([row.task == task for row in learner.rows])
    label_r = torch.tensor([row.label for row in learner.rows])
    class_c = torch.tensor(classes)
    order_n = np.argsort(examples.lengths(), kind="stable")
    found: list[tuple[Ints, ...]] = []
    with learner.folded():
        for batch in batches(examples.select(order_n)):
            scores_br = predictor.predict(learner, batch).cpu()
            classes_b = class_c[class_scores(scores_br, learner.rows, classes).argmax(1)]
            known_b = torch.full_like(classes_b, -1)
            if own_r.any():
                told_br = predictor.predict_told(learner, batch, task).cpu() if predictor.routes else scores_br
                known_b = label_r[told_br.masked_fill(~own_r, -torch.inf).argmax(1)]
            if told:
                classes_b = known_b
            right_b = own_r[scores_br.argmax(1)].long()
            found.append(tuple(t.numpy() for t in (batch.labels_b.cpu(), classes_b, known_b, right_b)))
    back_n = np.argsort(order_n)
    return Answers(*(np.concatenate(column)[back_n] for column in zip(*found, strict=True)))
