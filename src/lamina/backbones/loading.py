"""Build a backbone from a checkpoint, or from any module.

All settings are checked before any weight is read, and every weight is checked: nothing is ever left at random.
transformers is imported when a model is loaded, because that takes seconds.

Shape letters: p positions, d width, h w patches.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lamina.backbones.families import Family
from lamina.backbones.features import image_features, language_features, pool_image, pool_text, text_features
from lamina.backbones.files import (
    TOKENIZER_FILES,
    locate,
    quiet,
    read_headers,
    read_json,
    read_tensors,
    readable,
    some,
    tensors_hash,
    weight_files,
)
from lamina.backbones.language import LanguageHead
from lamina.backbones.language_files import check_language, is_buffer, language_head, special_tokens, stored_dtype, tie
from lamina.backbones.layouts import StoredLayer, use_linear_layers
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
from lamina.backbones.settings import (
    choose_size,
    explained,
    family_config,
    find_family,
    find_normalisation,
    image_input,
    image_pooling,
    text_pooling,
)
from lamina.backbones.timm_keys import is_timm, rename_timm, timm_settings
from lamina.errors import BackboneError

_MOST_TIMES_STORED = 4
"""A model may have this many times the numbers that are stored; with more, config.json belongs to other weights."""

_ALIGNMENT = 64
"""Bytes; torch allocates at multiples of it."""


def load(
    name: str,
    *,
    image_size: int | None = None,
    dtype: torch.dtype | None = None,
    pooling: Literal["auto", "cls", "mean"] = "auto",
    mean: Triple | None = None,
    std: Triple | None = None,
) -> Backbone:
    """Loads a backbone from safetensors weights.

    name: "nano" (shipped with lamina), a folder with config.json and safetensors weights, a .safetensors file, or
    "owner/name" on the Hugging Face hub. Weights may be in transformers' layout or in timm's ViT layout.
    image_size: pixels per side; the table of positions is resized to it once.
    dtype: of the weights in memory. None means float32, or, for a causal language model that is stored in bfloat16,
    bfloat16.
    pooling: "auto" is what docs/backbones.md says of the family.
    mean, std: replace the normalisation found beside the weights.

    Raises BackboneError for weights that are missing, damaged, incomplete, of another shape, or not supported.
    """
    if pooling not in ("auto", "cls", "mean"):
        raise BackboneError(f"pooling must be 'auto', 'cls' or 'mean', not {pooling!r}")
    wanted: Pooling | None = None if pooling == "auto" else pooling
    with readable(name):
        checkpoint = _Checkpoint(name)
        if checkpoint.family.kind == "image":
            backbone = checkpoint.image(wanted, image_size, mean, std)
        elif image_size or mean or std:
            model_type = checkpoint.settings["model_type"]
            raise BackboneError(
                f"{name} is a {checkpoint.family.kind} model ({model_type}): image_size, mean and std do not apply"
            )
        elif checkpoint.family.kind == "text":
            backbone = checkpoint.text(wanted)
        else:
            backbone = checkpoint.language(wanted, dtype)
    _probe(backbone)
    if dtype is not None:
        backbone.cast(dtype)
    return backbone


class _Checkpoint:
    """A stored model: its settings and the headers of its weights, checked. `image`, `text` and `language` read the weights."""

    def __init__(self, name: str) -> None:
        self.name = name
        where = locate(name)
        self.folder = where.folder
        self.settings = read_json(where.folder / "config.json")
        if self.settings.get("model_type") is not None:
            find_family(self.settings, name)  # refused before weights are looked for, or downloaded
        self.headers = read_headers(weight_files(where), passed_over=is_buffer)
        self.timm = is_timm(self.headers)
        if self.timm:
            self.settings = timm_settings(self.headers, self.settings, name)
        elif not self.settings:
            raise BackboneError(
                f"{name}: no config.json in {where.folder} and the weights are not in timm's ViT layout"
            )
        self.family = find_family(self.settings, name)
        prefix = self.family.tower or ""
        self.prefix = prefix if any(key.startswith(prefix) for key in self.headers) else ""
        self.used = [key for key in self.headers if key.startswith(self.prefix)]
        if self.family.kind == "language":
            self.used = [key for key in self.used if not is_buffer(key)]
        self.config = family_config(self.family, self.settings, len(self.used), name)
        self.blocks: int = self.config.num_hidden_layers
        self.copies: Mapping[str, str] = {}
        if self.family.shared is not None and getattr(self.config, self.family.shared[0], False):
            setattr(self.config, self.family.shared[0], False)
            self.copies = self.family.shared[1]
        if self.family.kind == "language":
            check_language(self.config, self.used, self.family, name)
        skeleton = self._skeleton()
        self._replace_layers(skeleton)
        self.linear_layers = tuple(path for path, module in skeleton.named_modules() if isinstance(module, nn.Linear))
        self.sites = find_sites(skeleton, self.family, self.blocks)

    def _skeleton(self) -> nn.Module:
        """The module without memory for its weights. Raises BackboneError if it is far larger than what is stored."""
        import transformers

        with quiet(), explained(f"{self.name}: config.json does not make a {self.family.model}"), torch.device("meta"):
            module: nn.Module = getattr(transformers, self.family.model)(self.config, **self.family.options)
        numbers = sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
        stored = sum(_count(self.headers[key].shape) for key in self.used)
        if numbers > _MOST_TIMES_STORED * stored:
            raise BackboneError(
                f"{self.name}: config.json describes a model of {numbers} numbers, and the weights hold {stored}; give the "
                "config.json that belongs to them"
            )
        return module

    def image(self, wanted: Pooling | None, size: int | None, mean: Triple | None, std: Triple | None) -> Backbone:
        config, family = self.config, self.family
        pooling = image_pooling(config, family, wanted, self.name)
        before, after = choose_size(config, family, size, self.name)
        found = find_normalisation(self.folder, self.settings, family, config.num_channels)
        image = image_input(after * config.patch_size, config.num_channels, found, mean, std, self.name)
        stored_hash, tensors, ignored = self._read()
        if family.positions is not None:
            config.image_size = image.size
            for key in [key for key in tensors if key.removesuffix(".weight").endswith(family.positions)]:
                tensors[key] = _resize(tensors[key], before, after, family.antialias)
        module, unused = self._build(tensors)
        last = family.block.format(self.blocks - 1)
        if pooling == "cls":
            for path in (family.layers[ROLES.index("out")], family.middle):
                module.get_submodule(f"{last}.{path}").register_forward_pre_hook(class_token)
        pool = partial(pool_image, pooling=pooling, patches=after**2)
        forward = partial(
            image_features,
            pool=pool,
            norm=family.norm if family.norm in dict(module.named_modules()) else None,
            grey=image.channels == 1,
            patch=config.patch_size if family.takes_patches else None,
        )
        backbone = self._backbone(stored_hash, module, pooling, forward, pool, [*ignored, *unused])
        return replace(backbone, image=image, fusible=family.fusible and config.hidden_act == "gelu")

    def text(self, wanted: Pooling | None) -> Backbone:
        pooling = wanted or text_pooling(self.folder, self.name)
        stored_hash, tensors, ignored = self._read()
        module, unused = self._build(tensors)
        pool = partial(pool_text, pooling=pooling)
        forward = partial(text_features, pool=pool)
        backbone = self._backbone(stored_hash, module, pooling, forward, pool, [*ignored, *unused])
        positions = dict(module.named_modules()).get(self.family.positions or "none")
        return replace(
            backbone,
            tokenizer=self._tokenizer(),
            positions=_longest(positions) if isinstance(positions, nn.Embedding) else None,
            vocabulary=self.config.vocab_size,
        )

    def language(self, wanted: Pooling | None, dtype: torch.dtype | None) -> Backbone:
        if wanted == "cls":
            raise BackboneError(f"{self.name}: a causal language model has no class token; choose pooling='mean'")
        config, family = self.config, self.family
        tokens = special_tokens(self.folder, config.vocab_size)
        stored_hash, tensors, ignored = self._read()
        tie(tensors, config, family, self.name)
        held = dtype or stored_dtype(self.headers, self.used)
        for key, tensor in tensors.items():  # one after another, so that the model is in memory once
            tensors[key] = tensor.to(held) if tensor.is_floating_point() else tensor
        module, unused = self._build(tensors, held)
        stored = self._replace_layers(module)
        for key, value in tokens.items():
            setattr(module.generation_config, key, value)
        language = language_head(config, family)
        pool = partial(pool_text, pooling="mean")
        forward = partial(language_features, language=language, pool=pool)
        return replace(
            self._backbone(stored_hash, module, "mean", forward, pool, [*ignored, *unused]),
            tokenizer=self._tokenizer(),
            positions=config.max_position_embeddings,
            vocabulary=config.vocab_size,
            language=language,
            stored=stored,
        )

    def _tokenizer(self) -> Path | None:
        return self.folder if any((self.folder / file).is_file() for file in TOKENIZER_FILES) else None

    def _replace_layers(self, module: nn.Module) -> dict[str, StoredLayer]:
        """Makes nn.Linear layers of others: see `layouts`."""
        if self.family.kind != "language":
            return {}
        part = self.family.interleaved
        interleaved = [f"{self.family.block.format(block)}.{part}" for block in range(self.blocks)] if part else []
        return use_linear_layers(module, interleaved, self.config.num_attention_heads)

    def _read(self) -> tuple[str, dict[str, Tensor], list[str]]:
        """The hash of the stored tensors, the tensors as transformers names them, and the names of those not read."""
        stored = read_tensors(self.headers, self.used)
        stored_hash = tensors_hash(stored)
        if self.timm:
            return stored_hash, *rename_timm(stored)
        tensors = {key.removeprefix(self.prefix): tensor for key, tensor in stored.items()}
        tensors |= self._copied(tensors)
        return stored_hash, tensors, sorted(self.headers.keys() - stored.keys())

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of linear layers that are copies of another one: see `Family.shared`."""
        found: dict[str, Tensor] = {}
        for layer, copy in self.copies.items():
            for key in [key for key in tensors if f".{layer}." in key]:
                path, _, end = key.replace(f".{layer}.", f".{copy}.").rpartition(".")
                if path.endswith(self.linear_layers):
                    found[f"{path}.{end}"] = tensors[key]
        return found

    def _build(self, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[str]]:
        """The frozen transformers module with these weights in it, and the names of tensors it does not use.

        The tensors are taken out of the dictionary: the module holds them, without a copy where it can. Passing a state
        dict lets transformers convert old key names, and it opens no file.
        """
        import transformers

        model, name = getattr(transformers, self.family.model), self.name
        with quiet(), explained(f"{name}: config.json and weights do not make a {self.family.model}"):
            module, found = model.from_pretrained(
                None,
                config=self.config,
                state_dict=tensors,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                dtype=dtype,
                attn_implementation=self.family.attention,
                **self.family.options,
            )
        if found["mismatched_keys"]:
            wrong = [f"{k} (expected {list(e)}, found {list(f)})" for k, f, e in sorted(found["mismatched_keys"])]
            raise BackboneError(f"{name}: wrong shape for {some(wrong)}; config.json is not the one of these weights")
        if found["missing_keys"] or found["error_msgs"]:
            wrong = [*sorted(found["missing_keys"]), *found["error_msgs"]]
            raise BackboneError(f"{name}: the weights lack {some(wrong)}; the file is incomplete or of another model")
        unused = sorted(found["unexpected_keys"])
        blocks = [key for key in unused if re.search(r"(^|\.)(layers?|h)\.\d+\.", key)]
        if blocks:
            raise BackboneError(f"{name}: the weights have parts that config.json does not: {some(blocks)}")
        module.eval().requires_grad_(False)
        tensors.clear()
        for tensor in (*module.parameters(), *module.buffers()):
            # A part of a larger tensor lies at an odd address, which changes the last bits of a product.
            if tensor.data_ptr() % _ALIGNMENT or tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor.data = tensor.data.clone()
        return module, [self.prefix + key for key in unused]

    def _backbone(
        self,
        stored_hash: str,
        module: nn.Module,
        pooling: Pooling,
        forward: Features,
        pool: Pool,
        ignored: Sequence[str],
    ) -> Backbone:
        return Backbone(
            *(self.name, self.family.kind, stored_hash, module, self.sites, self.config.hidden_size, self.blocks),
            image=None,
            tokenizer=None,
            pooling=pooling,
            forward=forward,
            heads=self.config.num_attention_heads,
            relative=self.family.relative,
            ignored=tuple(sorted(ignored)),
            stages=(self.family.embeddings_path, *(self.family.block.format(block) for block in range(self.blocks))),
            pool=pool,
        )


def find_sites(module: nn.Module, family: Family, blocks: int) -> tuple[Site, ...]:
    """Returns the sites of all blocks of a module of this family. Raises BackboneError if a linear layer is not there."""
    modules = dict(module.named_modules())
    layers, gate = family.layers, None
    if family.gated is not None and f"{family.block.format(0)}.{family.gated[0]}" in modules:
        gate, layers = family.gated[0], (*family.layers[:4], *family.gated[1:])
    sites: list[Site] = []
    for block in range(blocks):
        start = family.block.format(block)
        for role, part in zip(family.roles, layers, strict=True):
            path = f"{start}.{part}"
            outputs, shared = None, [r for r, other in zip(family.roles, layers, strict=True) if other == part]
            if len(shared) > 1 and isinstance(modules.get(path), nn.Linear):
                width = modules[path].out_features // len(shared)
                outputs = (shared.index(role) * width, (shared.index(role) + 1) * width)
            sites.append(make_site(block, role, path, outputs))
        if gate is not None:
            sites.append(replace(make_site(block, "fc1", f"{start}.{gate}"), name=f"block{block}.fc1_gate"))
    check_sites(module, sites)
    return tuple(sites)


def check_sites(module: nn.Module, sites: Sequence[Site]) -> None:
    """Raises BackboneError for a site that is not a linear layer of the module, or whose outputs are outside it."""
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


def _count(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _resize(table: Tensor, before: int, after: int, antialias: bool) -> Tensor:
    """A table of positions (..., p, d) for `after` x `after` patches, by bicubic interpolation; special tokens keep theirs.

    One that does not fit the settings is returned as it is: building the model then names it with both shapes.
    """
    if after == before or table.ndim < 2 or table[..., 0].numel() < before**2:
        return table
    positions_pd = table.float().reshape(-1, table.shape[-1])
    special_pd, grid_pd = positions_pd[: len(positions_pd) - before**2], positions_pd[-(before**2) :]
    old_1dhw = grid_pd.T.reshape(1, -1, before, before)
    new_1dhw = nn.functional.interpolate(
        old_1dhw, size=(after, after), mode="bicubic", align_corners=False, antialias=antialias
    )
    return torch.cat([special_pd, new_1dhw[0].flatten(1).T]).reshape(*table.shape[:-2], -1, table.shape[-1])


def _longest(positions: nn.Embedding) -> int:
    """Tokens that a table of positions has room for. RoBERTa's and its relatives' start behind that of padding."""
    return positions.num_embeddings - (0 if positions.padding_idx is None else positions.padding_idx + 1)


def _probe(backbone: Backbone) -> None:
    """Computes the features of one example. Raises BackboneError if that fails, or they are not finite."""
    if backbone.image is not None:
        inputs = {"pixel_values": torch.zeros(1, 3, backbone.image.size, backbone.image.size)}
    else:
        ids_bt = torch.zeros(1, min(4, backbone.positions or 4), dtype=torch.int64)
        inputs = {"input_ids": ids_bt, "attention_mask": torch.ones_like(ids_bt)}
    with quiet(), explained(f"{backbone.name}: the model that config.json describes does not compute"), torch.no_grad():
        features_bd = backbone.features(inputs)
        finite = bool(features_bd.isfinite().all())
        if backbone.language is not None:
            finite = finite and bool(backbone.token_logits(features_bd).isfinite().all())
    if features_bd.shape != (1, backbone.width) or not finite:
        raise BackboneError(
            f"{backbone.name}: features of a blank example are not {backbone.width} finite numbers; config.json or the "
            "weights are damaged"
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
    relative: bool = False,
    stages: Sequence[str] = (),
    pool: Pool | None = None,
    positions: int | None = None,
    vocabulary: int | None = None,
    language: LanguageHead | None = None,
) -> Backbone:
    """Returns a backbone made of any model, for example one with a fused qkv layer. The module itself is frozen.

    features: maps (module, inputs) to (b, width). pooling: a record of what it does. heads: of every attention layer;
    methods that look into attention need it. relative, stages, pool, positions, vocabulary, language: see `Backbone`.

    Raises BackboneError for a site that is not a linear layer of the module or whose outputs are outside it, for stages
    that do not fit, and for a causal language model without `language`.
    """
    check_sites(module, sites)
    parts = set() if language is None else {language.body, language.head} - dict(module.named_modules()).keys()
    if parts or (language is None) == (kind == "language"):
        raise BackboneError(
            f"{name}: a causal language model, and no other kind, needs `language` with the paths of its body and its head; "
            + (
                f"there is nothing at {some(sorted(parts))}"
                if parts
                else f"kind is {kind!r} and language is {language}"
            )
        )
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
        relative=relative,
        stages=tuple(stages),
        pool=pool,
        positions=positions,
        vocabulary=vocabulary,
        language=language,
    )
