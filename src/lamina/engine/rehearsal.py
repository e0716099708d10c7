"""Rehearsal: a few training examples of every finished task are kept, and trained on again with each later task.

    loss of a step = loss of the method on the new examples + CE on new and kept examples                (classifiers)
    loss of a step = loss of the method on the new examples + ratio x loss of the tokens of kept ones    (language models)

CE is the cross-entropy over all classes known so far; a class's score is the largest of its outputs, as in prediction. Every
class in the batch has the same total weight. A batch holds `ratio` kept examples for every new one, so that the loss is one
function of it.

Examples are kept by a hash of their rows, and drawn by (seed, task, step). A resumed run therefore has the same bits, although
nothing of this is saved.

Shape letters: n kept examples, b batch, c classes.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lamina import rng
from lamina.engine.steps import Loss
from lamina.learner import Learner
from lamina.methods.base import hashed_order
from lamina.types import Augment, Batch, Examples, Ints, Task

_ORDER, _CLASSES, _STARTS = rng.seed_of("kept examples"), 0, 1


def chosen(examples: Examples, per_class: int) -> Ints:
    """Returns the positions of the first `per_class` examples of each class, in an order that depends on their rows only."""
    order_n = hashed_order(examples, _ORDER)
    labels_n = examples.labels_n[order_n]
    return np.concatenate([order_n[:0], *(order_n[labels_n == label][:per_class] for label in np.unique(labels_n))])


def keep(examples: Examples, per_class: int) -> Examples:
    """Returns the examples that are `chosen`. Of what was kept, it keeps what it keeps of all examples."""
    return examples.select(chosen(examples, per_class))


class Kept:
    """The examples kept of finished tasks. Their tables may differ."""

    def __init__(self, finished: Sequence[Task], per_class: int, ratio: float = 1.0) -> None:
        """per_class: kept of every class of every task. 0: none. ratio: kept examples in a batch for every new one."""
        self.ratio = ratio
        parts = [keep(task.train, per_class) for task in finished] if per_class else []
        tables = {id(part.table): part.table for part in parts}
        self.parts = [_union([part for part in parts if part.table is table]) for table in tables.values()]
        self.labels_n = np.concatenate([np.zeros(0, np.int64), *(part.labels_n for part in self.parts)])

    def __len__(self) -> int:
        return len(self.labels_n)

    def with_new(self, new: int) -> int:
        """Returns how many examples a batch has that holds this many new ones."""
        return new + max(1, round(self.ratio * new)) if len(self) else new

    def mixed(self, new: Batch, seed: int, task: str, step: int) -> Batch:
        """Returns the new examples and then kept ones, with the training augmentation. Where nothing is kept, returns the new
        examples."""
        if not len(self):
            return new
        keys = (rng.seed_of("rehearsal", seed, task), step)
        positions_b = drawn(self.labels_n, self.with_new(len(new)) - len(new), *keys)
        batches, places, end = [new], [np.arange(len(new))], 0
        for part in self.parts:
            start, end = end, end + len(part)
            own = np.flatnonzero((start <= positions_b) & (positions_b < end))
            if len(own):
                batches.append(part.batch(positions_b[own] - start, Augment(*keys)))
                places.append(len(new) + own)
        # In the order of the draw, whichever table an example lies in.
        return concatenated(batches).select(torch.from_numpy(np.argsort(np.concatenate(places))))

    def loss(
        self, learner: Learner, own: Loss, in_training: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> Loss:
        """Returns the loss of a mixed batch, given that of the task's method and the context that it trains in."""
        if not len(self):
            return own

        def mixed(batch: Batch) -> Tensor:
            new = next(count for count in range(len(batch)) if self.with_new(count) == len(batch))
            loss = own(batch.select(slice(new)))
            with in_training():
                if learner.generates:
                    return loss + self.ratio * learner.loss_of_all(batch.select(slice(new, None)))
                return loss + learner.loss_of_all(batch, balanced=True)

        return mixed


def drawn(labels_n: Ints, count: int, *keys: int) -> Ints:
    """Returns positions (count,) of examples with these labels, a function of the arguments only.

    All classes are equally likely, and so are the examples of a class. The numbers of draws of two classes, or of two examples
    of a class, differ by at most 1.
    """
    order_n = np.argsort(labels_n, kind="stable")
    _, first_c, size_c = np.unique(labels_n[order_n], return_index=True, return_counts=True)
    turn_b, place_b = np.divmod(np.arange(count), len(size_c))
    class_b = rng.permutation(len(size_c), *keys, _CLASSES)[place_b]
    start_b = (rng.uniform(class_b, *keys, _STARTS) * size_c[class_b]).astype(np.int64)
    positions_b: Ints = order_n[first_c[class_b] + (start_b + turn_b) % size_c[class_b]]
    return positions_b


def concatenated(batches: Sequence[Batch]) -> Batch:
    """Returns the examples of several batches as one. Texts are padded to one length with zeros, which their masks exclude."""

    def padded(parts: Sequence[Tensor]) -> Tensor:
        longest = max(part.shape[-1] for part in parts)
        return torch.cat([F.pad(part, (0, longest - part.shape[-1])) for part in parts])

    inputs = {name: padded([batch.inputs[name] for batch in batches]) for name in batches[0].inputs}
    return Batch(inputs=inputs, labels_b=torch.cat([batch.labels_b for batch in batches]))


def _union(parts: Sequence[Examples]) -> Examples:
    """Returns the examples of several parts of one table."""
    fields = ("rows_n", "labels_n", "known_as_n")
    return Examples(parts[0].table, *(np.concatenate([getattr(part, name) for part in parts]) for name in fields))
