"""Attention in plain matrix products, for bf16 backbones on a CPU.

PyTorch's fused attention is slow to differentiate there: half of a training step at 17 to 65 tokens.

Shape letters: b batch, n queries, t tokens, h heads, e width of a head.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

VECTOR = 32
"""How many bf16 numbers the longest vectors of a CPU hold. PyTorch's bf16 softmax computes what is left of a row number by
number; its float32 softmax does not."""


def softmax(logits: Tensor) -> Tensor:
    """Returns the softmax over the last dimension, in float32 for rows shorter than a vector."""
    return (logits.float() if logits.shape[-1] < VECTOR else logits).softmax(-1)


def use_plain_attention(module: nn.Module) -> Callable[[], None]:
    """Let a transformers model that uses PyTorch's fused attention ("sdpa") compute it in matrix products.

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
    b, h, n, e = query_bhne.shape
    shared = h // key_bhte.shape[1]  # heads of queries that share their keys and values
    query_bkme = query_bhne.reshape(b, h // shared, shared * n, e)
    logits_bhnt = (query_bkme @ key_bhte.mT * scaling).reshape(b, h, n, -1)
    if mask_b1nt is not None and mask_b1nt.dtype == torch.bool:
        logits_bhnt = logits_bhnt.masked_fill(~mask_b1nt, torch.finfo(logits_bhnt.dtype).min)
    elif mask_b1nt is not None:
        logits_bhnt = logits_bhnt + mask_b1nt
    attention_bhnt = softmax(logits_bhnt).to(value_bhte.dtype)
    mixed_bkme = attention_bhnt.reshape(b, h // shared, shared * n, -1) @ value_bhte
    return mixed_bkme.reshape(b, h, n, -1).transpose(1, 2).contiguous(), None
