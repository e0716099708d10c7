"""The classifier that an adapter from elsewhere brings along, as a matrix on the features of the last block.

Shape letters: d width, j outputs of the head.
"""

from typing import Any

import torch
from torch import Tensor

from lamina.backbones import Backbone
from lamina.data.names import listed
from lamina.errors import ModelError
from lamina.export.adapter_files import ForeignAdapter
from lamina.export.heads import CUBIC, IMAGE_HEADS, TEXT_HEADS


def prefixes_of(backbone: Backbone) -> tuple[str, ...]:
    """Returns how names of the encoder's layers may begin: in a class with a classifier, or in the encoder itself."""
    config: Any = backbone.module.config
    head = IMAGE_HEADS.get(config.model_type) or TEXT_HEADS.get(config.model_type)
    return (f"{head.prefix}.", "") if head is not None else ("",)


def head_of(found: ForeignAdapter, backbone: Backbone, outputs: int, *, needed: bool) -> tuple[Tensor, Tensor]:
    """Returns weight (j, d) and bias (j,) of an adapter's classifier; zeros where none is needed.

    Raises ModelError for left-over tensors, another number of outputs, or a classifier that reads other features.
    """
    width, config = backbone.width, _config(backbone)
    _refuse_others(found, config.model_type)
    nothing = torch.zeros(outputs, width), torch.zeros(outputs)
    name = TEXT_HEADS[config.model_type].classifier if config.model_type in TEXT_HEADS else "classifier"
    weight_jd = found.saved.get(f"{name}.weight")
    if weight_jd is None:
        if needed:
            raise ModelError(
                f"{found.path} holds no {name}.weight. The model's classifier is its outputs, so an adapter must bring its "
                f"own: train it with modules_to_save."
            )
        return nothing
    bias_j = found.saved.get(f"{name}.bias", torch.zeros(len(weight_jd)))
    if weight_jd.ndim != 2 or len(weight_jd) != outputs or bias_j.shape != (len(weight_jd),):
        raise ModelError(
            f"{found.path}: its classifier has shape {tuple(weight_jd.shape)} with a bias of {tuple(bias_j.shape)}, and "
            f"--classes names {outputs} classes. Name each of its outputs, in order."
        )
    if not needed:
        return nothing
    dense = (TEXT_HEADS[config.model_type].dense,) if config.model_type in TEXT_HEADS else ()
    known = {f"{one}.{part}" for one in (name, *dense) for part in ("weight", "bias")}
    if left := sorted(found.saved.keys() - known):
        raise ModelError(
            f"{found.path}: its classifier has {listed(left, 3)} besides {listed(sorted(known), 4)}, so it computes something "
            f"else than a matrix. A model with a unified classifier needs none: give --data there."
        )
    if backbone.kind == "text":
        return _of_text(found, backbone, weight_jd), bias_j
    head = IMAGE_HEADS.get(config.model_type)
    means = getattr(config, head.pooling_is) if head is not None and head.pooling_is is not None else None
    read = head is not None and (means is None or means == (backbone.pooling == "mean"))
    position, parts = head.reads.get(backbone.pooling, (0, 0)) if head is not None and read else (0, 0)
    own_jd = weight_jd[:, position * width : (position + 1) * width]
    others = torch.cat([weight_jd[:, : position * width], weight_jd[:, (position + 1) * width :]], 1)
    if weight_jd.shape[1] != parts * width or bool(others.any()):
        raise ModelError(
            f"{found.path}: its classifier has shape {tuple(weight_jd.shape)} and reads other features than the model's, of "
            f"width {width} by pooling {backbone.pooling!r}. A model with a unified classifier needs none: give --data there."
        )
    return own_jd.contiguous(), bias_j


def _of_text(found: ForeignAdapter, backbone: Backbone, weight_jd: Tensor) -> Tensor:
    """Returns the weight where the head before it is linear, as in an export of lamina."""
    head, width = TEXT_HEADS[_config(backbone).model_type], backbone.width
    dense_dd, dense_d = (found.saved.get(f"{head.dense}.{part}") for part in ("weight", "bias"))
    if head.activation == "tanh" and dense_dd is not None and dense_dd.shape == (width, width):
        scale = float(dense_dd[0, 0])
        plain = torch.equal(dense_dd, scale * torch.eye(width)) and 0 < scale <= CUBIC
        if plain and (dense_d is None or not bool(dense_d.any())) and weight_jd.shape[1] == width:
            return scale * weight_jd
    raise ModelError(
        f"{found.path}: its classifier is not linear in the features (there is a layer {head.dense!r} before it), so it cannot "
        f"become outputs of the model. A model with a unified classifier needs none: give --data there."
    )


def _refuse_others(found: ForeignAdapter, kind: str) -> None:
    text = TEXT_HEADS.get(kind)
    starts = {"classifier", *(text.saved if text else ()), *((text.dense, text.classifier) if text else ())}
    for name in found.saved:
        if not any(name.startswith(f"{start}.") for start in starts):
            raise ModelError(
                f"{found.path}: left-over tensor {name!r}, which is neither an update nor of a classifier. Save the adapter "
                f"with no modules_to_save but the classifier."
            )


def _config(backbone: Backbone) -> Any:
    return backbone.module.config
