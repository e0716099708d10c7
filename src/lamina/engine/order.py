"""The order of examples is a function of (seed, task, epoch, step), so resuming needs integers and no generator state.

A task is identified by its name, so its order does not depend on its position in the stream.
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
    """Returns the positions of the examples of one training step, counted over all epochs of the task. The last batch of an
    epoch may be smaller. Every epoch has its own order."""
    epoch, batch = divmod(step, steps_per_epoch(examples, batch_size))
    return order_of_epoch(examples, seed, task, epoch)[batch * batch_size : (batch + 1) * batch_size]


@lru_cache(maxsize=2)
def order_of_epoch(examples: int, seed: int, task: str, epoch: int) -> Ints:
    return rng.permutation(examples, seed, rng.seed_of(task), epoch)


def in_order(examples: int, batch_size: int) -> Iterator[Ints]:
    """Yields the positions of the batches of one pass in the order of the data."""
    order_n = np.arange(examples)
    for start in range(0, examples, batch_size):
        yield order_n[start : start + batch_size]


def set_torch_seed(*parts: int | str) -> None:
    """Seed PyTorch's global generators for one phase or step, named by `parts`. Like `torch.manual_seed`, which also prepares
    unused GPUs and takes a hundred times as long."""
    seed = rng.seed_of(*parts)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
