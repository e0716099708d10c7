"""The plain way to make batches and gradients. `lamina.speed` has a faster one that a loop can be given instead."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor, nn

from lamina.types import Batch

Loss = Callable[[Batch], Tensor]


class Steps:
    """How a loop makes its batches and the gradients of its training steps."""

    def batches(self, makers: Iterable[Callable[[], Batch]]) -> Iterator[Batch]:
        """Yields the batches in order. What a maker raises is raised where its batch would have come."""
        for make in makers:
            yield make()

    def gradients(
        self,
        loss: Loss,
        parameters: Sequence[nn.Parameter],
        *,
        batch_size: int,
        full_batches: int,
        note: Callable[[str], None],
    ) -> Loss:
        """Returns a function that computes the loss () of a batch and leaves its gradients in the parameters.

        batch_size: of full batches. full_batches: how many of them the task has. note: called with a message for the user.
        """
        del batch_size, full_batches, note  # for faster ways
        return lambda batch: backward(loss, parameters, batch)


def backward(loss: Loss, parameters: Sequence[nn.Parameter], batch: Batch) -> Tensor:
    """Returns the loss () of a batch, and leaves its gradients in the parameters."""
    for parameter in parameters:
        parameter.grad = None
    value = loss(batch)
    value.backward()  # type: ignore[no-untyped-call]
    return value.detach()
