"""Halves: the features of a batch as two halves side by side, forwards and backwards, each with half of the threads.

Threads at work on one operation wait for one another at its end, and while a small one is done by one of them the others have
nothing to do. Halves wait for each other twice in a step. A loss sees the features of the whole batch as ever, and what it
sends back to them goes through both halves in the same way. Every half has the same examples and threads each time, so the bits
of a run are the same from time to time.

Shape letters: b batch, d width.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

SMALLEST = 32
"""Examples from which on a batch is computed in halves, which need twice as many operations, each of half the size. With 36
images of 17 tokens that gains nothing yet, with 64 it does (two cores, `nano`)."""

Compute = Callable[[Mapping[str, Tensor]], Tensor]
"""Inputs (b, ...) by name to features (b, d), of each example by itself."""


class Halves:
    """It must be closed. Raises ValueError for an odd number of threads."""

    def __init__(self) -> None:
        threads = torch.get_num_threads()
        if threads % 2:
            raise ValueError(f"{threads} threads cannot be halved")
        self.threads = threads
        self._workers = [ThreadPoolExecutor(1, f"lamina-half-{half}", _take, (threads // 2,)) for half in (0, 1)]
        self.both(int, [0, 0])
        torch.set_num_threads(threads)  # which is for this thread, and for those that begin later

    def __call__(self, compute: Compute, inputs: Mapping[str, Tensor], wanted: Mapping[Tensor, Tensor]) -> Tensor:
        """Features (b, d) of a batch of at least two examples; they can be differentiated once.

        wanted: leaves that `compute` depends on and that gradients are wanted for; a gradient goes on from what the leaf is
        mapped to, which may be the leaf itself or what it is a copy of.
        """
        halves = [{name: value.chunk(2)[half] for name, value in inputs.items()} for half in (0, 1)]
        if torch.is_grad_enabled():
            found_bd: Tensor = _Apart.apply(self.both, compute, halves, [*wanted], *wanted.values())  # type: ignore[no-untyped-call]
            return found_bd
        return torch.cat(self.both(torch.no_grad()(compute), halves))

    def close(self) -> None:
        for worker in self._workers:
            worker.shutdown()

    def both(self, work: Callable[[Any], Any], given: Sequence[Any]) -> list[Any]:
        """This work on each of two things, by each of the two workers."""
        waiting = [worker.submit(work, one) for worker, one in zip(self._workers, given, strict=True)]
        return [future.result() for future in waiting]


def _take(threads: int) -> None:
    torch.get_num_threads()  # PyTorch sets up a thread when it first asks, and would undo the next line then
    torch.set_num_threads(threads)


class _Apart(torch.autograd.Function):
    """Halves with graphs of their own. Those are kept until the gradients of the features are known, and then gone through,
    each by the thread that made it."""

    @staticmethod
    def forward(
        ctx: Any,
        both: Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]],
        compute: Compute,
        halves: Sequence[Mapping[str, Tensor]],
        leaves: Sequence[Tensor],
        *_: Tensor,
    ) -> Tensor:
        ctx.both, ctx.leaves = both, leaves
        ctx.features = both(torch.enable_grad()(compute), halves)
        return torch.cat([features_bd.detach() for features_bd in ctx.features])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_bd: Tensor) -> tuple[Tensor | None, ...]:
        features, ctx.features = ctx.features, None
        if not features[0].requires_grad:
            return (None, None, None, None, *(None for _ in ctx.leaves))

        def back(half: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
            found: tuple[Tensor | None, ...] = torch.autograd.grad(half[0], ctx.leaves, half[1], allow_unused=True)
            return found

        found = ctx.both(back, [*zip(features, grad_bd.chunk(2), strict=True)])
        return (None, None, None, None, *(None if a is None else a + b for a, b in zip(*found, strict=True)))
