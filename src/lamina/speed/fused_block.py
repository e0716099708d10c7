"""Fused blocks: a block of a vision transformer as one autograd function, for bf16 backbones on a CPU.

There, small operations cost more than their numbers do, and half of them are autograd's. A fused block computes the same as
that of transformers in fewer operations: k and v are one product, all heads are transposed at once, sums are added in place,
trained factors cost thin products only, and the last block computes only what the class token needs. Watchers are shown the
inputs of linear layers. A block that other hooks watch or change is computed as transformers does.

    h = norm_1(x)
    q, k, v = W_q h + b_q, W_k h + b_k, W_v h + b_v
    a = softmax(scale q k^T)
    r = x + W_o (a v) + b_o
    y = r + W_2 gelu(W_1 norm_2(r) + b_1) + b_2

Shape letters: b batch, t tokens, n query tokens (all, or the class token), h heads, e width of a head, d width, o outputs,
i inputs. Two dimensions taken as one: m is b t, or b n where only those are computed; g is b h.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.adapters import AdaptedLinear, OutputRange, Update
from lamina.backbones import class_token
from lamina.learner import Watcher
from lamina.speed.attention import softmax
from lamina.speed.composed_weight import LinearParts, factor_gradients, parts_of
from lamina.speed.instance import hooks_of, replace

_aten = torch.ops.aten


class Parts(NamedTuple):
    """The parts of a block."""

    norm_1: nn.LayerNorm
    q: LinearParts
    kv: LinearParts
    """k and v, concatenated along the outputs."""
    out: LinearParts
    norm_2: nn.LayerNorm
    fc1: LinearParts
    fc2: LinearParts
    heads: int
    scale: float
    first: bool
    """Whether only the class token is computed after the attention."""
    watchers: Mapping[str, Sequence[Watcher]]
    """Of the inputs of linear layers, by role."""

    def show(self, x_bnd: Tensor, *roles: str) -> None:
        """Show their common input to the watchers of these linear layers."""
        for watcher in (watcher for role in roles for watcher in self.watchers[role]):
            watcher.show(x_bnd)

    def linears(self) -> tuple[LinearParts, LinearParts, LinearParts, LinearParts, LinearParts]:
        return self.q, self.kv, self.out, self.fc1, self.fc2

    def factors(self) -> list[Tensor]:
        """Returns up, down, up, down, ... of all layers, in their order."""
        return [factor for one in self.linears() for _, *pair in one.updates for factor in pair]


class Kept(NamedTuple):
    """What a forward keeps for its backward. h, s: outputs of the norms, with mean and rstd of each token; a: attention, in
    the precision of the softmax; z: outputs of the heads, side by side."""

    x_md: Tensor
    h_md: Tensor
    mean_m: Tensor
    rstd_m: Tensor
    q_gne: Tensor
    k_gte: Tensor
    v_gte: Tensor
    a_gnt: Tensor
    z_mo: Tensor
    r_md: Tensor
    s_md: Tensor
    mean_s_m: Tensor
    rstd_s_m: Tensor
    u_mo: Tensor


def forward(x_btd: Tensor, parts: Parts) -> tuple[Tensor, Kept]:
    """Returns y (b, n, d), and what the backward needs."""
    b, t, d = x_btd.shape
    n = 1 if parts.first else t
    x_md = x_btd.reshape(b * t, d)
    h_md, mean_m, rstd_m = _norm(x_md, parts.norm_1)
    parts.show(h_md.view(b, t, d), "q", "k", "v")
    (q_gne,) = _apart(_apply(parts.q, _queries(h_md, b, n)), b, parts.heads, 1)
    k_gte, v_gte = _apart(_apply(parts.kv, h_md), b, parts.heads, 2)
    a_gnt = softmax(torch.bmm(q_gne, k_gte.mT).mul_(parts.scale))
    z_mo = _together(torch.bmm(a_gnt.to(x_btd.dtype), v_gte)[None], b)
    parts.show(z_mo.view(b, n, -1), "out")
    r_md = _apply(parts.out, z_mo).add_(_queries(x_md, b, n))
    s_md, mean_s_m, rstd_s_m = _norm(r_md, parts.norm_2)
    parts.show(s_md.view(b, n, d), "fc1")
    u_mo = _apply(parts.fc1, s_md)
    active_mo = F.gelu(u_mo)
    parts.show(active_mo.view(b, n, -1), "fc2")
    y_md = _apply(parts.fc2, active_mo).add_(r_md)
    kept = Kept(x_md, h_md, mean_m, rstd_m, q_gne, k_gte, v_gte, a_gnt, z_mo, r_md, s_md, mean_s_m, rstd_s_m, u_mo)
    return y_md.view(b, n, d), kept


def backward(
    grad_bnd: Tensor, parts: Parts, kept: Kept, wanted_x: bool, wanted: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Returns the gradient of x (b, t, d) and those of the factors, where wanted, from that of y (b, n, d)."""
    b, n, d = grad_bnd.shape
    linears, found = parts.linears(), list[Tensor | None]([None] * len(wanted))
    ends = [*accumulate(2 * len(one.updates) for one in linears)]

    def last(number: int, x: Tensor, grad: Tensor) -> bool:
        """Sets the wanted gradients of this layer, and returns whether nothing before it is wanted."""
        own = slice(ends[number] - 2 * len(linears[number].updates), ends[number])
        found[own] = factor_gradients(x, grad, linears[number].updates, wanted[own])
        return not (wanted_x or any(wanted[: own.start]))

    grad_y = grad_bnd.reshape(b * n, d)
    if last(4, F.gelu(kept.u_mo) if any(wanted[ends[3] :]) else kept.u_mo, grad_y):
        return None, found
    grad_u = _aten.gelu_backward(grad_y @ parts.fc2.weight_oi, kept.u_mo)
    if last(3, kept.s_md, grad_u):
        return None, found
    grad_r = _norm_back(grad_u @ parts.fc1.weight_oi, kept.r_md, parts.norm_2, kept.mean_s_m, kept.rstd_s_m)
    grad_r.add_(grad_y)
    if last(2, kept.z_mo, grad_r):
        return None, found
    (grad_z,) = _apart(grad_r @ parts.out.weight_oi, b, parts.heads, 1)
    grad_a = torch.bmm(grad_z, kept.v_gte.mT).to(kept.a_gnt.dtype)
    grad_s = _aten._softmax_backward_data(grad_a, kept.a_gnt, -1, grad_a.dtype).mul_(parts.scale).to(grad_y.dtype)
    grad_2gte = kept.k_gte.new_empty(2, *kept.k_gte.shape)
    torch.bmm(grad_s.mT, kept.q_gne, out=grad_2gte[0])
    torch.bmm(kept.a_gnt.to(grad_y.dtype).mT, grad_z, out=grad_2gte[1])
    grad_kv = _together(grad_2gte, b)
    if last(1, kept.h_md, grad_kv):
        return None, found
    grad_q = _together(torch.bmm(grad_s, kept.k_gte)[None], b)
    if last(0, _queries(kept.h_md, b, n), grad_q):
        return None, found
    grad_h = grad_kv @ parts.kv.weight_oi
    _queries(grad_h, b, n).addmm_(grad_q, parts.q.weight_oi)
    grad_x = _norm_back(grad_h, kept.x_md, parts.norm_1, kept.mean_m, kept.rstd_m)
    _queries(grad_x, b, n).add_(grad_r)
    return grad_x.view(b, -1, d), found


def _apply(linear: LinearParts, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight_oi, linear.bias_o)


def _norm(x_md: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the norm's output, and mean and rstd of each token."""
    return torch.native_layer_norm(x_md, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _norm_back(grad_md: Tensor, x_md: Tensor, norm: nn.LayerNorm, mean_m: Tensor, rstd_m: Tensor) -> Tensor:
    wanted = [True, False, False]  # x, not weight and bias
    back = _aten.native_layer_norm_backward
    found: Tensor = back(grad_md, x_md, norm.normalized_shape, mean_m, rstd_m, norm.weight, norm.bias, wanted)[0]
    return found


def _queries(tokens_md: Tensor, b: int, n: int) -> Tensor:
    """Returns a view of the first n tokens of each example, (b n, d)."""
    return tokens_md.view(b, -1, tokens_md.shape[1])[:, :n].view(b * n, -1)


def _apart(y_mo: Tensor, b: int, heads: int, count: int) -> Tensor:
    """Returns the outputs of `count` layers, side by side, as matrices of each head: (count, g, t, e)."""
    y_bthe = y_mo.view(b, -1, count, heads, y_mo.shape[1] // (count * heads))
    return y_bthe.permute(2, 0, 3, 1, 4).reshape(count, b * heads, y_bthe.shape[1], -1)


def _together(y_cgte: Tensor, b: int) -> Tensor:
    """The inverse of `_apart`."""
    count, _, t, e = y_cgte.shape
    return y_cgte.view(count, b, -1, t, e).permute(1, 3, 0, 2, 4).reshape(b * t, -1)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_btd: Tensor, parts: Parts, *_: Tensor) -> Tensor:
        y_bnd, kept = forward(x_btd, parts)
        ctx.parts = parts
        ctx.save_for_backward(*kept)
        return y_bnd

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_bnd: Tensor) -> tuple[Tensor | None, ...]:
        wanted_x, _, *wanted = ctx.needs_input_grad
        grad_x, of_factors = backward(grad_bnd, ctx.parts, Kept(*ctx.saved_tensors), wanted_x, wanted)
        return (grad_x, None, *of_factors)


# ---------------------------------------------------------------------------------------------- transformers' blocks


def fuse(block: nn.Module) -> Callable[[], None]:
    """Let a `ViTLayer` of transformers (or a block of the same parts, with exact GELU) compute as one function, except where it
    is given a mask, or where something watches or changes its parts. Returns a function that undoes it."""
    return replace(block, "forward", partial(_forward, block))


def _forward(block: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Tensor:
    if attention_mask is not None or more or not _undisturbed(block):
        plain: Tensor = type(block).forward(block, hidden_states, attention_mask, **more)
        return plain
    parts = _parts(block)
    y_bnd: Tensor = _Block.apply(hidden_states, parts, *parts.factors())  # type: ignore[no-untyped-call]
    return y_bnd


def _undisturbed(block: Any) -> bool:
    """Returns whether nothing but watchers of its linear layers watches or changes what passes through this block."""
    linears = _linears(block).values()
    others = (block.attention, block.mlp, block.mlp.activation_fn, block.layernorm_before, block.layernorm_after)
    routed = any(isinstance(one, AdaptedLinear) and one.mixtures for one in linears)
    hooked = any(map(hooks_of, others)) or any(type(hook) is not Watcher for one in linears for hook in hooks_of(one))
    return not (block.training or routed or hooked)


def _linears(block: Any) -> dict[str, nn.Module]:
    attention, mlp = block.attention, block.mlp
    return {
        "q": attention.q_proj,
        "k": attention.k_proj,
        "v": attention.v_proj,
        "out": attention.o_proj,
        "fc1": mlp.fc1,
        "fc2": mlp.fc2,
    }


def _parts(block: Any) -> Parts:
    linears = _linears(block)
    q, k, v, out, fc1, fc2 = map(_linear, linears.values())
    below = len(k.weight_oi)
    biases = [one.weight_oi.new_zeros(len(one.weight_oi)) if one.bias_o is None else one.bias_o for one in (k, v)]
    moved = [Update(OutputRange(r.start + below, r.stop + below), up_or, down_ri) for r, up_or, down_ri in v.updates]
    return Parts(
        norm_1=block.layernorm_before,
        q=q,
        kv=LinearParts(torch.cat([k.weight_oi, v.weight_oi]), torch.cat(biases), k.updates + moved),
        out=out,
        norm_2=block.layernorm_after,
        fc1=fc1,
        fc2=fc2,
        heads=block.attention.num_attention_heads,
        scale=block.attention.scaling,
        first=class_token in block.layernorm_after._forward_pre_hooks.values(),
        watchers={role: hooks_of(linear) for role, linear in linears.items()},
    )


def _linear(linear: Any) -> LinearParts:
    return parts_of(linear) if isinstance(linear, AdaptedLinear) else LinearParts(linear.weight, linear.bias, [])
