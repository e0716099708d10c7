"""timm's plain ViT as transformers' ViT: settings from the shapes, and tensors renamed.

Shape letters: d width, c channels, p patch size, t tokens.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lamina.backbones.files import Header, some
from lamina.errors import BackboneError

_QKV = "blocks.0.attn.qkv.weight"
_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_TOP = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_HEAD = ("head.", "pre_logits.")
_HEADS = {1280: 16, 1408: 16, 1664: 16}  # huge, giant, gigantic; every smaller one has heads of 64
_PART = re.compile(r"blocks\.(0|[1-9][0-9]{0,3})\.(.+)\.(weight|bias)")


def is_timm(headers: Mapping[str, Header]) -> bool:
    """Returns whether tensors have the names of timm's ViT."""
    return _QKV in headers


def timm_settings(headers: Mapping[str, Header], settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns the settings of transformers' ViT, from shapes and timm's own config.json (which may be empty).

    Raises BackboneError for the variants with more parts (layer scale, registers, q/k norm).
    """
    first = "blocks.0.mlp.fc1.weight"
    missing = [key for key in (*_TOP, first) if key not in headers]
    if missing:
        raise BackboneError(f"{name}: the weights lack {some(missing)}; of timm's models only the plain ViT is read")
    unknown = [key for key in headers if key not in _TOP and not key.startswith(_HEAD) and not _renamed(key)]
    if unknown:
        raise BackboneError(f"{name}: {some(sorted(unknown))} belong to a ViT variant that is not supported")
    ranks = {"patch_embed.proj.weight": 4, "pos_embed": 3, first: 2}
    odd = [key for key, rank in ranks.items() if len(headers[key].shape) != rank]
    odd += [key for key, stored in headers.items() if "attn.qkv" in key and (not stored.shape or stored.shape[0] % 3)]
    if "pos_embed" not in odd and headers["pos_embed"].shape[1] < 2:  # the class token and one patch
        odd.append("pos_embed")
    if odd:
        raise BackboneError(f"{name}: wrong shape for {some(odd)}; of timm's models only the plain ViT is read")
    width, channels, patch, _ = headers["patch_embed.proj.weight"].shape
    arguments = settings.get("model_args")
    heads = settings.get("num_heads") or (arguments.get("num_heads") if isinstance(arguments, dict) else None)
    heads = heads or _HEADS.get(width, 0 if width % 64 else width // 64)
    if not heads:
        raise BackboneError(f"{name}: width {width} does not tell the number of heads; put num_heads in config.json")
    grid = round((headers["pos_embed"].shape[1] - 1) ** 0.5)
    return {
        "model_type": "vit",
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(match[1]) for key in headers if (match := _PART.fullmatch(key))),
        "num_attention_heads": heads,
        "intermediate_size": headers[first].shape[0],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": grid * patch,
        "patch_size": patch,
        "num_channels": channels,
        "qkv_bias": "blocks.0.attn.qkv.bias" in headers,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pretrained_cfg": settings.get("pretrained_cfg", {}),
    }


def rename_timm(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Returns tensors as transformers names them, and the names of ignored ones. `attn.qkv` (3 d, d) is cut in q, k, v.

    The names are the long-standing ones of ViT files, which every version of transformers converts.
    """
    renamed = {
        new: piece
        for key, tensor in tensors.items()
        for new, piece in zip(_renamed(key), tensor.chunk(3) if "attn.qkv" in key else [tensor], strict=False)
    }
    return {key: tensor.contiguous() for key, tensor in renamed.items()}, [k for k in tensors if not _renamed(k)]


def _renamed(key: str) -> list[str]:
    """The name or names of a tensor of timm's in transformers' layout; none if it has no place there."""
    if key in _TOP:
        return [_TOP[key]]
    match = _PART.fullmatch(key)
    if match is None:
        return []
    block, part, end = match.groups()
    start = f"encoder.layer.{block}"
    if part == "attn.qkv":
        return [f"{start}.attention.attention.{role}.{end}" for role in ("query", "key", "value")]
    return [f"{start}.{_BLOCK[part]}.{end}"] if part in _BLOCK else []
