"""Attention in plain matrix products, for bf16 backbones on a CPU.

PyTorch's fused attention is slow to differentiate there: half of a training step at 17 to 65 tokens.

Shape letters: b batch, n queries, t tokens, h heads, e width of a head.
"""

from typing import Any

from torch import Tensor, nn

from lamina.backbones import Backbone

VECTOR = 32
"""How many bf16 numbers the longest vectors of a CPU hold. PyTorch's bf16 softmax computes the rest of a row number by number;
its float32 softmax does not."""


def softmax(logits: Tensor) -> Tensor:
    """Returns the softmax over the last dimension, in float32 for rows shorter than a vector."""
    return (logits.float() if logits.shape[-1] < VECTOR else logits).softmax(-1)


def use_plain_attention(backbone: Backbone) -> None:
    """From now on a model of transformers computes its attention in matrix products."""
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import eager_mask

    if isinstance(backbone.module, PreTrainedModel):
        AttentionInterface.register("lamina", _attention)
        AttentionMaskInterface.register("lamina", eager_mask)
        backbone.module.set_attn_implementation("lamina")


def _attention(
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

    transformers' own ("eager") converts the scores to float32 for a softmax that computes in float32 anyway: four more
    passes over them in bf16, which pay for short rows only.
    """
    logits_bhnt = query_bhne @ key_bhte.mT * scaling
    if mask_b1nt is not None:
        logits_bhnt = logits_bhnt + mask_b1nt
    attention_bhnt = softmax(logits_bhnt).to(value_bhte.dtype)
    return (attention_bhnt @ value_bhte).transpose(1, 2).contiguous(), None
