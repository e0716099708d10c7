"""timm's plain ViT as transformers' ViT."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lamina.backbones.files import some
from lamina.errors import BackboneError

_TIMM_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_TIMM_TOP = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_TIMM_HEADS = {1280: 16, 1408: 16, 1664: 16}  # huge, giant, gigantic; every smaller one has heads of 64


def from_timm(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], name: str
) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """timm's plain ViT as transformers' ViT: settings read off the shapes, tensors renamed, ignored names.

    `attn.qkv` (3 d, d) is cut in q, k, v. The names given are the long-standing ones of ViT files, which every version
    of transformers converts. Raises BackboneError for the variants with more parts (layer scale, registers, q/k norm).
    """
    missing = [key for key in (*_TIMM_TOP, "blocks.0.mlp.fc1.weight") if key not in tensors]
    if missing:
        raise BackboneError(f"{name}: the weights lack {some(missing)}; of timm's models only the plain ViT is read")
    renamed: dict[str, Tensor] = {}
    ignored: list[str] = []
    unknown: list[str] = []
    for key, tensor in tensors.items():
        if key in _TIMM_TOP:
            renamed[_TIMM_TOP[key]] = tensor
        elif match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", key):
            block, part, end = match.groups()
            if part == "attn.qkv":
                for piece, role in zip(tensor.chunk(3), ("query", "key", "value"), strict=True):
                    renamed[f"encoder.layer.{block}.attention.attention.{role}.{end}"] = piece.contiguous()
            elif part in _TIMM_BLOCK:
                renamed[f"encoder.layer.{block}.{_TIMM_BLOCK[part]}.{end}"] = tensor
            else:
                unknown.append(key)
        else:
            (ignored if key.startswith(("head.", "pre_logits.")) else unknown).append(key)
    if unknown:
        raise BackboneError(f"{name}: {some(sorted(unknown))} belong to a ViT variant that is not supported")
    width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    heads = settings.get("num_heads") or settings.get("model_args", {}).get("num_heads")
    heads = heads or _TIMM_HEADS.get(width, 0 if width % 64 else width // 64)
    if not heads:
        raise BackboneError(f"{name}: width {width} does not tell the number of heads; put num_heads in config.json")
    grid = round((tensors["pos_embed"].shape[1] - 1) ** 0.5)
    config = {
        "model_type": "vit",
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks.")),
        "num_attention_heads": heads,
        "intermediate_size": tensors["blocks.0.mlp.fc1.weight"].shape[0],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": grid * patch,
        "patch_size": patch,
        "num_channels": channels,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pretrained_cfg": settings.get("pretrained_cfg", {}),
    }
    return config, renamed, ignored
