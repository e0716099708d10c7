"""A block of a vision transformer as one function of autograd, for backbones in bf16 on a processor.

There, small operations cost more than their numbers do, and half of them are autograd's. Here a block computes what that of
transformers computes, in fewer: k and v are one product, all heads change places at once, sums are added in place, what is
learnt of a map costs thin products only, and of the last block, where nobody looks at other tokens, only the class token asks
and goes on.

    h = norm_1(x)
    q, k, v = W_q h + b_q, W_k h + b_k, W_v h + b_v
    a = softmax(scale q k^T)
    r = x + W_o (a v) + b_o
    y = r + W_2 gelu(W_1 norm_2(r) + b_1) + b_2

Shape letters: b batch, t tokens, n tokens that ask (all, or the class token), h heads, e width of a head, d width, o outputs,
i inputs. Two dimensions taken as one: m is b t, or b n where only those are computed; g is b h.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.adapters import AdaptedLinear, Change, Rows, factor_gradients
from lamina.backbones.roles import class_token
from lamina.moments import looks_only

VECTOR = 32
"""Numbers in bf16 that a processor's longest vectors hold. What is left over at the end of a row PyTorch's softmax goes through
number by number in bf16, in float32 it does not."""
_aten = torch.ops.aten


def softmax(logits: Tensor) -> Tensor:
    """Over the last dimension; in float32 where rows are shorter than a vector, else in the precision of the logits."""
    return (logits.float() if logits.shape[-1] < VECTOR else logits).softmax(-1)


class Map(NamedTuple):
    """A linear map at work, the live branches within its weight; those branches; and who is shown its input."""

    weight_oi: Tensor
    bias_o: Tensor | None
    changes: list[Change]
    shown_to: Sequence[Callable[[tuple[Tensor]], object]]

    def show(self, x_bti: Tensor) -> None:
        for look in self.shown_to:
            look((x_bti,))

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_oi, self.bias_o)


class Parts(NamedTuple):
    """What a block computes with."""

    norm_1: nn.LayerNorm
    q: Map
    kv: Map
    """k and v, one above the other."""
    out: Map
    norm_2: nn.LayerNorm
    fc1: Map
    fc2: Map
    heads: int
    scale: float
    first: bool
    """Whether only the class token asks and goes on."""

    def maps(self) -> tuple[Map, Map, Map, Map, Map]:
        return self.q, self.kv, self.out, self.fc1, self.fc2

    def factors(self) -> list[Tensor]:
        """up, down, up, down, ... of all maps, in their order."""
        return [factor for one in self.maps() for _, *pair in one.changes for factor in pair]


class Kept(NamedTuple):
    """Of a forward, for its backward. h, s: what the norms give, with mean and rstd of each row; a: attention, in the precision
    of the softmax; z: what the heads give, side by side."""

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
    """y (b, n, d)."""
    b, t, d = x_btd.shape
    n = 1 if parts.first else t
    x_md = x_btd.reshape(b * t, d)
    h_md, mean_m, rstd_m = _norm(x_md, parts.norm_1)
    h_btd = h_md.view(b, t, d)  # one and the same for all who look
    for one in (parts.q, parts.kv):
        one.show(h_btd)
    (q_gne,) = _apart(parts.q(_asking(h_md, b, n)), b, parts.heads, 1)
    k_gte, v_gte = _apart(parts.kv(h_md), b, parts.heads, 2)
    a_gnt = softmax(torch.bmm(q_gne, k_gte.mT).mul_(parts.scale))
    z_mo = _together(torch.bmm(a_gnt.to(x_btd.dtype), v_gte)[None], b)
    parts.out.show(z_mo.view(b, n, -1))
    r_md = parts.out(z_mo).add_(_asking(x_md, b, n))
    s_md, mean_s_m, rstd_s_m = _norm(r_md, parts.norm_2)
    parts.fc1.show(s_md.view(b, n, d))
    u_mo = parts.fc1(s_md)
    active_mo = F.gelu(u_mo)
    parts.fc2.show(active_mo.view(b, n, -1))
    y_md = parts.fc2(active_mo).add_(r_md)
    kept = Kept(x_md, h_md, mean_m, rstd_m, q_gne, k_gte, v_gte, a_gnt, z_mo, r_md, s_md, mean_s_m, rstd_s_m, u_mo)
    return y_md.view(b, n, d), kept


def backward(
    grad_bnd: Tensor, parts: Parts, kept: Kept, wanted_x: bool, wanted: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """From the gradient of y (b, n, d): that of x (b, t, d) and those of the factors, where they are wanted."""
    b, n, d = grad_bnd.shape
    maps, found = parts.maps(), list[Tensor | None]([None] * len(wanted))
    ends = [*accumulate(2 * len(one.changes) for one in maps)]

    def last(number: int, x: Tensor, grad: Tensor) -> bool:
        """Notes what is wanted of this map, from its input and the gradient of its output; whether nothing before it is."""
        own = slice(ends[number] - 2 * len(maps[number].changes), ends[number])
        found[own] = factor_gradients(x, grad, maps[number].changes, wanted[own])
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
    if last(0, _asking(kept.h_md, b, n), grad_q):
        return None, found
    grad_h = grad_kv @ parts.kv.weight_oi
    _asking(grad_h, b, n).addmm_(grad_q, parts.q.weight_oi)
    grad_x = _norm_back(grad_h, kept.x_md, parts.norm_1, kept.mean_m, kept.rstd_m)
    _asking(grad_x, b, n).add_(grad_r)
    return grad_x.view(b, -1, d), found


def _norm(x_md: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor, Tensor]:
    """What it gives, and mean and rstd of each row."""
    return torch.native_layer_norm(x_md, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _norm_back(grad_md: Tensor, x_md: Tensor, norm: nn.LayerNorm, mean_m: Tensor, rstd_m: Tensor) -> Tensor:
    wanted = [True, False, False]  # x, not weight and bias
    back = _aten.native_layer_norm_backward
    found: Tensor = back(grad_md, x_md, norm.normalized_shape, mean_m, rstd_m, norm.weight, norm.bias, wanted)[0]
    return found


def _asking(rows_md: Tensor, b: int, n: int) -> Tensor:
    """A view of the rows of those tokens that ask."""
    return rows_md.view(b, -1, rows_md.shape[1])[:, :n].view(b * n, -1)


def _apart(y_mo: Tensor, b: int, heads: int, count: int) -> Tensor:
    """The outputs of `count` maps, side by side, as matrices of each head: (count, g, t, e)."""
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


def fuse(block: nn.Module, wanted: bool = True) -> None:
    """From now on a `ViTLayer` of transformers (or one of the same parts, with exact GELU) computes as one, unless it is given
    a mask or something watches or changes what goes through its parts; then it computes as ever. wanted: if not, always."""
    plain: Any = getattr(type(block), "plain", type(block))
    block.__class__ = _fused(plain) if wanted else plain


@cache
def _fused(plain: Any) -> type[nn.Module]:
    class Fused(plain):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Tensor:
            if attention_mask is not None or more or not _undisturbed(self):
                as_ever: Tensor = super().forward(hidden_states, attention_mask, **more)
                return as_ever
            parts = _parts(self)
            y_bnd: Tensor = _Block.apply(hidden_states, parts, *parts.factors())  # type: ignore[no-untyped-call]
            return y_bnd

    Fused.plain = plain
    return Fused


def _undisturbed(block: Any) -> bool:
    """Whether nothing within this block computes but what `forward` says, and nothing looks at more than inputs of its maps."""
    attention, mlp = block.attention, block.mlp
    maps = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.fc1, mlp.fc2)
    for part in (attention, mlp, mlp.activation_fn, block.layernorm_before, block.layernorm_after, *maps):
        hooks = [hook for hook in part._forward_pre_hooks.values() if hook is not class_token]
        if part in maps:
            hooks = [hook for hook in hooks if not looks_only(hook)]
        if hooks or part._forward_hooks or part._backward_hooks:
            return False
    return not block.training and not any(isinstance(one, AdaptedLinear) and one.mixtures for one in maps)


def _parts(block: Any) -> Parts:
    attention, mlp = block.attention, block.mlp
    k, v = _map(attention.k_proj), _map(attention.v_proj)
    below = len(k.weight_oi)
    biases = [one.weight_oi.new_zeros(len(one.weight_oi)) if one.bias_o is None else one.bias_o for one in (k, v)]
    kv = Map(
        torch.cat([k.weight_oi, v.weight_oi]),
        torch.cat(biases),
        k.changes + [(Rows(r.start + below, r.stop + below), up_or, down_ri) for r, up_or, down_ri in v.changes],
        [*k.shown_to, *v.shown_to],
    )
    return Parts(
        norm_1=block.layernorm_before,
        q=_map(attention.q_proj),
        kv=kv,
        out=_map(attention.o_proj),
        norm_2=block.layernorm_after,
        fc1=_map(mlp.fc1),
        fc2=_map(mlp.fc2),
        heads=attention.num_attention_heads,
        scale=attention.scaling,
        first=class_token in block.layernorm_after._forward_pre_hooks.values(),
    )


def _map(linear: Any) -> Map:
    shown_to = [partial(hook, linear) for hook in linear._forward_pre_hooks.values() if looks_only(hook)]
    if isinstance(linear, AdaptedLinear):
        return Map(*linear.within(), shown_to)
    return Map(linear.weight, linear.bias, [], shown_to)
