"""Which classes of transformers can hold a model: how each reads the encoder, and where our matrix goes in it.

    images   classifier(first token), classifier(mean of patches), or classifier([first token; mean of patches])
    texts    classifier(act(dense(first token))), where dense makes the activation linear over all features that can occur:
             tanh    dense = ε I,      classifier / ε            tanh(ε f) = ε f (1 - (ε f)²/3 ...), ε a power of two
             relu    dense = I, + c    classifier's bias - W c   relu(f + c) = f + c for c >= max |f|
             gelu    the same, with c >= max |f| + 8
             gelu + LayerNorm (ModernBERT)   dense undoes the scale of the last norm; the head's norm applies it again

The features of texts are the output of a LayerNorm with scale γ and bias β, so |f_i| <= |γ_i| sqrt(d) + |β_i| for any input.

Shape letters: b batch, d width, j outputs of the head.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.backbones import Backbone
from lamina.backbones.families import FAMILIES
from lamina.errors import ModelError
from lamina.export.outputs import LinearOutputs

IMAGES, TEXTS, ENCODER = "AutoModelForImageClassification", "AutoModelForSequenceClassification", "AutoModel"
CUBIC = 2.0**-11
"""Largest input of a tanh that counts as linear: its relative error is then below 1e-7."""
GELU_IS_LINEAR = 8.0
"""gelu(x) = x in float32 from here on."""


@dataclass(frozen=True)
class ImageHead:
    """A class of transformers for images, and which features it reads for each pooling."""

    model: str
    prefix: str
    """Path of the encoder in it."""
    reads: Mapping[str, tuple[int, int]] = field(default_factory=lambda: {"cls": (0, 1)})
    """(position, number) of the part of its classifier's input that is our features, by our pooling."""
    pooling_is: str | None = None
    """Setting of its configuration that says whether it reads the mean, if there is one."""


@dataclass(frozen=True)
class TextHead:
    """A class of transformers for texts: classifier(act(dense(first token)))."""

    model: str
    prefix: str
    dense: str
    classifier: str
    activation: str
    """tanh, relu, gelu, or modernbert."""
    saved: tuple[str, ...]
    """Modules outside the encoder, or its pooler, that an adapter must bring along."""
    norm: str = "encoder.layer.{}.output.LayerNorm"
    """Path of the last LayerNorm in the encoder."""


def _roberta(name: str, prefix: str = "roberta", activation: str = "tanh") -> TextHead:
    paths = ("classifier.dense", "classifier.out_proj")
    return TextHead(f"{name}ForSequenceClassification", prefix, *paths, activation, ("classifier",))


_BOTH = {"cls": (0, 2), "mean": (1, 2)}
_SIGLIP = ImageHead("SiglipForImageClassification", "vision_model", {"mean": (0, 1)})
IMAGE_HEADS: Mapping[str, ImageHead] = {  # by the model_type in config.json
    "vit": ImageHead("ViTForImageClassification", "vit"),
    "deit": ImageHead("DeiTForImageClassification", "deit"),
    "vit_msn": ImageHead("ViTMSNForImageClassification", "vit"),
    "beit": ImageHead("BeitForImageClassification", "beit", {"cls": (0, 1), "mean": (0, 1)}, "use_mean_pooling"),
    "dinov2": ImageHead("Dinov2ForImageClassification", "dinov2", _BOTH),
    "dinov2_with_registers": ImageHead("Dinov2WithRegistersForImageClassification", "dinov2_with_registers", _BOTH),
    "siglip_vision_model": _SIGLIP,
}
TEXT_HEADS: Mapping[str, TextHead] = {
    "bert": TextHead(
        *("BertForSequenceClassification", "bert", "bert.pooler.dense", "classifier", "tanh", ("pooler", "classifier"))
    ),
    "roberta": _roberta("Roberta"),
    "xlm-roberta": _roberta("XLMRoberta"),
    "camembert": _roberta("Camembert"),
    "electra": _roberta("Electra", "electra", "gelu"),
    "mpnet": _roberta("MPNet", "mpnet"),
    "distilbert": TextHead(
        *("DistilBertForSequenceClassification", "distilbert", "pre_classifier", "classifier", "relu"),
        ("pre_classifier", "classifier"),
        "transformer.layer.{}.output_layer_norm",
    ),
    "deberta-v2": TextHead(
        *(
            "DebertaV2ForSequenceClassification",
            "deberta",
            "pooler.dense",
            "classifier",
            "gelu",
            ("pooler", "classifier"),
        )
    ),
    "modernbert": TextHead(
        *(
            "ModernBertForSequenceClassification",
            "model",
            "head.dense",
            "classifier",
            "modernbert",
            ("head", "classifier"),
        ),
        "final_norm",
    ),
}
MEANS = (
    "The features of this model are the mean over the tokens of a text, and no class of transformers for classification reads "
    "that. A model made with `lamina create --set backbone.pooling=cls` can be held by one."
)


@dataclass(frozen=True)
class Layout:
    """A model of transformers that computes our scores."""

    auto: str
    """The class to load it with: IMAGES, TEXTS, or ENCODER, whose features go into a matrix beside it."""
    model: str
    """The class that this one finds."""
    prefix: str
    """How the names of the encoder's tensors begin in it."""
    config: Any
    """Its configuration."""
    head: Mapping[str, Tensor]
    """Its tensors outside the encoder's part that we have."""
    saved: tuple[str, ...]
    """Their modules, as PEFT's `modules_to_save` names them."""
    tokens: bool
    """Whether it takes texts."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of its class besides the configuration."""

    def build(self, encoder: Mapping[str, Tensor], head: Mapping[str, Tensor] | None = None) -> Any:
        """Returns the model with these tensors of the encoder. Raises ModelError where they do not fit."""
        import transformers

        model = getattr(transformers, self.model)(self.config, **self.options).eval().requires_grad_(False)
        tensors = {f"{self.prefix}{name}": value for name, value in encoder.items()}
        found = model.load_state_dict({**tensors, **(self.head if head is None else head)}, strict=False)
        if found.missing_keys or found.unexpected_keys:
            raise ModelError(
                f"{self.model} of the installed transformers does not fit: it lacks {found.missing_keys[:3]}, and has no place "
                f"for {found.unexpected_keys[:3]}. `--format onnx` does not depend on it."
            )
        return model

    def empty_head(self) -> dict[str, Tensor]:
        """Returns zeros in place of the head."""
        return {name: torch.zeros_like(value) for name, value in self.head.items()}


def layout_of(backbone: Backbone, outputs: LinearOutputs) -> Layout:
    """Returns the model of transformers for a backbone and its classifier. Raises ModelError, saying what is possible instead,
    where no class computes that."""
    config: Any = backbone.module.config
    made = type(config).from_dict(config.to_dict())
    made.id2label, made.label2id = outputs.id2label, outputs.label2id
    kind = str(config.model_type)
    if backbone.kind == "image":
        return _of_images(backbone, outputs, made, kind)
    if backbone.pooling == "mean":
        name = type(backbone.module).__name__
        plain = type(config).from_dict(config.to_dict())
        return Layout(ENCODER, name, "", plain, {}, (), True, FAMILIES[kind].options if kind in FAMILIES else {})
    if kind not in TEXT_HEADS:
        raise ModelError(f"no class of transformers for texts is known for {kind} here. Use --format onnx.")
    return _of_texts(backbone, outputs, made, TEXT_HEADS[kind])


def _of_images(backbone: Backbone, outputs: LinearOutputs, config: Any, kind: str) -> Layout:
    import transformers

    head, instead = IMAGE_HEADS.get(kind), "`--format onnx` writes this model as it is."
    if head is None:
        raise ModelError(
            f"{kind} has no class in transformers that reads our features (known: {', '.join(IMAGE_HEADS)}). {instead}"
        )
    if backbone.image is not None and backbone.image.channels == 1:
        raise ModelError(
            f"a backbone of one channel takes the luma of an image, which no class of transformers does. {instead}"
        )
    means = getattr(config, head.pooling_is) if head.pooling_is is not None else None
    if backbone.pooling not in head.reads or (means is not None and means != (backbone.pooling == "mean")):
        raise ModelError(f"{head.model} does not read the features of pooling {backbone.pooling!r}. {instead}")
    position, parts = head.reads[backbone.pooling]
    width = backbone.width
    weight_jd = F.pad(outputs.weight_jd, (position * width, (parts - 1 - position) * width))
    tensors = {"classifier.weight": weight_jd.contiguous(), "classifier.bias": outputs.bias_j}
    if kind == "siglip_vision_model":
        whole = transformers.SiglipConfig(vision_config=config.to_dict())
        whole.id2label, whole.label2id, config = config.id2label, config.label2id, whole
    config.architectures = [head.model]
    return Layout(IMAGES, head.model, f"{head.prefix}.", config, tensors, ("classifier",), False)


def _of_texts(backbone: Backbone, outputs: LinearOutputs, config: Any, head: TextHead) -> Layout:
    norm = backbone.module.get_submodule(head.norm.format(backbone.blocks - 1))
    assert isinstance(norm, nn.LayerNorm)
    width = backbone.width
    scale_d = norm.weight.detach().float()
    bias_d = torch.zeros(width) if norm.bias is None else norm.bias.detach().float()
    most = float((scale_d.abs() * width**0.5 + bias_d.abs()).max())
    weight_jd, bias_j, eye_dd = outputs.weight_jd.double(), outputs.bias_j.double(), torch.eye(width)
    extra: dict[str, Tensor] = {}
    if head.activation == "tanh":
        epsilon = float(2.0 ** torch.tensor(CUBIC / max(most, 1.0)).log2().floor())
        dense_dd, dense_d, weight_jd = epsilon * eye_dd, torch.zeros(width), weight_jd / epsilon
    elif head.activation == "modernbert":
        shift, centre = float(width**0.5) + GELU_IS_LINEAR, bias_d / scale_d
        dense_dd, dense_d = torch.diag(1 / scale_d), shift - centre
        extra["head.norm.weight"] = scale_d.clone()
        if norm.bias is not None:
            extra["head.norm.bias"] = bias_d.clone()
        config.classifier_pooling, config.classifier_bias, config.classifier_activation = "cls", True, "gelu"
    else:
        if hasattr(config, "pooler_hidden_act"):
            config.pooler_hidden_act = "gelu"
        shift = float(torch.tensor(most).ceil()) + (GELU_IS_LINEAR if head.activation == "gelu" else 0.0)
        dense_dd, dense_d = eye_dd, torch.full((width,), shift)
        bias_j = bias_j - shift * weight_jd.sum(1)
    tensors = {
        f"{head.dense}.weight": dense_dd.contiguous(),
        f"{head.dense}.bias": dense_d,
        f"{head.classifier}.weight": weight_jd.float().contiguous(),
        f"{head.classifier}.bias": bias_j.float(),
    } | extra
    config.architectures, config.problem_type = [head.model], "single_label_classification"
    return Layout(TEXTS, head.model, f"{head.prefix}.", config, tensors, head.saved, True)
