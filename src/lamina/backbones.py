"""Pre-trained transformers by what their linear maps do: which are q, k, v, out, fc1 and fc2, whatever their names.

A `Backbone` is a frozen module, its `Site`s, and a function from inputs to one feature vector per example. Weights are
read from safetensors files only and every one is checked: nothing is ever left at random. This is the one file of the
package that knows transformers; it is imported when a model is loaded, because that costs seconds.

Shape letters: b batch, c channels, h w pixels, t tokens (special ones first), d width, p positions.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lamina.errors import BackboneError

Kind = Literal["image", "text"]
Pooling = Literal["cls", "mean"]
Triple = tuple[float, float, float]
Features = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
Pool = Callable[[Tensor, Mapping[str, Tensor]], Tensor]

ROLES = ("q", "k", "v", "out", "fc1", "fc2")
IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Site:
    """One linear map of the backbone, by what it does."""

    name: str
    """For example "block3.k"."""
    block: int
    role: str
    """One of ROLES."""
    path: str
    """Path of the nn.Linear inside `Backbone.module`, for example "layers.3.attention.k_proj"."""
    outputs: tuple[int, int] | None
    """Which output units of that Linear, (start, stop), where several roles share one (fused qkv); None is all."""
    group: str
    """Sites of one group read the same input: "block3.attention" for q, k and v; else the site's own name."""


def make_site(block: int, role: str, path: str, outputs: tuple[int, int] | None = None) -> Site:
    """A Site with the usual name and group. Raises BackboneError for a role that is not one of ROLES."""
    if role not in ROLES:
        raise BackboneError(f"unknown role {role!r} for {path!r}; roles are {', '.join(ROLES)}")
    group = "attention" if role in ("q", "k", "v") else role
    return Site(f"block{block}.{role}", block, role, path, outputs, f"block{block}.{group}")


@dataclass(frozen=True)
class ImageInput:
    """How an image becomes `pixel_values`: `size` x `size` pixels, RGB in [0, 1], minus `mean`, over `std`."""

    size: int
    mean: Triple
    std: Triple


@dataclass
class Backbone:
    """A frozen pre-trained model and where adapters can go."""

    name: str
    kind: Kind
    hash: str
    """sha256 over names, dtypes, shapes and bytes of the stored tensors; how they are split into files is no matter."""
    module: nn.Module
    """In eval mode; no parameter requires a gradient."""
    sites: tuple[Site, ...]
    width: int
    blocks: int
    image: ImageInput | None
    tokenizer: Path | None
    """Folder of the tokenizer, for text; None where there is none beside the weights."""
    pooling: Pooling
    forward: Features
    """Inputs to features for this architecture; called by `features`."""
    heads: int | None = None
    """Of every attention layer; None where it is not known."""
    ignored: tuple[str, ...] = ()
    """Tensors in the file that the backbone has no use for, such as an old classification head."""
    stages: tuple[str, ...] = ()
    """Paths inside `module` of the embeddings, block 0, block 1, ...: each returns hidden states (b, t, d), which are the
    first argument of the next. Empty where they are not known; `below`, `above` and `layered` need them."""
    pool: Pool | None = None
    """Hidden states (b, t, d) and inputs to (b, d), as `features` has it; None where it is not known, which `layered` needs."""
    fusible: bool = False
    """Whether its blocks are among those that `lamina.speed.fused_block` can compute as one."""

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Features (b, d) of `pixel_values` (b, c, h, w), or of `input_ids` and `attention_mask` (b, t).

        Images: the class token after the last LayerNorm ("cls"), or the mean of its patch tokens ("mean"). Text: the
        first token of the last hidden state, or its mean over the attention mask. Row i depends on example i only.
        Raises BackboneError for images of another size than `image.size`.
        """
        if self.image is not None and inputs["pixel_values"].shape[-2:] != (self.image.size, self.image.size):
            got = "x".join(map(str, inputs["pixel_values"].shape[-2:]))
            raise BackboneError(f"{self.name} takes {self.image.size} px images, got {got}; resize them")
        return self.forward(self.module, inputs)

    def layered(self, inputs: Mapping[str, Tensor], layers: int) -> Tensor:
        """Features of the last `layers` blocks, or of all if there are fewer, side by side, (b, layers d): those of `features`,
        and before them the hidden states that the blocks before the last one leave, in their order, pooled alike (not
        normalised). Errors as `features`, and as `check_layers`."""
        self.check_layers(layers)
        found: list[Tensor] = []

        def note(_: nn.Module, __: object, hidden_btd: Tensor) -> None:
            assert self.pool is not None
            found.append(self.pool(hidden_btd, inputs))

        blocks = self.stages[1:][-layers:-1]
        hooks = [self.module.get_submodule(path).register_forward_hook(note) for path in blocks]
        try:
            last_bd = self.features(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat([*found, last_bd], 1)

    def check_layers(self, layers: int) -> None:
        """Raises BackboneError where there are features of the last block only."""
        if layers > 1 and (self.pool is None or not self.stages):
            raise BackboneError(
                f"{self.name} does not say what it computes block by block, so there are features of its last block only; give "
                "`stages` and `pool` to from_module(), or leave consolidation.layers at 1"
            )

    def cast(self, dtype: torch.dtype) -> None:
        """Hold the frozen weights in this precision."""
        self.module.to(dtype)


def class_token(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    """A forward pre-hook. The feature is the class token, so after its attention the last block computes only that."""
    return (inputs[0][:, :1],)


# ---------------------------------------------------------------------------------------------- architectures

_VIT = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
_BERT = (
    *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    *("intermediate.dense", "output.dense"),
)
_DISTILBERT = ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2")


@dataclass(frozen=True)
class _Architecture:
    """What differs between model types."""

    kind: Kind
    model: str
    """Class in transformers."""
    block: str
    """Path of block {} in that module, as transformers 5 names it; checked against the module that was built."""
    parts: tuple[str, ...]
    """Paths inside a block, in the order of ROLES."""
    middle: str = "layernorm_after"
    """Path inside a block of what its MLP's input goes through; for images."""
    fusible: bool = False
    """Whether a block is made as transformers' `ViTLayer` is."""
    pooler: bool = True
    """Whether the class takes `add_pooling_layer`, which is always declined."""
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)


_ARCHITECTURES = {  # by the model_type in config.json
    "vit": _Architecture("image", "ViTModel", "layers.{}", _VIT, fusible=True),
    "deit": _Architecture("image", "DeiTModel", "layers.{}", _VIT, fusible=True, mean=IMAGENET[0], std=IMAGENET[1]),
    "dinov2": _Architecture("image", "Dinov2Model", "encoder.layer.{}", _VIT, "norm2", False, False, *IMAGENET),
    "bert": _Architecture("text", "BertModel", "encoder.layer.{}", _BERT),
    "roberta": _Architecture("text", "RobertaModel", "encoder.layer.{}", _BERT),
    "distilbert": _Architecture("text", "DistilBertModel", "transformer.layer.{}", _DISTILBERT, pooler=False),
}


def _check_sites(module: nn.Module, sites: Sequence[Site]) -> None:
    modules = dict(module.named_modules())
    wrong = [s.path for s in sites if not isinstance(modules.get(s.path), nn.Linear)]
    if wrong:
        raise BackboneError(
            f"{type(module).__name__} has no linear layer at {_some(wrong)}. If it is a transformers model, the "
            f"installed version {version('transformers')} names its parts differently, or this variant of the "
            "architecture is not supported; build the model yourself and give the sites to from_module()"
        )
    for s in sites:
        d_out = modules[s.path].out_features
        if s.outputs is not None and not 0 <= s.outputs[0] < s.outputs[1] <= d_out:
            raise BackboneError(
                f"site {s.name}: outputs {s.outputs} are not within the {d_out} output units of {s.path}"
            )


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
    folder, files = _locate(name)
    tensors, ignored = _read(files), list[str]()
    settings = _read_json(folder / "config.json")
    stored_hash = tensors_hash(tensors)
    if "blocks.0.attn.qkv.weight" in tensors:
        settings, tensors, ignored = _from_timm(tensors, settings, name)
    elif not settings:
        raise BackboneError(f"{name}: no config.json in {folder} and the weights are not in timm's ViT layout")
    model_type = str(settings.get("model_type"))
    if model_type not in _ARCHITECTURES:
        raise BackboneError(f"{name}: model_type {model_type!r} is not supported; known: {', '.join(_ARCHITECTURES)}")
    architecture = _ARCHITECTURES[model_type]
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
        tokenizer = folder if any((folder / file).is_file() for file in _TOKENIZER_FILES) else None
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
            + (f"there is nothing at {_some(unknown)}" if unknown else f"found {len(stages)} paths")
        )
    return Backbone(
        *(name, kind, stored_hash, module, tuple(sites), width, blocks, image, tokenizer, pooling),
        forward=features,
        heads=heads,
        stages=tuple(stages),
        pool=pool,
    )


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hexadecimal) over the sorted names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def content_hash(name: str) -> str:
    """Of everything that is read from a named backbone: its weights, and the settings and tokenizer beside them."""
    folder, files = _locate(name)
    digest = hashlib.sha256(tensors_hash(_read(files)).encode())
    for file in sorted(_HUB_FILES):
        if "safetensors" not in file and (folder / file).is_file():
            digest.update(f"|{file}|".encode() + hashlib.sha256((folder / file).read_bytes()).digest())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- files

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json")
_HUB_FILES = [
    *("config.json", "preprocessor_config.json", "1_Pooling/config.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "merges.txt", *_TOKENIZER_FILES),
    *("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
]


def _locate(name: str) -> tuple[Path, list[Path]]:
    """The folder of a named backbone and the safetensors files of its weights."""
    path = Path(name)
    if name == "nano":
        with resources.as_file(resources.files("lamina") / "assets" / "nano") as path:
            return path, [path / "model.safetensors"]
    if path.is_file():
        if path.suffix != ".safetensors":
            raise BackboneError(f"{name}: {_NO_PICKLE}")
        return path.parent, [path]
    if path.is_dir():
        return path, _weight_files(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise BackboneError(f"no backbone {name!r}: give 'nano', a folder, a .safetensors file, or owner/name")
    folder = _download(name)
    return folder, _weight_files(folder)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        with _quiet():
            return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (OSError, HFValidationError) as error:  # every hub error is an OSError: not found, gated, offline
        raise BackboneError(
            f"{name!r} is neither a local path nor to be had from the Hugging Face hub ({type(error).__name__}). Check "
            "the name and the connection, or download the model elsewhere and give the path of its folder"
        ) from error


_NO_PICKLE = (
    "only safetensors weights are read, because loading a pickle can run any code. Convert once, where you trust the "
    "file: safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        names = sorted({str(shard) for shard in _read_json(index).get("weight_map", {}).values()})
        for shard in names:
            if Path(shard).name != shard:
                raise BackboneError(f"{index}: refused shard {shard!r}: shards must lie in the same folder")
        if not names:
            raise BackboneError(f"{index}: no weight_map")
        return [folder / shard for shard in names]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise BackboneError(f"{folder}: several .safetensors files and no model.safetensors.index.json; give one file")
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in sorted(folder.glob(pattern))]
    reason = f"found {', '.join(pickles)}: {_NO_PICKLE}" if pickles else "put model.safetensors beside config.json"
    raise BackboneError(f"{folder}: no safetensors weights; {reason}")


def _read(files: Sequence[Path]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors.update(load_file(file))
        except FileNotFoundError as error:
            raise BackboneError(f"weights file {file} is missing; complete the download") from error
        except (SafetensorError, OSError) as error:
            raise BackboneError(f"{file} is not a readable safetensors file ({error}); download it again") from error
    return tensors


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BackboneError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BackboneError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


# ---------------------------------------------------------------------------------------------- building


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its load reports and progress bars, put back afterwards."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _build(
    arch: _Architecture, settings: dict[str, Any], tensors: dict[str, Tensor], name: str
) -> tuple[Any, list[str]]:
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
        with _quiet():
            module, found = model.from_pretrained(
                None, config=config, state_dict=tensors, ignore_mismatched_sizes=True, **options
            )
    except (ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        raise BackboneError(f"{name}: config.json and weights do not make a {arch.model}: {error}") from error
    if found["mismatched_keys"]:
        wrong = [f"{k} (expected {list(e)}, found {list(f)})" for k, f, e in sorted(found["mismatched_keys"])]
        raise BackboneError(f"{name}: wrong shape for {_some(wrong)}; config.json is not the one of these weights")
    if found["missing_keys"] or found["error_msgs"]:
        wrong = [*sorted(found["missing_keys"]), *found["error_msgs"]]
        raise BackboneError(f"{name}: the weights lack {_some(wrong)}; the file is incomplete or of another model")
    unused = sorted(found["unexpected_keys"])
    blocks = [key for key in unused if re.search(r"(^|\.)layers?\.\d+\.", key)]
    if blocks:
        raise BackboneError(f"{name}: the weights have parts that config.json does not: {_some(blocks)}")
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


def _normalisation(folder: Path, settings: Mapping[str, Any], arch: _Architecture) -> tuple[Triple, Triple]:
    """Mean and std as preprocessor_config.json or timm's config say; else those usual for the architecture."""
    processor, timm = _read_json(folder / "preprocessor_config.json"), settings.get("pretrained_cfg", {})
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
    said = _read_json(folder / "1_Pooling" / "config.json")
    modes = [key for key, on in said.items() if key.startswith("pooling_mode_") and on is True]
    if modes in ([], ["pooling_mode_mean_tokens"]):
        return "mean"
    if modes == ["pooling_mode_cls_token"]:
        return "cls"
    raise BackboneError(f"{name}: {', '.join(modes)} in 1_Pooling is not supported; choose pooling='mean' or 'cls'")


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


def _from_timm(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], name: str
) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """timm's plain ViT as transformers' ViT: settings read off the shapes, tensors renamed, ignored names.

    `attn.qkv` (3 d, d) is cut in q, k, v. The names given are the long-standing ones of ViT files, which every version
    of transformers converts. Raises BackboneError for the variants with more parts (layer scale, registers, q/k norm).
    """
    missing = [key for key in (*_TIMM_TOP, "blocks.0.mlp.fc1.weight") if key not in tensors]
    if missing:
        raise BackboneError(f"{name}: the weights lack {_some(missing)}; of timm's models only the plain ViT is read")
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
        raise BackboneError(f"{name}: {_some(sorted(unknown))} belong to a ViT variant that is not supported")
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


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
