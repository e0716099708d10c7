"""Tiny models and data for tests: random weights, images and texts with something to learn, all from a seed.

Shape letters: n examples, b batch, c channels, h w pixels, t tokens, d width.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from lamina.adapters import LowRank
from lamina.backbones import Backbone, ImageInput, from_module, make_site
from lamina.rng import seed_of
from lamina.types import Augment, Ints, LabelledData

HALF = (0.5, 0.5, 0.5)
VIT_PATHS = {
    "q": "layers.{}.attention.q_proj",
    "k": "layers.{}.attention.k_proj",
    "v": "layers.{}.attention.v_proj",
    "out": "layers.{}.attention.o_proj",
    "fc1": "layers.{}.mlp.fc1",
    "fc2": "layers.{}.mlp.fc2",
}
BERT_PATHS = {
    "q": "encoder.layer.{}.attention.self.query",
    "k": "encoder.layer.{}.attention.self.key",
    "v": "encoder.layer.{}.attention.self.value",
    "out": "encoder.layer.{}.attention.output.dense",
    "fc1": "encoder.layer.{}.intermediate.dense",
    "fc2": "encoder.layer.{}.output.dense",
}


def scatter(module: nn.Module, scale: float = 1.0) -> nn.Module:
    """Fresh random parameters everywhere, biases and norms too, so that no mistake in loading them can hide."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            norm = parameter.ndim == 1 and name.endswith("weight")
            spread = scale / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.1 * scale
            parameter.normal_(1.0 if norm else 0.0, spread)
    return module


def raw_vit(seed: int = 0, size: int = 16, width: int = 32, blocks: int = 3, patch: int = 8) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        intermediate_size=2 * width,
        image_size=size,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return scatter(ViTModel(config, add_pooling_layer=False)).eval()


def raw_bert(seed: int = 0, width: int = 32, blocks: int = 2, vocabulary: int = 60) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        intermediate_size=2 * width,
        vocab_size=vocabulary,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = scatter(BertModel(config, add_pooling_layer=False)).eval()
        model.embeddings.word_embeddings.weight.data.mul_(4)  # words, not positions, tell texts apart
        return model


def tiny_vit(seed: int = 0, size: int = 16, width: int = 32, blocks: int = 3, patch: int = 8) -> Backbone:
    """transformers' ViT: `size` px, 2 heads, sites for all six roles of every block."""

    def class_token(tokens_btd: Tensor, _: Mapping[str, Tensor]) -> Tensor:
        return tokens_btd[:, 0]

    def features(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return class_token(module(pixel_values=inputs["pixel_values"]).last_hidden_state, inputs)

    backbone = from_module(
        raw_vit(seed, size, width, blocks, patch),
        [make_site(block, role, path.format(block)) for block in range(blocks) for role, path in VIT_PATHS.items()],
        kind="image",
        width=width,
        features=features,
        name="tiny_vit",
        image=ImageInput(size, HALF, HALF),
        heads=2,
        stages=["embeddings", *(f"layers.{block}" for block in range(blocks))],
        pool=class_token,
    )
    backbone.fusible = True  # as that of `load` for such a model
    return backbone


def tiny_bert(seed: int = 0, width: int = 32, blocks: int = 2, vocabulary: int = 60) -> Backbone:
    """transformers' BERT, mean-pooled; token ids below `vocabulary`, at most 32 tokens."""

    def mean(tokens_btd: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        mask_bt = inputs["attention_mask"]
        return (tokens_btd * mask_bt[..., None]).sum(1) / mask_bt.sum(1, keepdim=True)

    def features(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        mask_bt = inputs["attention_mask"]
        return mean(module(input_ids=inputs["input_ids"], attention_mask=mask_bt).last_hidden_state, inputs)

    return from_module(
        raw_bert(seed, width, blocks, vocabulary),
        [make_site(block, role, path.format(block)) for block in range(blocks) for role, path in BERT_PATHS.items()],
        kind="text",
        width=width,
        features=features,
        name="tiny_bert",
        pooling="mean",
        heads=2,
        stages=["embeddings", *(f"encoder.layer.{block}" for block in range(blocks))],
        pool=mean,
    )


class TimmBlock(nn.Module):
    """Pre-norm transformer block with one fused qkv layer, its parts named as timm names them."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x_btd: Tensor) -> Tensor:
        b, t, d = x_btd.shape
        qkv = self.attn["qkv"](self.norm1(x_btd)).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed_btd = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d)
        x_btd = x_btd + self.attn["proj"](mixed_btd)
        return x_btd + self.mlp["fc2"](gelu(self.mlp["fc1"](self.norm2(x_btd))))


class TimmViT(nn.Module):
    """A plain ViT (Dosovitskiy et al., ICLR 2021) written here from the architecture; its keys are those of timm."""

    def __init__(self, size: int = 16, width: int = 32, blocks: int = 3, heads: int = 2, patch: int = 8) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList([TimmBlock(width, heads, 2 * width) for _ in range(blocks)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 10)

    def forward(self, pixels_bchw: Tensor) -> Tensor:
        """Class token (b, d) after the last LayerNorm."""
        patches_btd = self.patch_embed["proj"](pixels_bchw).flatten(2).transpose(1, 2)
        x_btd = torch.cat([self.cls_token.expand(len(patches_btd), -1, -1), patches_btd], 1) + self.pos_embed
        for block in self.blocks:
            x_btd = block(x_btd)
        return self.norm(x_btd)[:, 0]


def timm_vit(
    seed: int = 0, size: int = 16, width: int = 32, blocks: int = 3, heads: int = 2, patch: int = 8
) -> TimmViT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TimmViT(size, width, blocks, heads, patch)
        scatter(model)
        return model.eval()


def tiny_fused_vit(seed: int = 0, size: int = 16, width: int = 32, blocks: int = 3) -> Backbone:
    """A ViT whose q, k and v are row slices of one linear layer."""
    sites = []
    for block in range(blocks):
        for i, role in enumerate(("q", "k", "v")):
            sites.append(make_site(block, role, f"blocks.{block}.attn.qkv", (i * width, (i + 1) * width)))
        sites.append(make_site(block, "out", f"blocks.{block}.attn.proj"))
        sites.append(make_site(block, "fc1", f"blocks.{block}.mlp.fc1"))
        sites.append(make_site(block, "fc2", f"blocks.{block}.mlp.fc2"))
    return from_module(
        timm_vit(seed, size, width, blocks),
        sites,
        kind="image",
        width=width,
        features=lambda module, inputs: module(inputs["pixel_values"]),
        name="tiny_fused_vit",
        image=ImageInput(size, HALF, HALF),
        heads=2,
    )


def noise(shape: tuple[int, ...], *key: int | str) -> Tensor:
    """Normal draws that are a function of the key only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed_of(*key)))


@dataclass(frozen=True)
class ImageTable:
    """Images in memory; augmentation adds noise drawn for (seed, epoch, row)."""

    pixels_nchw: Tensor
    augments = True

    def inputs(self, rows: Ints, augment: Augment | None) -> dict[str, Tensor]:
        pixels_bchw = self.pixels_nchw[torch.from_numpy(np.asarray(rows, np.int64))]
        if augment is not None:
            shape = tuple(self.pixels_nchw.shape[1:])
            extra = [noise(shape, "augment", augment.seed, augment.epoch, int(row)) for row in rows]
            pixels_bchw = pixels_bchw + 0.1 * torch.stack(extra)
        return {"pixel_values": pixels_bchw}

    def lengths(self, rows: Ints) -> Ints:
        return np.ones(len(rows), np.int64)


@dataclass(frozen=True)
class TextTable:
    """Token ids in memory, padded to one length; texts are not augmented."""

    ids_nt: Tensor
    mask_nt: Tensor
    augments = False

    def inputs(self, rows: Ints, augment: Augment | None) -> dict[str, Tensor]:
        index = torch.from_numpy(np.asarray(rows, np.int64))
        return {"input_ids": self.ids_nt[index], "attention_mask": self.mask_nt[index]}

    def lengths(self, rows: Ints) -> Ints:
        lengths_n: Ints = self.mask_nt[torch.from_numpy(np.asarray(rows, np.int64))].sum(1).numpy()
        return lengths_n


def _labelled(kind: str, table: object, n: int, classes: int, domains: int, tensors: list[Tensor]) -> LabelledData:
    """Rows cycle through the classes, then the domains; within each pair the last quarter is for testing."""
    rows_n = np.arange(n, dtype=np.int64)
    turn_n, turns = rows_n // (classes * domains), max(1, n // (classes * domains))
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    return LabelledData(
        kind=kind,
        name=f"tiny_{kind}",
        table=table,
        labels_n=rows_n % classes,
        domains_n=rows_n // classes % domains,
        splits_n=np.where(turn_n >= turns - max(1, turns // 4), 2, 0).astype(np.int64),
        class_names=tuple(f"class{c}" for c in range(classes)),
        domain_names=tuple(f"domain{d}" for d in range(domains)),
        fingerprint=digest.hexdigest(),
    )


def tiny_images(n: int = 96, classes: int = 4, domains: int = 1, size: int = 16, seed: int = 0) -> LabelledData:
    """Images whose mean depends on the class, seen through a shift per domain; about 3/4 train, 1/4 test."""
    means = noise((classes, 3, size, size), "classes", seed)
    shifts = noise((domains, 3, 1, 1), "domains", seed)
    rows_n = torch.arange(n)
    pixels_nchw = means[rows_n % classes] + shifts[rows_n // classes % domains]
    pixels_nchw = pixels_nchw + 0.7 * noise((n, 3, size, size), "images", seed)
    return _labelled("image", ImageTable(pixels_nchw), n, classes, domains, [pixels_nchw])


def tiny_texts(
    n: int = 96, classes: int = 4, domains: int = 1, length: int = 8, vocabulary: int = 60, seed: int = 0
) -> LabelledData:
    """Texts of 3 to `length` tokens; 7 in 10 of their words belong to their class. Id 0 is padding, 1 starts a text."""
    generator = torch.Generator().manual_seed(seed_of("texts", seed))
    own = 3  # words of each class; the others are common
    first = vocabulary - own * classes
    labels_n = torch.arange(n) % classes
    common_nt = torch.randint(2, first, (n, length), generator=generator)
    topic_nt = torch.randint(0, own, (n, length), generator=generator) + first + own * labels_n[:, None]
    ids_nt = torch.where(torch.rand(n, length, generator=generator) < 0.7, topic_nt, common_nt)
    ids_nt[:, 0] = 1
    lengths_n = torch.randint(3, length + 1, (n, 1), generator=generator)
    mask_nt = (torch.arange(length)[None] < lengths_n).long()
    return _labelled("text", TextTable(ids_nt * mask_nt, mask_nt), n, classes, domains, [ids_nt * mask_nt, mask_nt])


def tiny_linear(o: int = 6, i: int = 5, bias: bool = True) -> nn.Linear:
    """A frozen linear layer with random weights."""
    made = nn.Linear(i, o, bias).requires_grad_(False)
    made.weight.copy_(noise((o, i), "weight"))
    if bias:
        made.bias.copy_(noise((o,), "bias"))
    return made


def tiny_branch(key: str, o: int = 6, i: int = 5, rank: int = 2, trained: tuple[str, ...] = ("up",)) -> LowRank:
    """A branch with an update that is not zero, a function of the key."""
    factors = {"up": noise((o, rank), key, "up"), "down": noise((rank, i), key, "down")}
    return LowRank(
        trained={name: factors[name] for name in trained},
        frozen={name: factor for name, factor in factors.items() if name not in trained},
    )


class Watched:
    """A table that notes the rows that are asked for."""

    augments = True

    def __init__(self, table: ImageTable | TextTable) -> None:
        self.table, self.rows = table, set[int]()

    def inputs(self, rows: Ints, augment: Augment | None) -> dict[str, Tensor]:
        self.rows |= set(map(int, rows))
        return self.table.inputs(rows, augment)

    def lengths(self, rows: Ints) -> Ints:
        return self.table.lengths(rows)
