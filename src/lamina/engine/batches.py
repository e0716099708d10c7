"""Order: which examples of a task are in which batch. For language models examples of similar length come together."""

import numpy as np

from lamina import rng
from lamina.engine.order import order_of_epoch, positions_of_step, steps_per_epoch
from lamina.types import Examples, Ints

_GROUP = 32
"""Batches whose examples are sorted by length together."""


class Order:
    """The order of a task's training examples, batch by batch, over all epochs.

    Every epoch has its own order. The last batch of an epoch may be smaller. by_length: examples of a batch have similar
    lengths, so that little is padded: within every 32 batches of the epoch's order they are sorted by length, and the
    batches are then shuffled.
    """

    def __init__(self, examples: Examples, batch_size: int, *, seed: int, task: str, by_length: bool) -> None:
        self.count, self.batch_size, self.seed, self.task = len(examples), batch_size, seed, task
        self.lengths_n = examples.lengths() if by_length else None
        self._epoch: tuple[int, Ints] | None = None

    def positions(self, step: int) -> Ints:
        """Returns the positions of the examples of one training step."""
        if self.lengths_n is None:
            return positions_of_step(self.count, self.batch_size, step, seed=self.seed, task=self.task)
        epoch, batch = divmod(step, steps_per_epoch(self.count, self.batch_size))
        if self._epoch is None or self._epoch[0] != epoch:
            order_n = order_of_epoch(self.count, self.seed, self.task, epoch)
            self._epoch = (epoch, grouped(order_n, self.lengths_n, self.batch_size, self.seed, epoch))
        return self._epoch[1][batch * self.batch_size : (batch + 1) * self.batch_size]


def grouped(order_n: Ints, lengths_n: Ints, batch_size: int, *keys: int) -> Ints:
    """Returns an order (n,) in which the examples of a batch have similar lengths: see `Order`. Equal lengths keep their
    order. keys: of the draw of the batches' order."""
    whole = len(order_n) // batch_size * batch_size
    parts = [order_n[start : start + _GROUP * batch_size] for start in range(0, whole, _GROUP * batch_size)]
    parts[-1:] = [part[: whole - (len(parts) - 1) * _GROUP * batch_size] for part in parts[-1:]]
    batches = [
        batch
        for part in parts
        for batch in np.split(part[np.argsort(lengths_n[part], kind="stable")], len(part) // batch_size)
    ]
    shuffled = [batches[k] for k in rng.permutation(len(batches), rng.seed_of("batches by length"), *keys)]
    return np.concatenate([*shuffled, order_n[whole:]])
