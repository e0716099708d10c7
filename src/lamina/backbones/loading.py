"""Build a backbone from a checkpoint, or from any module."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamina.backbones.families import FAMILIES, Family
from lamina.backbones.files import TOKENIZER_FILES, locate, quiet, read_json, read_weights, some, tensors_hash
from lamina.backbones.roles import (
    ROLES,
    Backbone,
    Features,
    ImageInput,
    Kind,
    Pool,
    Pooling,
    Site,
    Triple,
    class_token,
    make_site,
)
from lamina.backbones.timm_keys import from_timm
from lamina.errors import BackboneError


def _check_sites(module: nn.Module, sites: Sequence[Site]) -> None:
    modules = dict(module.named_modules())
    wrong = [s.path for s in sites if not isinstance(modules.get(s.path), nn.Linear)]
    if wrong:
        raise BackboneError(
            f"{type(module).__name__} has no linear layer at {some(wrong)}. If it is a transformers model, the "
            f"installed version {version('transformers')} names its parts differently, or this variant of the "
            "architecture is not supported; build the model yourself and give the sites to from_module()"
        )
    for s in sites:
        d_out = modules[s.path].out_features
        if s.outputs is not None and not 0 <= s.outputs[0] < s.outputs[1] <= d_out:
            raise BackboneError(f"site {s.name}: outputs {s.outputs} are not within the {d_out} outputs of {s.path}")


def _features(module: nn.Module, inputs: Mapping[str, Tensor], *, names: Sequence[str], pool: Pool) -> Tensor:
    tokens_btd: Tensor = module(**{name: inputs[name] for name in names}).last_hidden_state
    return pool(tokens_btd, inputs)


def _image_pool(tokens_btd: Tensor, _: Mapping[str, Tensor], *, pooling: Pooling, patches: int) -> Tensor:
    return tokens_btd[:, 0] if pooling == "cls" else tokens_btd[:, -patches:].mean(1)


def _text_pool(tokens_btd: Tensor, inputs: Mapping[str, Tensor], *, pooling: Pooling) -> Tensor:
    if pooling == "cls":
        return tokens_btd[:, 0]
    mask_bt = inputs["attention_mask"]
    total_bd = (tokens_btd * mask_bt.unsqueeze(-1)).sum(1, dtype=torch.float32)
    return (total_bd / mask_bt.sum(1, keepdim=True).clamp(min=1)).to(tokens_btd.dtype)


# ---------------------------------------------------------------------------------------------- loading


def load(
    name: str,
    *,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    pooling: Literal["auto", "cls", "mean"] = "auto",
    mean: Triple | None = None,
    std: Triple | None = None,
) -> Backbone:
    """Load a backbone from safetensors weights.

    `name` is "nano" (shipped with lamina), a folder with config.json and safetensors weights, a .safetensors file, or
    "owner/name" on the Hugging Face hub. Weights may be in transformers' layout or in timm's ViT layout. `image_size`
    other than the checkpoint's is built into the position embedding once, by bicubic interpolation. `mean` and `std`
    replace the normalisation found beside the weights. `pooling` "auto" is the class token for images and, for text,
    what a sentence-transformers folder says, else the mean.

    Raises BackboneError when the weights are missing, damaged, incomplete, of another shape, or not supported.
    """
    if pooling not in ("auto", "cls", "mean"):
        raise BackboneError(f"pooling must be 'auto', 'cls' or 'mean', not {pooling!r}")
    folder, files = locate(name)
    tensors, ignored = read_weights(files), list[str]()
    settings = read_json(folder / "config.json")
    stored_hash = tensors_hash(tensors)
    if "blocks.0.attn.qkv.weight" in tensors:
        settings, tensors, ignored = from_timm(tensors, settings, name)
    elif not settings:
        raise BackboneError(f"{name}: no config.json in {folder} and the weights are not in timm's ViT layout")
    model_type = str(settings.get("model_type"))
    if model_type not in FAMILIES:
        raise BackboneError(f"{name}: model_type {model_type!r} is not supported; known: {', '.join(FAMILIES)}")
    architecture = FAMILIES[model_type]
    if architecture.kind == "text" and (image_size or mean or std):
        raise BackboneError(f"{name} is a text model ({model_type}): image_size, mean and std do not apply")

    module, unused = _build(architecture, settings, tensors, name)
    config, image, tokenizer = module.config, None, None
    blocks = config.num_hidden_layers
    sites = tuple(
        make_site(block, role, f"{architecture.block.format(block)}.{part}")
        for block in range(blocks)
        for role, part in zip(ROLES, architecture.parts, strict=True)
    )
    _check_sites(module, sites)
    if architecture.kind == "image":
        chosen: Pooling = "cls" if pooling == "auto" else pooling
        size = _resize_positions(module, image_size or config.image_size, name)
        found_mean, found_std = _normalisation(folder, settings, architecture)
        image = ImageInput(size, _three("mean", mean or found_mean), _three("std", std or found_std))
        names: tuple[str, ...] = ("pixel_values",)
        pool: Pool = partial(_image_pool, pooling=chosen, patches=(size // config.patch_size) ** 2)
    else:
        chosen = _text_pooling(folder, name) if pooling == "auto" else pooling
        tokenizer = folder if any((folder / file).is_file() for file in TOKENIZER_FILES) else None
        names, pool = ("input_ids", "attention_mask"), partial(_text_pool, pooling=chosen)
    if (architecture.kind, chosen) == ("image", "cls"):
        last = architecture.block.format(blocks - 1)
        for path in (f"{last}.{architecture.parts[ROLES.index('out')]}", f"{last}.{architecture.middle}"):
            module.get_submodule(path).register_forward_pre_hook(class_token)
    module = module.to(dtype).eval().requires_grad_(False)
    # In a mapped file they lie at odd addresses, which change the last bits of a product.
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()
    return Backbone(
        *(name, architecture.kind, stored_hash, module, sites, config.hidden_size, blocks, image, tokenizer, chosen),
        forward=partial(_features, names=names, pool=pool),
        heads=config.num_attention_heads,
        ignored=tuple(sorted([*ignored, *unused])),
        stages=("embeddings", *(architecture.block.format(block) for block in range(blocks))),
        pool=pool,
        fusible=architecture.fusible and config.hidden_act == "gelu",
    )


def from_module(
    module: nn.Module,
    sites: Sequence[Site],
    *,
    kind: Kind,
    width: int,
    features: Features,
    name: str = "custom",
    image: ImageInput | None = None,
    tokenizer: Path | None = None,
    pooling: Pooling = "cls",
    heads: int | None = None,
    stages: Sequence[str] = (),
    pool: Pool | None = None,
) -> Backbone:
    """A backbone out of any model of yours, for example one with a fused qkv layer. The module itself is frozen.

    `features(module, inputs)` returns (b, width). `pooling` is a record of what it does; `heads` (of every attention layer)
    is asked for by methods that look into attention, `stages` (see `Backbone`) by `backbone.reuse_mb`, and with `pool` by
    `consolidation.layers`. Raises BackboneError for a site that is not a linear layer of the module, or whose rows are
    outside it, and for stages that do not fit.
    """
    _check_sites(module, sites)
    stored_hash, module = tensors_hash(module.state_dict()), module.eval().requires_grad_(False)
    blocks = 1 + max((s.block for s in sites), default=-1)
    unknown = sorted(set(stages) - dict(module.named_modules()).keys())
    if unknown or (stages and len(stages) <= blocks):
        raise BackboneError(
            f"{name}: stages must be paths of the embeddings and of each of the {blocks} blocks, in their order; "
            + (f"there is nothing at {some(unknown)}" if unknown else f"found {len(stages)} paths")
        )
    return Backbone(
        *(name, kind, stored_hash, module, tuple(sites), width, blocks, image, tokenizer, pooling),
        forward=features,
        heads=heads,
        stages=tuple(stages),
        pool=pool,
    )


# ---------------------------------------------------------------------------------------------- building


def _build(arch: Family, settings: dict[str, Any], tensors: dict[str, Tensor], name: str) -> tuple[Any, list[str]]:
    """The transformers module in fp32 with these weights in it, and the names of tensors it had no use for.

    Handing over a state dict lets transformers convert old key names, while no file but ours is ever opened.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa", "output_loading_info": True}
    if arch.pooler:
        options["add_pooling_layer"] = False
    model = getattr(transformers, arch.model)
    try:
        config = model.config_class.from_dict(settings)
        with quiet():
            module, found = model.from_pretrained(
                None, config=config, state_dict=tensors, ignore_mismatched_sizes=True, **options
            )
    except (ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        raise BackboneError(f"{name}: config.json and weights do not make a {arch.model}: {error}") from error
    if found["mismatched_keys"]:
        wrong = [f"{k} (expected {list(e)}, found {list(f)})" for k, f, e in sorted(found["mismatched_keys"])]
        raise BackboneError(f"{name}: wrong shape for {some(wrong)}; config.json is not the one of these weights")
    if found["missing_keys"] or found["error_msgs"]:
        wrong = [*sorted(found["missing_keys"]), *found["error_msgs"]]
        raise BackboneError(f"{name}: the weights lack {some(wrong)}; the file is incomplete or of another model")
    unused = sorted(found["unexpected_keys"])
    blocks = [key for key in unused if re.search(r"(^|\.)layers?\.\d+\.", key)]
    if blocks:
        raise BackboneError(f"{name}: the weights have parts that config.json does not: {some(blocks)}")
    return module, unused


def _resize_positions(module: Any, size: int | Sequence[int], name: str) -> int:
    """Fit the position embedding (1, p, d) to square images of `size` pixels, once. Returns the size."""
    config, embeddings = module.config, module.embeddings
    patch, old = config.patch_size, config.image_size
    if not isinstance(patch, int) or not isinstance(old, int) or not isinstance(size, int):
        raise BackboneError(f"{name}: only square images and patches are supported, found {old} and {patch}")
    if size < patch or size % patch:
        raise BackboneError(f"{name}: image_size {size} is not a multiple of the patch size {patch}")
    before, after = old // patch, size // patch
    if after != before:
        positions_pd = embeddings.position_embeddings.detach()[0]
        special_pd, grid_pd = positions_pd[: -(before**2)], positions_pd[-(before**2) :]
        old_1dhw = grid_pd.T.reshape(1, -1, before, before)
        new_1dhw = nn.functional.interpolate(old_1dhw, size=(after, after), mode="bicubic", align_corners=False)
        embeddings.position_embeddings = nn.Parameter(torch.cat([special_pd, new_1dhw[0].flatten(1).T])[None])
    config.image_size = size
    embeddings.image_size = embeddings.patch_embeddings.image_size = (size, size)
    embeddings.patch_embeddings.num_patches = after**2
    return size


def _normalisation(folder: Path, settings: Mapping[str, Any], arch: Family) -> tuple[Triple, Triple]:
    """Mean and std as preprocessor_config.json or timm's config say; else those usual for the architecture."""
    processor, timm = read_json(folder / "preprocessor_config.json"), settings.get("pretrained_cfg", {})
    if not processor.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean = processor.get("image_mean") or timm.get("mean") or arch.mean
    return mean, processor.get("image_std") or timm.get("std") or arch.std


def _three(label: str, values: Sequence[float]) -> Triple:
    if len(values) != 3 or (label == "std" and min(values) <= 0):
        raise BackboneError(f"image {label} must be three numbers, one per channel (std above 0), not {values!r}")
    return float(values[0]), float(values[1]), float(values[2])


def _text_pooling(folder: Path, name: str) -> Pooling:
    """What a sentence-transformers folder says; the mean where it says nothing."""
    said = read_json(folder / "1_Pooling" / "config.json")
    modes = [key for key, on in said.items() if key.startswith("pooling_mode_") and on is True]
    if modes in ([], ["pooling_mode_mean_tokens"]):
        return "mean"
    if modes == ["pooling_mode_cls_token"]:
        return "cls"
    raise BackboneError(f"{name}: {', '.join(modes)} in 1_Pooling is not supported; choose pooling='mean' or 'cls'")
