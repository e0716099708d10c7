"""Composed weights: the live branches of a layer computed inside its weight where that is faster than beside it.

    plain       y = W x + b + Σ_k up_k (down_k x)
    composed    y = W' x + b,   W' = W + Σ_k up_k down_k

With at least as many tokens in a batch as the layer has inputs, W' is cheap to build. It is then either a dense weight,
whose gradient autograd passes on to the factors, or given to `_Composed`, which computes the factors' gradients directly.
With fewer tokens the branches stay beside the layer (`_Beside`). In bf16 the composed weight is the one that predictions
use.

Shape letters: o outputs, i inputs, r rank, n tokens of a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.adapters import AdaptedLinear, OutputRange, Update

THIN = 10
"""Cost of a number in a product of thin matrices, relative to square ones. On two cores with layers of 192 by 192 and rank 10
a step with the gradient of the whole weight takes as long as one with those of the factors."""


class LinearParts(NamedTuple):
    """What a linear layer computes with: weight (live branches included, without gradients), bias, and live branches."""

    weight_oi: Tensor
    bias_o: Tensor | None
    updates: list[Update]


def parts_of(layer: AdaptedLinear) -> LinearParts:
    updates = layer.live_updates()
    with torch.no_grad():
        return LinearParts(composed(layer, updates) if updates else layer.weight_oi, layer.bias_o, updates)


def composed(layer: AdaptedLinear, updates: Sequence[Update]) -> Tensor:
    """Returns W' (o, i) in the compute precision, with gradients for the factors."""
    sum_oi = layer.folded_oi
    for outputs, up_or, down_ri in updates:
        if len(up_or) < layer.d_out:
            up_or = F.pad(up_or, (0, 0, outputs.start, layer.d_out - outputs.stop))
        sum_oi = torch.addmm(sum_oi, up_or, down_ri)
    return sum_oi.to(layer.weight_oi.dtype)


class ComposedLinear:
    """Computes `AdaptedLinear.with_live` of one layer."""

    def __init__(self, layer: AdaptedLinear) -> None:
        self.layer = layer
        self.shared_oi: Tensor | None = None
        """W' while several forwards share it: see `shared_weights`."""

    def __call__(self, x: Tensor) -> Tensor:
        layer, updates = self.layer, self.layer.live_updates()
        if not updates:
            return F.linear(x, layer.weight_oi, layer.bias_o)
        if self.shared_oi is None and x.shape[:-1].numel() < layer.d_in:
            beside: Tensor = _Beside.apply(x, layer.weight_oi, layer.bias_o, *_flat(updates))  # type: ignore[no-untyped-call]
            return beside
        if self.is_dense(updates):
            weight_oi = composed(layer, updates) if self.shared_oi is None else self.shared_oi
            return F.linear(x, weight_oi, layer.bias_o)
        weight_oi = layer.effective() if self.shared_oi is None else self.shared_oi
        inside: Tensor = _Composed.apply(x, weight_oi, layer.bias_o, *_flat(updates))  # type: ignore[no-untyped-call]
        return inside

    def is_dense(self, updates: Sequence[Update]) -> bool:
        """Whether the gradient of the whole weight costs less than those of the factors."""
        rank = sum(len(down_ri) for _, _, down_ri in updates)
        return self.layer.d_out * self.layer.d_in <= THIN * rank * (self.layer.d_out + self.layer.d_in)


@contextmanager
def shared_weights(layers: Sequence[ComposedLinear]) -> Iterator[Mapping[Tensor, Tensor]]:
    """Within the context all forwards share one W' of each layer. No parameter may change meanwhile.

    A dense W' is then a leaf, so that forwards can be differentiated apart from one another. Yields those leaves, each with
    the W' that depends on the factors, through which gradients go on.
    """
    shared = [one for one in layers if one.layer.live_updates()]
    leaves = dict[Tensor, Tensor]()
    for one in shared:
        updates = one.layer.live_updates()
        if one.is_dense(updates):
            weight_oi = composed(one.layer, updates)
            one.shared_oi = weight_oi.detach()
            if weight_oi.requires_grad:
                leaves[one.shared_oi.requires_grad_()] = weight_oi
        else:
            one.shared_oi = one.layer.effective()
    try:
        yield leaves
    finally:
        for one in shared:
            one.shared_oi = None


def _flat(updates: Sequence[Update]) -> tuple[list[OutputRange], *tuple[Tensor, ...]]:
    """Returns the arguments of an autograd function: all output ranges, then up, down, up, down, ..."""
    return [outputs for outputs, _, _ in updates], *(factor for _, *pair in updates for factor in pair)


class _Composed(torch.autograd.Function):
    """y = W' x + b with gradients for x and the factors, none for W' and b.

    Each trained factor costs one or two thin products. Where no down is trained, x is not kept. Thin matrices are stored
    with few long rows: products of few long columns take up to twice as long on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, composed_oi: Tensor, bias_o: Tensor | None, ranges: list[OutputRange], *factors: Tensor
    ) -> Tensor:
        _, _, _, _, *wanted = ctx.needs_input_grad
        x_ni = x.flatten(0, -2)
        ups_or, downs_ri = ([factor.to(x.dtype) for factor in each] for each in (factors[::2], factors[1::2]))
        inner_rn = [down_ri @ x_ni.T if up else None for up, down_ri in zip(wanted[::2], downs_ri, strict=True)]
        ctx.ranges = ranges
        ctx.save_for_backward(x_ni if any(wanted[1::2]) else None, composed_oi, *inner_rn, *ups_or)
        return F.linear(x, composed_oi, bias_o)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x_ni, composed_oi, *kept = ctx.saved_tensors
        wanted_x, _, _, _, *wanted = ctx.needs_input_grad
        grad_no = grad_y.flatten(0, -2)
        grads: list[Tensor | None] = []
        for number, (start, stop) in enumerate(ctx.ranges):
            inner_rn, up_or = kept[number], kept[len(ctx.ranges) + number]
            own_no = grad_no[:, start:stop]
            grads.append((inner_rn @ own_no).T.float() if wanted[2 * number] else None)
            grads.append((up_or.T.contiguous() @ own_no.T @ x_ni).float() if wanted[2 * number + 1] else None)
        grad_x = (grad_no @ composed_oi).view(*grad_y.shape[:-1], -1) if wanted_x else None
        return (grad_x, None, None, None, *grads)


def factor_gradients(
    x_ni: Tensor, grad_no: Tensor, updates: Sequence[Update], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Returns the gradients of all factors of a layer (up, down, up, down, ...), None where not wanted.

    grad_no: the gradient of the layer's output. All ups share one product with x, and so do all downs.
    """
    found: list[Tensor | None] = [None] * len(wanted)
    own = [grad_no[:, outputs.start : outputs.stop] for outputs, _, _ in updates]
    ups, downs = ([n for n in range(len(updates)) if wanted[2 * n + which]] for which in (0, 1))
    ranks = [len(down_ri) for _, _, down_ri in updates]
    if ups:
        inner_rn = torch.cat([updates[n].down_ri for n in ups]).to(x_ni.dtype) @ x_ni.T
        for n, own_rn in zip(ups, torch.split(inner_rn, [ranks[n] for n in ups]), strict=True):
            found[2 * n] = (own_rn @ own[n]).T.float()
    if downs:
        back_rn = torch.cat(
            [updates[n].up_or.T.to(x_ni.dtype, memory_format=torch.contiguous_format) @ own[n].T for n in downs]
        )
        for n, grad_ri in zip(downs, torch.split((back_rn @ x_ni).float(), [ranks[n] for n in downs]), strict=True):
            found[2 * n + 1] = grad_ri
    return found


class _Beside(torch.autograd.Function):
    """y = W x + b + Σ_k up_k (down_k x), in the precision of x.

    What the branches add to y and to the gradient of x is added in place. x is kept only where a down is trained.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_oi: Tensor, bias_o: Tensor | None, ranges: list[OutputRange], *factors: Tensor
    ) -> Tensor:
        y = F.linear(x, weight_oi, bias_o)
        y_no, x_ni = y.flatten(0, -2), x.flatten(0, -2)
        kept: list[Tensor] = []
        for (start, stop), up_or, down_ri in zip(ranges, factors[::2], factors[1::2], strict=True):
            spare = -len(down_ri) % _multiple(x)
            up_or, down_ri = F.pad(up_or, (0, spare)).to(x.dtype), F.pad(down_ri, (0, 0, 0, spare)).to(x.dtype)
            inner_nr = x_ni @ down_ri.T
            y_no[:, start:stop].addmm_(inner_nr, up_or.T)
            kept += [up_or, down_ri, inner_nr]
        ctx.ranges, ctx.ranks = ranges, [len(down_ri) for down_ri in factors[1::2]]
        _, _, _, _, *wanted = ctx.needs_input_grad
        ctx.save_for_backward(x_ni if any(wanted[1::2]) else None, weight_oi, *kept)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x_ni, weight_oi, *kept = ctx.saved_tensors
        wanted_x, _, _, _, *wanted = ctx.needs_input_grad
        grad_no = grad_y.flatten(0, -2)
        grad_x_ni = grad_no @ weight_oi if wanted_x else None
        grads: list[Tensor | None] = []
        for number, ((start, stop), rank) in enumerate(zip(ctx.ranges, ctx.ranks, strict=True)):
            up_or, down_ri, inner_nr = kept[3 * number : 3 * number + 3]
            own_no = grad_no[:, start:stop]
            grad_inner_nr = own_no @ up_or
            if grad_x_ni is not None:
                grad_x_ni.addmm_(grad_inner_nr, down_ri)
            grads.append((own_no.T @ inner_nr)[:, :rank].float() if wanted[2 * number] else None)
            grads.append((grad_inner_nr.T @ x_ni)[:rank].float() if wanted[2 * number + 1] else None)
        grad_x = None if grad_x_ni is None else grad_x_ni.view(*grad_y.shape[:-1], -1)
        return (grad_x, None, None, None, *grads)


def _multiple(x: Tensor) -> int:
    """Returns what ranks are padded to: a GPU multiplies half-precision matrices of other sizes on slower paths."""
    return 8 if x.is_cuda else 1
