"""What the files beside the weights say, checked before any weight is read: config.json, preprocessor, pooling."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lamina.backbones.families import FAMILIES, HALF, Family
from lamina.backbones.files import locate, quiet, read_json
from lamina.backbones.roles import ImageInput, Pooling, Triple
from lamina.errors import BackboneError

_SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "mlp_ratio", "embedding_size"),
    *("patch_size", "image_size", "num_channels", "num_patches", "vocab_size", "max_position_embeddings"),
    *("num_key_value_heads", "head_dim", "n_inner", "sliding_window"),
)
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation", "activation_function")
_DROPPED = (
    *("return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward", "dtype", "torch_dtype"),
    *("id2label", "label2id", "num_labels", "problem_type", "attn_implementation", "experts_implementation"),
    *("per_layer_config", "fusion_config", "transformers_weights", "quantization_config"),
)
"""Settings that do not describe the model: the form of outputs, a classification head, and how transformers loads."""
_MOST_PATCHES = 2**14
_LEAST_STD, _MOST = 1e-6, 1e3
"""Bounds of an image's std, and of the size of its mean and std: beyond them no pixel keeps its meaning in float32."""


def find_family(settings: Mapping[str, Any], name: str) -> Family:
    """Returns the row of FAMILIES. Raises BackboneError for another model type, a decoder that is not a causal language model,
    or quantised weights."""
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        encoders = ", ".join(key for key, family in FAMILIES.items() if family.kind != "language")
        decoders = ", ".join(key for key, family in FAMILIES.items() if family.kind == "language")
        raise BackboneError(
            f"{name}: model_type {model_type!r} is not supported. Supported encoders: {encoders}. Supported causal language "
            f"models: {decoders}. docs/backbones.md says how to add a family; from_module() takes any model that you build"
        )
    if settings.get("quantization_config") is not None:
        raise BackboneError(f"{name}: config.json has a quantization_config; give the weights before quantisation")
    family = FAMILIES[model_type]
    never = ("add_cross_attention", "is_encoder_decoder")
    decoder = [key for key in (never if family.kind == "language" else ("is_decoder", *never)) if settings.get(key)]
    if decoder:
        only = "decoders without an encoder" if family.kind == "language" else "encoders"
        raise BackboneError(f"{name}: config.json sets {decoder[0]}; only {only} are supported for {model_type}")
    return family


def is_language(name: str) -> bool:
    """Returns whether the backbone of this name is a causal language model, from its config.json alone. False where there is
    no such backbone."""
    try:
        settings = read_json(locate(name).folder / "config.json")
    except BackboneError:
        return False
    found = FAMILIES.get(str(settings.get("model_type")))
    return found is not None and found.kind == "language"


def family_config(family: Family, settings: Mapping[str, Any], stored: int, name: str) -> Any:
    """Returns the configuration of the family's class in transformers, its sizes and activations checked.

    stored: tensors in the weights. transformers builds lists as long as num_hidden_layers, so that is compared first.
    """
    import transformers

    make = getattr(transformers, family.model).config_class
    layers = make.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if family.tower is not None and "vision_config" in settings:
        settings = settings["vision_config"]
        if not isinstance(settings, dict):
            raise BackboneError(f"{name}: vision_config in config.json must be an object, not {settings!r}")
    elif layers not in settings:
        raise BackboneError(f"{name}: config.json does not say {layers}; give the file that belongs to the weights")
    kept = {key: value for key, value in settings.items() if key not in _DROPPED and not key.startswith("_")}
    for key in ("image_size", "patch_size"):
        if key in kept:
            kept[key] = _side(kept[key], key, name)
    _check_sizes(kept, make.attribute_map, name)
    blocks = max(kept.get(key) or 0 for key in (layers, "num_hidden_layers"))
    if blocks > stored:
        raise BackboneError(
            f"{name}: config.json says {blocks} blocks, and the weights hold {stored} tensors; give the config.json that "
            "belongs to them"
        )
    with quiet(), explained(f"{name}: config.json does not make a {family.model}"):
        config = make.from_dict(kept | dict(family.settings))
    if settings.get("head_dim") is None and config.hidden_size % config.num_attention_heads:
        raise BackboneError(
            f"{name}: hidden_size {config.hidden_size} in config.json is not a multiple of num_attention_heads "
            f"{config.num_attention_heads}"
        )
    if config.num_attention_heads % (getattr(config, "num_key_value_heads", None) or 1):
        raise BackboneError(
            f"{name}: num_attention_heads {config.num_attention_heads} in config.json is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    return config


def _check_sizes(settings: Mapping[str, Any], names: Mapping[str, str], name: str) -> None:
    """names: those of the family for common settings, such as n_layers for num_hidden_layers."""
    from transformers.activations import ACT2FN

    for key in (*_SIZES, *(names[size] for size in _SIZES if size in names)):
        value = settings.get(key, 1)
        if value is not None and (type(value) is not int or value < 1):
            raise BackboneError(f"{name}: {key} in config.json must be a whole number, 1 or more, not {value!r}")
    for key in _ACTIVATIONS:
        value = settings.get(key, "gelu")
        if not isinstance(value, str) or value not in ACT2FN:
            raise BackboneError(
                f"{name}: {key} {value!r} in config.json is not an activation of transformers, such as gelu, relu or silu"
            )
    if settings.get("num_channels", 3) not in (1, 3):
        raise BackboneError(
            f"{name}: num_channels in config.json must be 1 (grey) or 3 (RGB), not {settings['num_channels']}"
        )


def _side(value: object, key: str, name: str) -> object:
    """One side of a square that is given as a list."""
    if not isinstance(value, list | tuple):
        return value
    if len(value) != 2 or value[0] != value[1]:
        raise BackboneError(f"{name}: only square images and patches are supported; {key} in config.json is {value!r}")
    return value[0]


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns what transformers and torch raise on a bad configuration into a BackboneError that begins with `what`."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (
        *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError),
        *(RuntimeError, StrictDataclassError, TypeError, ValueError),
    ) as error:
        reason = " ".join(str(error).split())[:300] or "no reason given"
        raise BackboneError(f"{what} ({type(error).__name__}: {reason})") from error


def choose_size(config: Any, family: Family, wanted: int | None, name: str) -> tuple[int, int]:
    """Returns the side of an image in patches: what the weights were trained with, and what is wanted (default: the same).

    Raises BackboneError for a size that is not a multiple of the patch size, or that makes too many patches.
    """
    patch: int = config.patch_size
    trained: int = math.isqrt(config.num_patches) * patch if family.takes_patches else config.image_size
    size = wanted or trained
    if size < patch or size % patch:
        raise BackboneError(f"{name}: image_size {size} is not a multiple of the patch size {patch}")
    if (size // patch) ** 2 > _MOST_PATCHES:
        raise BackboneError(
            f"{name}: image_size {size} makes {(size // patch) ** 2} patches of {patch} px; at most {_MOST_PATCHES} are "
            f"supported (image_size {math.isqrt(_MOST_PATCHES) * patch})"
        )
    return trained // patch, size // patch


def image_input(
    size: int, channels: int, found: tuple[Any, Any], mean: Triple | None, std: Triple | None, name: str
) -> ImageInput:
    """Returns the input of an image model. mean, std: replace those that were found. Raises BackboneError for bad ones."""
    return ImageInput(
        size,
        _per_channel("mean", found[0] if mean is None else mean, channels, name),
        _per_channel("std", found[1] if std is None else std, channels, name),
        channels,
    )


def find_normalisation(folder: Path, settings: Mapping[str, Any], family: Family, channels: int) -> tuple[Any, Any]:
    """Returns mean and std as preprocessor_config.json or timm's config say, unchecked; else the default of the family."""
    processor, timm = read_json(folder / "preprocessor_config.json"), settings.get("pretrained_cfg")
    if not processor.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    timm = timm if isinstance(timm, dict) else {}
    usual = family.normalisation if channels == 3 else HALF
    mean = processor.get("image_mean", timm.get("mean", usual[0]))
    return mean, processor.get("image_std", timm.get("std", usual[1]))


def _per_channel(label: str, values: Any, channels: int, name: str) -> Triple:
    if channels == 1 and isinstance(values, list | tuple) and len(values) == 1:
        values = [*values] * 3
    least = _LEAST_STD if label == "std" else -_MOST
    numbers = isinstance(values, list | tuple) and all(type(v) in (int, float) and least < v < _MOST for v in values)
    if not numbers or len(values) != 3:
        told = repr(values)
        raise BackboneError(
            f"{name}: image {label} must be three numbers, one per channel, above {least:g} and below {_MOST:g}, not "
            f"{told if len(told) <= 100 else told[:97] + '...'}"
        )
    if channels == 1 and len(set(values)) > 1:
        raise BackboneError(
            f"{name} has one input channel: image {label} must be one number, or three equal ones, not {values}"
        )
    return float(values[0]), float(values[1]), float(values[2])


def image_pooling(config: Any, family: Family, wanted: Pooling | None, name: str) -> Pooling:
    """Returns how patch tokens become features. Raises BackboneError for "cls" if there is no class token."""
    if wanted == "cls" and not family.has_class_token:
        raise BackboneError(f"{name}: {family.model} has no class token; choose pooling='mean'")
    mean = not family.has_class_token or (family.mean_if is not None and getattr(config, family.mean_if))
    return wanted or ("mean" if mean else "cls")


def text_pooling(folder: Path, name: str) -> Pooling:
    """Returns what a sentence-transformers folder says; the mean if it says nothing."""
    said = read_json(folder / "1_Pooling" / "config.json")
    modes = [key for key, on in said.items() if key.startswith("pooling_mode_") and on is True]
    if modes in ([], ["pooling_mode_mean_tokens"]):
        return "mean"
    if modes == ["pooling_mode_cls_token"]:
        return "cls"
    raise BackboneError(f"{name}: {', '.join(modes)} in 1_Pooling is not supported; choose pooling='mean' or 'cls'")
