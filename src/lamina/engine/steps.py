"""The plain way to make batches and gradients. `lamina.speed` has a faster one that a loop can be given instead."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from lamina.types import Batch

Loss = Callable[[Batch], Tensor]


class Planned(NamedTuple):
    """What is known of the training steps of a task, wherever it resumes."""

    batch_size: int
    """Of full batches."""
    full_batches: int
    """How many of them the task has."""
    note: Callable[[str], None]
    """Is told what a user should know."""


class Steps:
    """How a loop makes its batches and the gradients of its training steps."""

    def batches(self, makers: Iterable[Callable[[], Batch]]) -> Iterator[Batch]:
        """Yields the batches in order. What a maker raises is raised where its batch would have come."""
        for make in makers:
            yield make()

    def gradients(self, loss: Loss, parameters: Sequence[nn.Parameter], task: Planned) -> Loss:
        """Returns a function that computes the loss () of a batch and leaves its gradients in the parameters."""
        del task  # for faster ways
        return partial(backward, loss, parameters)


def backward(loss: Loss, parameters: Sequence[nn.Parameter], batch: Batch) -> Tensor:
    """Returns the loss () of a batch, and leaves its gradients in the parameters."""
    for parameter in parameters:
        parameter.grad = None
    value = loss(batch)
    value.backward()  # type: ignore[no-untyped-call]
    return value.detach()
