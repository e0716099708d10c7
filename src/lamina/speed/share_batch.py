"""ShareBatch: features of a batch computed by all processes of a run, each with its part of the examples.

    forward     every process computes the features of its part; they are exchanged, so that each has those of the whole batch
    loss        every process computes it, from the features of the whole batch, with the head and what the method adds
    backward    every process takes its part of the gradient of the features back to the adapters; the gradients are summed

Since the loss sees the whole batch, any loss gives what one process gives, up to the order of summation: there is no mean of
means, and the last, smaller batch of an epoch needs no rule. Passes over data and evaluation share their forwards in the same
way. What is small (head, optimiser, decompositions, classifiers) is done by every process alike.

A batch is not shared while a hook watches a module (moments of inputs, per-example gradients) or routed adapters are active,
since those look at the batch as a whole; then every process computes it all.

Shape letters: b batch, d width; features may have more dimensions after b.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lamina.engine.world import World
from lamina.learner import Learner
from lamina.speed.composed_weight import ComposedLinear
from lamina.speed.instance import hooks_of

Inputs = Mapping[str, Tensor]


class ShareBatch:
    """A function of a batch's inputs, (b, ...), computed by all processes. plain: that function."""

    def __init__(
        self, learner: Learner, layers: Sequence[ComposedLinear], world: World, plain: Callable[[Inputs], Tensor]
    ) -> None:
        self.learner, self.layers, self.world, self.plain = learner, layers, world, plain
        self._usual = {id(hook) for hook in self._hooks()}
        """Numbers of the hooks that are there from the start. Those of sharded blocks watch no example."""

    def __call__(self, inputs: Inputs) -> Tensor:
        """Returns the features of the whole batch. They can be differentiated once."""
        count, size = len(next(iter(inputs.values()))), self.world.size
        if count < size or not self.shareable():
            return self.plain(inputs)
        rows = [count // size + (rank < count % size) for rank in range(size)]
        start = sum(rows[: self.world.rank])
        own = {name: value[start : start + rows[self.world.rank]] for name, value in inputs.items()}
        if not torch.is_grad_enabled():
            return self.world.gathered(self.plain(own), rows)
        leaves = [*self.learner.trainable().values()]
        found: Tensor = _OwnPart.apply(self.world, self.plain, own, rows, leaves, *leaves)  # type: ignore[no-untyped-call]
        return found

    def shareable(self) -> bool:
        """Returns whether every example passes through the backbone by itself, unwatched."""
        routed = any(one.layer.mixtures for one in self.layers)
        return not (routed or any(id(hook) not in self._usual for hook in self._hooks()))

    def _hooks(self) -> Iterator[Any]:
        return chain.from_iterable(map(hooks_of, self.learner.backbone.module.modules()))


def share(learner: Learner, layers: Sequence[ComposedLinear], world: World) -> dict[str, Callable[..., Tensor]]:
    """Returns what replaces the attributes of a learner's backbone, by their name."""
    backbone = learner.backbone
    forward = backbone.forward
    features = ShareBatch(learner, layers, world, lambda inputs: forward(backbone.module, inputs))

    def shared_forward(_: nn.Module, inputs: Inputs) -> Tensor:
        return features(inputs)

    found: dict[str, Callable[..., Tensor]] = {"forward": shared_forward}
    if backbone.kind == "language":
        found["hidden"] = ShareBatch(learner, layers, world, backbone.hidden)
    return found


class _OwnPart(torch.autograd.Function):
    """The own part with its graph, kept until the gradient of the features is known."""

    @staticmethod
    def forward(
        ctx: Any, world: World, plain: Callable[[Inputs], Tensor], own: Inputs, rows: Sequence[int],
        leaves: Sequence[Tensor], *_: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.world, ctx.rows, ctx.leaves = world, rows, leaves
        with torch.enable_grad():
            ctx.features = plain(own)
        return world.gathered(ctx.features.detach(), rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, ctx.features = ctx.features, None
        found: Sequence[Tensor | None] = [None for _ in ctx.leaves]
        if features.requires_grad:
            own = torch.split(gradient, list(ctx.rows))[ctx.world.rank]
            found = torch.autograd.grad(features, ctx.leaves, own, allow_unused=True)
        return (None, None, None, None, None, *ctx.world.summed(found))
