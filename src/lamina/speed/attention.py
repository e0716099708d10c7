"""Attention in plain matrix products, for bf16 backbones on a CPU.

PyTorch's fused attention is slow to differentiate there: half of a training step at 17 to 65 tokens. Without gradients it is
the faster one, and stays.

Shape letters: b batch, n queries, t tokens, h heads, e width of a head, g groups of heads, m queries of a group.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FUSED = 1024
"""With more keys than this, PyTorch's fused attention is used, which keeps no softmax."""
VECTOR = 32
"""How many bf16 numbers the longest vectors of a CPU hold. PyTorch's bf16 softmax computes what is left of a row number by
number; its float32 softmax does not."""
FEW, LONG = 2, 128
"""So many numbers that are left cost less than float32 does. In rows longer than `LONG` more of them do."""


def softmax(logits: Tensor) -> Tensor:
    """Returns the softmax over the last dimension, in float32 for rows shorter than a vector, and for short rows that do not
    fill their last vector."""
    length = logits.shape[-1]
    wide = length < VECTOR or (length < LONG and length % VECTOR > FEW)
    return logits.softmax(-1, dtype=torch.float32) if wide else logits.softmax(-1)


def use_plain_attention(module: nn.Module) -> Callable[[], None]:
    """Let a transformers model that uses PyTorch's fused attention ("sdpa") compute it in matrix products where it is
    differentiated.

    Other modules, and models with an attention of their own ("eager"), stay as they are. Returns a function that undoes it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import eager_mask

    if not isinstance(module, PreTrainedModel) or module.config._attn_implementation != "sdpa":
        return lambda: None
    AttentionInterface.register("lamina", attention)
    AttentionMaskInterface.register("lamina", eager_mask)
    module.set_attn_implementation("lamina")
    return partial(module.set_attn_implementation, "sdpa")


def attention(
    _: nn.Module,
    query_bhne: Tensor,
    key_bhte: Tensor,
    value_bhte: Tensor,
    mask_b1nt: Tensor | None,
    *,
    scaling: float,
    **__: Any,
) -> tuple[Tensor, None]:
    """Returns softmax(scaling q k^T + mask) v, (b, n, h, e), without dropout.

    transformers' own ("eager") converts the scores to float32 for a softmax that computes in float32 anyway. In bf16 these
    are four more passes over them, which pay for short rows only.
    """
    differentiated = any(each.requires_grad for each in (query_bhne, key_bhte, value_bhte))
    if not differentiated or key_bhte.shape[2] > FUSED:
        shared = query_bhne.shape[1] != key_bhte.shape[1]
        mixed_bhne = F.scaled_dot_product_attention(
            query_bhne, key_bhte, value_bhte, mask_b1nt, scale=scaling, enable_gqa=shared
        )
        return mixed_bhne.transpose(1, 2).contiguous(), None
    mixed_bnhe: Tensor = _Attention.apply(query_bhne, key_bhte, value_bhte, mask_b1nt, scaling)  # type: ignore[no-untyped-call]
    return mixed_bnhe, None


class _Attention(torch.autograd.Function):
    """Keeps queries, keys, values and the softmax for its backward. Scale and mask are applied in place.

    Heads of queries that share their keys and values are computed as one head with more queries: g such groups in a batch,
    m queries in each.
    """

    @staticmethod
    def forward(
        ctx: Any, query_bhne: Tensor, key_bhte: Tensor, value_bhte: Tensor, mask_b1nt: Tensor | None, scaling: float
    ) -> Tensor:
        b, h, n, e = query_bhne.shape
        query_gme, key_gte, value_gte = (
            each.reshape(b * key_bhte.shape[1], -1, e) for each in (query_bhne, key_bhte, value_bhte)
        )
        logits_gmt = (query_gme @ key_gte.mT).mul_(scaling)
        logits_bhnt = logits_gmt.view(b, h, n, -1)
        if mask_b1nt is not None and mask_b1nt.dtype == torch.bool:
            logits_bhnt.masked_fill_(~mask_b1nt, torch.finfo(logits_bhnt.dtype).min)
        elif mask_b1nt is not None:
            logits_bhnt.add_(mask_b1nt)
        attention_gmt = softmax(logits_gmt).to(value_gte.dtype)
        ctx.shape, ctx.scaling = query_bhne.shape, scaling
        ctx.save_for_backward(query_gme, key_gte, value_gte, attention_gmt)
        return (attention_gmt @ value_gte).view(b, h, n, e).transpose(1, 2).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_bnhe: Tensor) -> tuple[Tensor | None, ...]:
        query_gme, key_gte, value_gte, attention_gmt = ctx.saved_tensors
        b, _, _, e = ctx.shape
        grad_gme = grad_bnhe.transpose(1, 2).reshape(query_gme.shape)
        grad_attention_gmt = grad_gme @ value_gte.mT
        grad_logits_gmt = torch.ops.aten._softmax_backward_data(
            grad_attention_gmt, attention_gmt, -1, attention_gmt.dtype
        )
        grad_query = (grad_logits_gmt @ key_gte).mul_(ctx.scaling).view(ctx.shape)
        grad_key, grad_value = (
            each.view(b, -1, each.shape[1], e)
            for each in ((grad_logits_gmt.mT @ query_gme).mul_(ctx.scaling), attention_gmt.mT @ grad_gme)
        )
        return grad_query, grad_key, grad_value, None, None
