"""Every family of the table: its features are those of transformers' own model, and a method learns with it.

A family is supported if it has a row here. Shape letters: b batch, t tokens, d width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.conformance import cases
from tests.tiny import noise, scatter
from torch import Tensor, nn

from lamina.backbones import ROLES, Backbone, load
from lamina.backbones.families import FAMILIES
from lamina.errors import BackboneError, MethodError
from lamina.learner import Learner
from lamina.learner.probes import check_sites, watchers
from lamina.types import Batch

IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 60,
    "max_position_embeddings": 40,
}
IDS = torch.tensor([[2, 5, 9, 7, 8], [2, 4, 6, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
WORDS = {"input_ids": IDS, "attention_mask": MASK}

Inputs = dict[str, Any]
Output = Any
Pooled = Callable[[Output], Tensor]


def class_token(output: Output) -> Tensor:
    return output.last_hidden_state[:, 0]


def patch_mean(output: Output) -> Tensor:
    return output.last_hidden_state.mean(1)


def pooler(output: Output) -> Tensor:
    return output.pooler_output


def interpolated(pixels_bchw: Tensor) -> Inputs:
    return {"pixel_values": pixels_bchw, "interpolate_pos_encoding": True}


def as_they_are(pixels_bchw: Tensor) -> Inputs:
    return {"pixel_values": pixels_bchw}


def cut(pixels_bchw: Tensor) -> Inputs:
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    patches = torch.stack([torch.from_numpy(convert_image_to_patches(p.numpy(), 8)) for p in pixels_bchw])
    grid = pixels_bchw.shape[-1] // 8
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.int64),
        "spatial_shapes": torch.tensor([[grid, grid]] * len(patches)),
    }


@dataclass(frozen=True, kw_only=True)
class Row:
    """A tiny model of a family, and how transformers computes its features."""

    model: str
    """Class in transformers, without "Model"."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    features: Pooled = class_token
    """Images: the features that are the default."""
    norm: str | None = None
    """Images: path of the LayerNorm that `last_hidden_state` has not gone through."""
    mean: float = 0.5
    """Images: mean of the first channel, if nothing beside the weights says it."""
    inputs: Callable[[Tensor], Inputs] = as_they_are
    """Images: what transformers' model takes, of any size."""
    positions: int | None = 40
    """Text: longest input."""
    fc1: int = 1
    """Sites with the role fc1 in a block."""

    @property
    def kind(self) -> str:
        return "text" if self.model in TEXT_MODELS else "image"

    def settings_of(self) -> dict[str, Any]:
        return (TEXT if self.kind == "text" else IMAGE) | dict(self.settings)

    @cache
    def raw(self) -> nn.Module:
        config = getattr(transformers, f"{self.model}Config")(**self.settings_of())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return scatter(getattr(transformers, f"{self.model}Model")(config), 0.7).eval()

    def __hash__(self) -> int:
        return id(self)


TEXT_MODELS = (
    *("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "DistilBert", "MPNet", "DebertaV2", "ModernBert"),
)
NO_MLP = {"mlp_ratio": 2}
SHIFTED = {"pad_token_id": 1}
DISTILBERT = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
V3 = {
    "relative_attention": True,
    "position_buckets": 4,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
}
V2_XLARGE = V3 | {"conv_kernel_size": 3, "conv_act": "gelu"}
MODERN = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3, "pad_token_id": 0}

ROWS = {
    "vit": Row(model="ViT", inputs=interpolated),
    "deit": Row(model="DeiT", mean=0.485, inputs=interpolated),
    "vit_msn": Row(model="ViTMSN", mean=0.485, inputs=interpolated),
    "beit": Row(model="Beit", features=pooler, norm="pooler.layernorm", settings={"use_relative_position_bias": True}),
    "beit, class token": Row(
        model="Beit", settings={"use_mean_pooling": False, "use_absolute_position_embeddings": True}
    ),
    "dinov2": Row(model="Dinov2", mean=0.485, settings=NO_MLP),
    "dinov2, gated": Row(model="Dinov2", mean=0.485, settings=NO_MLP | {"use_swiglu_ffn": True}, fc1=2),
    "dinov2_with_registers": Row(model="Dinov2WithRegisters", mean=0.485, settings=NO_MLP | {"num_register_tokens": 3}),
    "dinov3_vit": Row(model="DINOv3ViT", mean=0.485, settings={"num_register_tokens": 3}),
    "dinov3_vit, gated": Row(model="DINOv3ViT", mean=0.485, settings={"use_gated_mlp": True}, fc1=2),
    "clip_vision_model": Row(
        model="CLIPVision", features=pooler, norm="post_layernorm", mean=0.48145466, inputs=interpolated
    ),
    "siglip_vision_model": Row(model="SiglipVision", features=patch_mean, inputs=interpolated),
    "siglip2_vision_model": Row(model="Siglip2Vision", features=patch_mean, inputs=cut, settings={"num_patches": 4}),
    "bert": Row(model="Bert"),
    "roberta": Row(model="Roberta", settings=SHIFTED, positions=38),
    "xlm-roberta": Row(model="XLMRoberta", settings=SHIFTED, positions=38),
    "camembert": Row(model="Camembert", settings=SHIFTED, positions=38),
    "electra": Row(model="Electra", settings={"embedding_size": 16}),
    "distilbert": Row(model="DistilBert", settings=DISTILBERT),
    "mpnet": Row(model="MPNet", settings=SHIFTED, positions=38),
    "deberta-v2": Row(model="DebertaV2", settings=V2_XLARGE, positions=None),
    "deberta-v2, v3": Row(model="DebertaV2", settings=V3, positions=None),
    "modernbert": Row(model="ModernBert", settings=MODERN | {"local_attention": 4}, positions=None),
}
TOWERS = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}
"""Model types whose checkpoints have a text tower too."""

every_row = pytest.mark.parametrize("name", ROWS)
images = pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.kind == "image"])
texts = pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.kind == "text"])


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    ROWS[name].raw().save_pretrained(tmp_path)
    return tmp_path


def pixels(size: int) -> Tensor:
    return noise((2, 3, size, size), "pixels")


def test_every_family_has_a_row():
    encoders = {name for name, family in FAMILIES.items() if family.kind != "language"}
    assert {name.split(",")[0] for name in ROWS} | TOWERS.keys() == encoders


def test_the_table_of_the_documentation_is_that_of_the_code():
    lines = (Path(__file__).parents[3] / "docs" / "backbones.md").read_text(encoding="utf-8").splitlines()
    found: dict[str, list[str]] = {}
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and "`" in cells[1] and cells[1] != "`model_type`":
            found |= dict.fromkeys((name.strip(" `") for name in cells[1].split(",")), cells[2:])
    assert found.keys() == FAMILIES.keys()
    for name, (model, features, sizes) in found.items():
        family = FAMILIES[name]
        assert model == f"`{family.model}`"
        if family.kind == "language":
            assert features == "mean of tokens"
            assert sizes == "`max_position_embeddings` tokens"
        elif family.kind == "text":
            assert features == "mean of tokens"
            assert ("512" in sizes or "table" in sizes) == (family.positions is not None), name
        else:
            assert features.startswith("class token" if family.has_class_token and not family.mean_if else "mean"), name
            assert sizes.startswith("table resized" if family.positions else "by the model"), name
            assert ("antialiasing" in sizes) == family.antialias, name


@images
@pytest.mark.parametrize("size", [16, 32])
def test_image_features_are_those_of_transformers(name: str, size: int, folder: Path):
    row, pixels_bchw = ROWS[name], pixels(size)
    backbone = load(str(folder), image_size=size)
    given = {"pixel_values": pixels_bchw}
    with torch.no_grad():
        expected = row.raw()(**row.inputs(pixels_bchw), output_hidden_states=True)
        torch.testing.assert_close(backbone.features(given), row.features(expected))
        first_btd = expected.hidden_states[1]
        patches = (size // 8) ** 2
        first_bd = first_btd[:, 0] if backbone.pooling == "cls" else first_btd[:, -patches:].mean(1)
        torch.testing.assert_close(backbone.layered(given, 2), torch.cat([first_bd, row.features(expected)], 1))
    assert (backbone.kind, backbone.width, backbone.blocks, backbone.heads) == ("image", 32, 2, 2)
    assert (backbone.image.size, backbone.image.channels, backbone.image.mean[0]) == (size, 3, row.mean)
    with pytest.raises(BackboneError, match=f"takes {size} px images, got 24x24"):
        backbone.features({"pixel_values": pixels(24)})


@images
def test_the_other_pooling_of_an_image_family(name: str, folder: Path):
    row = ROWS[name]
    other = "cls" if load(str(folder)).pooling == "mean" else "mean"
    if row.features is patch_mean:
        with pytest.raises(BackboneError, match="has no class token; choose pooling='mean'"):
            load(str(folder), pooling="cls")
        return
    backbone, given = load(str(folder), pooling=other, image_size=32), {"pixel_values": pixels(32)}
    with torch.no_grad():
        output = row.raw()(**row.inputs(pixels(32)), output_hidden_states=True)
        first_bd, pooled_bd = (
            tokens_btd[:, 0] if other == "cls" else tokens_btd[:, -16:].mean(1)
            for tokens_btd in (output.hidden_states[1], output.last_hidden_state)
        )
        if row.norm is not None:
            pooled_bd = row.raw().get_submodule(row.norm)(pooled_bd)
        torch.testing.assert_close(backbone.layered(given, 2), torch.cat([first_bd, pooled_bd], 1))
        assert torch.equal(backbone.layered(given, 1), backbone.features(given))


@images
def test_leaving_out_what_the_class_token_does_not_need_leaves_every_gradient_as_it_was(name: str, folder: Path):
    row, backbone = ROWS[name], load(str(folder))
    paths = dict.fromkeys(site.path for site in backbone.sites)
    weights = [backbone.module.get_submodule(path).weight.requires_grad_() for path in paths]
    whole = [row.raw().get_submodule(path).weight for path in paths]
    shapes: list[torch.Size] = []
    last = next(site for site in backbone.sites if site.name == "block1.fc2")
    backbone.module.get_submodule(last.path).register_forward_pre_hook(lambda _, given: shapes.append(given[0].shape))
    found = torch.autograd.grad(backbone.features({"pixel_values": pixels(16)}).square().sum(), weights)
    expected = torch.autograd.grad(row.features(row.raw()(**row.inputs(pixels(16)))).square().sum(), whole)
    assert (shapes[0][1] == 1) == (backbone.pooling == "cls"), "the last block computes more than the class token"
    for path, mine, theirs in zip(paths, found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, msg=path)


@texts
def test_text_features_are_those_of_transformers(name: str, folder: Path):
    row = ROWS[name]
    backbone, first = load(str(folder)), load(str(folder), pooling="cls")
    with torch.no_grad():
        expected = row.raw()(**WORDS, output_hidden_states=True)
        for layers, hidden in ((1, expected.last_hidden_state), (2, expected.hidden_states[1])):
            mean_bd = torch.stack([hidden[0].mean(0), hidden[1, :3].mean(0)])
            torch.testing.assert_close(backbone.layered(WORDS, layers)[:, :32], mean_bd)
            torch.testing.assert_close(first.layered(WORDS, layers)[:, :32], hidden[:, 0])
    assert (backbone.kind, backbone.width, backbone.blocks, backbone.heads) == ("text", 32, 2, 2)
    assert backbone.vocabulary == 60
    assert backbone.positions == row.positions
    assert (backbone.image, backbone.tokenizer, backbone.pooling) == (None, None, "mean")


@texts
def test_the_longest_text_is_computed_and_no_longer_one(name: str, folder: Path):
    backbone = load(str(folder))
    longest = backbone.positions or 60
    ids_bt = torch.full((1, longest + 1), 5)
    with torch.no_grad():
        features_bd = backbone.features({"input_ids": ids_bt[:, 1:], "attention_mask": torch.ones(1, longest)})
        assert features_bd.isfinite().all()
        if backbone.positions is not None:
            with pytest.raises((RuntimeError, IndexError)):
                backbone.features({"input_ids": ids_bt, "attention_mask": torch.ones(1, longest + 1)})


@every_row
def test_every_role_of_every_block_is_found(name: str, folder: Path):
    backbone = load(str(folder))
    modules = dict(backbone.module.named_modules())
    assert len({site.name for site in backbone.sites}) == len(backbone.sites)
    for block in range(2):
        sites = [site for site in backbone.sites if site.block == block]
        count = {role: sum(site.role == role for site in sites) for role in ROLES}
        assert count == dict.fromkeys(ROLES, 1) | {"fc1": ROWS[name].fc1}
        assert {site.group for site in sites} == {f"block{block}.{g}" for g in ("attention", "out", "fc1", "fc2")}
    assert all(isinstance(modules[site.path], nn.Linear) for site in backbone.sites)
    assert all(not parameter.requires_grad for parameter in backbone.module.parameters())


@every_row
def test_every_site_reads_hidden_states_once_and_a_group_reads_the_same(name: str, folder: Path):
    backbone = load(str(folder))
    seen: dict[str, list[Tensor]] = {site.path: [] for site in backbone.sites}
    for path, found in seen.items():
        layer = backbone.module.get_submodule(path)
        layer.register_forward_pre_hook(lambda _, given, found=found: found.append(given[0]))
    backbone.features(WORDS if backbone.kind == "text" else {"pixel_values": pixels(16)})
    groups: dict[str, Tensor] = {}
    for site in backbone.sites:
        (read_bti,) = seen[site.path]
        assert (read_bti.ndim, len(read_bti)) == (3, 2), site.name
        assert torch.equal(groups.setdefault(site.group, read_bti), read_bti), site.name


@every_row
def test_q_k_and_v_are_what_they_are_called(name: str, folder: Path):
    """The attention's output is linear in v. If only the first token is used, only its query is, but all keys are."""
    first = ROWS[name].features is not patch_mean
    backbone = load(str(folder), pooling="cls" if first else "mean")
    inputs = WORDS if backbone.kind == "text" else {"pixel_values": pixels(16)}
    sites = {site.role: site for site in backbone.sites if site.block == 1}
    modules = {role: backbone.module.get_submodule(site.path) for role, site in sites.items()}
    seen: dict[str, Tensor] = {}
    modules["out"].register_forward_pre_hook(lambda _, given: seen.update(out=given[0].detach()))
    for role in "qk":
        modules[role].weight.requires_grad_()
        modules[role].register_forward_hook(lambda _, __, output, role=role: seen.update({role: output}))
    features_bd = backbone.features(inputs)
    gradients = dict(zip("qk", torch.autograd.grad(features_bd.square().sum(), [seen["q"], seen["k"]]), strict=True))
    used = {role: gradients[role][..., slice(*(sites[role].outputs or (None,)))][:, 1:].any() for role in "qk"}
    assert used == {"q": not first, "k": True}
    before, rows = seen["out"], slice(*(sites["v"].outputs or (None,)))
    with torch.no_grad():
        for parameter in modules["v"].parameters():
            parameter[rows] *= 2
        backbone.features(inputs)
    torch.testing.assert_close(seen["out"], 2 * before)


@every_row
def test_probes_are_what_attention_reads_or_are_refused(name: str, folder: Path):
    """W_v z is what the readers get on average."""
    learner = Learner(load(str(folder)), ("k", "v"))
    backbone, site = learner.backbone, learner.sites["block1.v"]
    if backbone.relative:
        with pytest.raises(MethodError, match=r"'any' needs attention .* depends on relative positions too"):
            check_sites(learner, "any")
        return
    check_sites(learner, "any")
    inputs = WORDS if backbone.kind == "text" else {"pixel_values": pixels(16)}
    shown: dict[str, Tensor] = {}
    out = backbone.module.get_submodule(next(s.path for s in backbone.sites if s.name == "block1.out"))
    out.register_forward_pre_hook(lambda _, given: shown.update(out=given[0]))
    batch = Batch(inputs=inputs, labels_b=torch.zeros(2).long())
    with torch.no_grad(), learner.watching(watchers(learner, batch, lambda s, p: shown.update({s.name: p}))):
        learner.features(batch)
    weight_od, bias_o = learner.linear(1, "v")
    read_bhe = torch.einsum("hed,bhd->bhe", weight_od.view(2, 16, 32), shown[site.name]) + (
        0 if bias_o is None else bias_o.view(2, 16)
    )
    mask_bt = torch.ones(shown["out"].shape[:2]) if backbone.kind == "image" else MASK
    if backbone.pooling == "cls":
        mask_bt = torch.zeros_like(mask_bt)
        mask_bt[:, 0] = 1
    mean_bo = (shown["out"] * mask_bt[..., None]).sum(1) / mask_bt.sum(1, keepdim=True)
    torch.testing.assert_close(mean_bo, read_bhe.flatten(1), atol=1e-4, rtol=1e-4)


@every_row
def test_a_change_of_each_site_changes_the_features(name: str, folder: Path):
    backbone = load(str(folder))
    inputs = WORDS if backbone.kind == "text" else {"pixel_values": pixels(16)}
    with torch.no_grad():
        before_bd = backbone.features(inputs)
        for site in backbone.sites:
            weight_oi = backbone.module.get_submodule(site.path).weight
            rows = slice(*site.outputs) if site.outputs else slice(None)
            kept_oi = weight_oi[rows].clone()
            weight_oi[rows] *= 1.5
            assert not torch.equal(backbone.features(inputs), before_bd), site.name
            weight_oi[rows] = kept_oi


@every_row
def test_in_bf16_features_are_close(name: str, folder: Path):
    backbone = load(str(folder))
    inputs = WORDS if backbone.kind == "text" else {"pixel_values": pixels(16)}
    with torch.no_grad():
        exact_bd = backbone.features(inputs)
        backbone.cast(torch.bfloat16)
        half_bd = backbone.features({k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()})
    assert half_bd.dtype == torch.bfloat16
    assert (half_bd.float() - exact_bd).norm() < 0.03 * exact_bd.norm()


@every_row
def test_inflora_learns_tasks(name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    backbone: Backbone = load(str(folder))
    monkeypatch.setitem(cases.BACKBONES, "family", (lambda: backbone, ROLES))
    training = cases.TRAINING.model_copy(update={"epochs": 20})
    loop = cases.make_loop("inflora", cases.World("family", "class"), tmp_path / "run", training=training)
    loop.run()
    by_task: dict[int, list[float]] = {}
    for task, _, loss in loop.state.losses:
        by_task.setdefault(task, []).append(loss)
    assert len(by_task) == 3
    assert sum(losses[-1] for losses in by_task.values()) < 0.5 * sum(losses[0] for losses in by_task.values())


# ---------------------------------------------------------------------------------------------- two towers


@pytest.mark.parametrize("model_type", TOWERS)
def test_of_a_model_with_two_towers_only_the_vision_tower_is_read(model_type: str, tmp_path: Path):
    kind = TOWERS[model_type]
    row = next(row for row in ROWS.values() if row.model == f"{kind}Vision")
    config = getattr(transformers, f"{kind}Config")(text_config=TEXT, vision_config=row.settings_of(), projection_dim=8)
    raw = scatter(getattr(transformers, f"{kind}Model")(config), 0.7).eval()
    raw.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    text = {key for key in stored if not key.startswith("vision_model.")}
    save_file({k: v * float("nan") if k in text else v for k, v in stored.items()}, tmp_path / "model.safetensors")
    backbone = load(str(tmp_path))
    assert set(backbone.ignored) == text | {key for key in stored if key.startswith("vision_model.head.")}
    with torch.no_grad():
        expected_bd = row.features(raw.vision_model(**row.inputs(pixels(16))))
        torch.testing.assert_close(backbone.features({"pixel_values": pixels(16)}), expected_bd)


def test_the_default_settings_of_a_tower_may_be_left_out(tmp_path: Path):
    ROWS["clip_vision_model"].raw().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip", "vision_config": {}}')
    with pytest.raises(BackboneError, match=r"a model of \d+ numbers, and the weights hold"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "clip", "vision_config": [32]}')
    with pytest.raises(BackboneError, match=r"vision_config .* must be an object, not \[32\]"):
        load(str(tmp_path))
