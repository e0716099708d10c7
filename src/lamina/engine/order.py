"""The order of everything is a function of (seed, task, epoch, step), so resuming needs integers and no generator state.

A task is named here, not counted: what is drawn for it does not depend on where in the stream it stands.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch

from lamina import rng
from lamina.types import Ints


def steps_per_epoch(examples: int, batch_size: int) -> int:
    return -(-examples // batch_size)


def positions_of_step(examples: int, batch_size: int, step: int, *, seed: int, task: str) -> Ints:
    """Positions of the examples of one training step (counted over all epochs of the task). The last batch of an epoch
    may be smaller; every epoch has an order of its own."""
    epoch, batch = divmod(step, steps_per_epoch(examples, batch_size))
    return _order_of_epoch(examples, seed, task, epoch)[batch * batch_size : (batch + 1) * batch_size]


@lru_cache(maxsize=2)
def _order_of_epoch(examples: int, seed: int, task: str, epoch: int) -> Ints:
    return rng.permutation(examples, seed, rng.seed_of(task), epoch)


def in_order(examples: int, batch_size: int) -> Iterator[Ints]:
    """Positions of the batches of one pass in the order of the data."""
    order_n = np.arange(examples)
    for start in range(0, examples, batch_size):
        yield order_n[start : start + batch_size]


def set_torch_seed(*parts: int | str) -> None:
    """Seed PyTorch's global generators for one piece of work (a phase, or a step), named by `parts`. As `torch.manual_seed`,
    which also takes notes for cards that are not in use, and takes a hundred times as long."""
    seed = rng.seed_of(*parts)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
