"""SplitBatch: features of a batch computed as two halves in parallel, each with half of the threads.

Threads that share one operation wait for each other at its end. Two halves of a batch wait for each other only twice per
training step. The loss sees the features of the whole batch, and its gradient goes through both halves in the same way.
Each half always has the same examples and threads, so a run has the same bits every time.

Not used in bf16: the kernels are so short that the GIL serialises the two threads. A batch is not split while a hook watches
a module or routed adapters are active, since those may look at the batch as a whole.

Shape letters: b batch, d width.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from lamina.learner import Learner
from lamina.speed.composed_weight import ComposedLinear, shared_weights
from lamina.speed.instance import hooks_of

SMALLEST = 32
"""Batches of fewer examples are not split. With 36 images of 17 tokens splitting gains nothing, with 64 it does (two cores,
`nano`)."""

Features = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
Both = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]


class Workers:
    """Two threads, each with half of PyTorch's threads. They must be closed. Raises ValueError for an odd number of threads."""

    def __init__(self) -> None:
        threads = torch.get_num_threads()
        if threads % 2:
            raise ValueError(f"{threads} threads cannot be halved")
        self._pools = [ThreadPoolExecutor(1, f"lamina-half-{half}", _take, (threads // 2,)) for half in (0, 1)]
        self.both(int, [0, 0])
        torch.set_num_threads(threads)  # for this thread, and for those that start later

    def both(self, work: Callable[[Any], Any], given: Sequence[Any]) -> list[Any]:
        """Does this work on two things, one per thread."""
        waiting = [pool.submit(work, one) for pool, one in zip(self._pools, given, strict=True)]
        return [future.result() for future in waiting]

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown()


def _take(threads: int) -> None:
    torch.get_num_threads()  # PyTorch initialises a thread when it first asks, and would undo the next line then
    torch.set_num_threads(threads)


class SplitBatch:
    """A backbone's forward, by two workers. `layers`: all adapted layers of the learner."""

    def __init__(self, learner: Learner, layers: Sequence[ComposedLinear], workers: Workers) -> None:
        self.learner, self.layers, self.both = learner, layers, workers.both
        self.plain: Features = learner.backbone.forward

    def __call__(self, module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns the features (b, d) of a batch. They can be differentiated once."""
        if len(next(iter(inputs.values()))) < SMALLEST or not self.splittable():
            return self.plain(module, inputs)

        def compute(half: Mapping[str, Tensor]) -> Tensor:
            return self.plain(module, half)

        halves = [{name: value.chunk(2)[half] for name, value in inputs.items()} for half in (0, 1)]
        if not torch.is_grad_enabled():
            return torch.cat(self.both(torch.no_grad()(compute), halves))
        with shared_weights(self.layers) as leaves:
            wanted = {parameter: parameter for parameter in self.learner.trainable().values()} | dict(leaves)
            found_bd: Tensor = _TwoGraphs.apply(self.both, compute, halves, [*wanted], *wanted.values())  # type: ignore[no-untyped-call]
            return found_bd

    def splittable(self) -> bool:
        """Returns whether every example passes through the backbone by itself, unwatched."""
        routed = any(one.layer.mixtures for one in self.layers)
        return not (routed or any(map(hooks_of, self.learner.backbone.module.modules())))


class _TwoGraphs(torch.autograd.Function):
    """Two halves with a graph each. The graphs are kept until the gradients of the features are known, and then
    differentiated by the threads that made them."""

    @staticmethod
    def forward(
        ctx: Any,
        both: Both,
        compute: Callable[[Mapping[str, Tensor]], Tensor],
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
