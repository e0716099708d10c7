"""From inputs to features: what goes into a module, and how its tokens become one vector per example.

Shape letters: b batch, c channels, h w pixels, t tokens (special tokens first), d width, n patches.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lamina.backbones.language import LanguageHead, hidden_states
from lamina.backbones.roles import Pool, Pooling

_LUMA = (0.299, 0.587, 0.114)
"""Weights of R, G and B in luma (ITU-R BT.601)."""


def image_features(
    module: nn.Module, inputs: Mapping[str, Tensor], *, pool: Pool, norm: str | None, grey: bool, patch: int | None
) -> Tensor:
    """Returns features (b, d) of `pixel_values` (b, 3, h, w).

    norm: path of a LayerNorm that is applied after pooling. grey: whether the module has one input channel. It gets
    luma: mean and std are the same for all channels, so the luma of normalised pixels is normalised luma. patch: size
    of the patches, if the module takes flat patches.
    """
    pixels_bchw = inputs["pixel_values"]
    if grey:
        red, green, blue = (weight * pixels_bchw[:, i : i + 1] for i, weight in enumerate(_LUMA))
        pixels_bchw = red + green + blue
    given: dict[str, Any] = {"pixel_values": pixels_bchw} if patch is None else _flat_patches(pixels_bchw, patch)
    pooled_bd = pool(module(**given).last_hidden_state, inputs)
    return pooled_bd if norm is None else module.get_submodule(norm)(pooled_bd)


def text_features(module: nn.Module, inputs: Mapping[str, Tensor], *, pool: Pool) -> Tensor:
    """Returns features (b, d) of `input_ids` and `attention_mask` (b, t)."""
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return pool(module(**given).last_hidden_state, inputs)


def language_features(module: nn.Module, inputs: Mapping[str, Tensor], *, language: LanguageHead, pool: Pool) -> Tensor:
    """Returns features (b, d) of `input_ids` and `attention_mask` (b, t). No scores of tokens are computed."""
    return pool(hidden_states(module, language, inputs), inputs)


def pool_image(tokens_btd: Tensor, _: Mapping[str, Tensor], *, pooling: Pooling, patches: int) -> Tensor:
    """Returns the class token, or the mean of the patch tokens, which come last: (b, d)."""
    return tokens_btd[:, 0] if pooling == "cls" else tokens_btd[:, -patches:].mean(1)


def pool_text(tokens_btd: Tensor, inputs: Mapping[str, Tensor], *, pooling: Pooling) -> Tensor:
    """Returns the first token, or the mean over the attention mask: (b, d)."""
    if pooling == "cls":
        return tokens_btd[:, 0]
    mask_bt = inputs["attention_mask"]
    total_bd = (tokens_btd * mask_bt.unsqueeze(-1)).sum(1, dtype=torch.float32)
    return (total_bd / mask_bt.sum(1, keepdim=True).clamp(min=1)).to(tokens_btd.dtype)


def _flat_patches(pixels_bchw: Tensor, patch: int) -> dict[str, Any]:
    """The input of SigLIP 2: patches (b, n, patch patch c), row by row, and their grid."""
    b, c, h, w = pixels_bchw.shape
    grid = (h // patch, w // patch)
    cut = pixels_bchw.reshape(b, c, grid[0], patch, grid[1], patch).permute(0, 2, 4, 3, 5, 1)
    return {
        "pixel_values": cut.reshape(b, grid[0] * grid[1], patch * patch * c),
        "pixel_attention_mask": None,
        "spatial_shapes": torch.tensor([grid] * b),
    }
