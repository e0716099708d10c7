"""Faster frozen weights in bf16 on a CPU: attention in matrix products, and fused blocks.

Shape letters: b batch, n queries, t tokens, h heads, e width of a head.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lamina.backbones.roles import Backbone
from lamina.block import fuse, softmax


def accelerate_on_cpu(backbone: Backbone, dtype: torch.dtype) -> None:
    """Chooses the attention and block implementations for this precision, on the device of the backbone.

    PyTorch's fused attention on a CPU is slow to differentiate in bf16 (half of a training step at 17 to 65 tokens).
    There, the attention of transformers' models is computed in matrix products, and fusible blocks are fused. Families
    with an attention of their own ("eager") keep it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import eager_mask

    if not isinstance(backbone.module, PreTrainedModel) or backbone.module.config._attn_implementation == "eager":
        return
    AttentionInterface.register("lamina", _explicit_attention)
    AttentionMaskInterface.register("lamina", eager_mask)
    wanted = backbone.module.device.type == "cpu" and dtype == torch.bfloat16
    backbone.module.set_attn_implementation("lamina" if wanted else "sdpa")
    for path in backbone.stages[1:] if backbone.fusible else ():
        fuse(backbone.module.get_submodule(path), wanted)


def _explicit_attention(
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

    transformers' own ("eager") always computes the softmax in float32. In bf16 this costs four more passes over the
    scores, which pays off for short rows only.
    """
    logits_bhnt = query_bhne @ key_bhte.mT * scaling
    if mask_b1nt is not None:
        logits_bhnt = logits_bhnt + mask_b1nt
    attention_bhnt = softmax(logits_bhnt).to(value_bhte.dtype)
    return (attention_bhnt @ value_bhte).transpose(1, 2).contiguous(), None
