"""Routed adapters, selected per input, for methods that keep one for every task.

Shape letters: b batch, d width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lamina.learner import Learner
from lamina.types import Batch


def remembered(batch: Batch, what: str, compute: Callable[[], Tensor]) -> Tensor:
    """Returns what is computed of a batch, or what was under this name before. Only for what no later task changes."""
    if batch.memo is None:
        return compute()
    if what not in batch.memo:
        batch.memo[what] = compute().to("cpu", copy=True)  # a view would keep the states of all tokens
    return batch.memo[what].to(batch.labels_b.device, copy=True)


def bare_features(learner: Learner, batch: Batch, layers: int = 1) -> Tensor:
    """Returns features (b, d) of the backbone alone. layers: as in `Learner.features`."""

    def features() -> Tensor:
        with learner.bare():
            return learner.features(batch, layers)

    return remembered(batch, f"{layers} blocks", features)


def through_adapters(learner: Learner, batch: Batch, tasks: Sequence[str], chosen_b: Tensor, layers: int = 1) -> Tensor:
    """Returns features (b, d), each input through the adapter of the task at its position in `tasks` and no other. layers: as
    in `Learner.features`."""

    def features() -> Tensor:
        with adapters_of(learner, tasks, chosen_b):
            return learner.features(batch, layers)

    if batch.memo is not None and len(chosen_b) and (chosen_b == chosen_b[0]).all():
        return remembered(batch, f"{layers} blocks through {tasks[int(chosen_b[0])]}", features)
    return features()


@contextmanager
def adapters_of(learner: Learner, tasks: Sequence[str], chosen_b: Tensor) -> Iterator[None]:
    """Within the context each input of a batch uses the adapter of the task at its position in `tasks` and no other."""
    if torch.compiler.is_exporting():  # the same for any batch, so that it can be written as a graph
        used, adapter_b = list(tasks), chosen_b
    else:
        used_e, adapter_b = torch.unique(chosen_b, return_inverse=True)
        used = [tasks[e] for e in used_e]
    with learner.bare(), learner.routing(used, adapter_b):
        yield
