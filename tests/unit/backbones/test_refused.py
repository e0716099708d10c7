"""What is refused, with a sentence: damaged and foreign files, settings that fit no model or not the weights.

Settings are refused before any weight is read.
"""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.tiny import noise
from tests.unit.backbones.folders import change, configure
from torch import Tensor

from lamina.backbones import content_hash, load
from lamina.backbones.families import FAMILIES
from lamina.backbones.files import all_finite
from lamina.errors import BackboneError


def pixels(size: int) -> dict[str, Tensor]:
    return {"pixel_values": noise((2, 3, size, size), "pixels")}


@pytest.fixture
def nothing_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a weight fails the test."""

    def read(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("lamina.backbones.loading.read_tensors", read)


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("model_type", ["swin", "opt", "gemma3", "mixtral", "t5", "albert"])
@pytest.mark.usefixtures("nothing_read")
def test_a_family_that_is_not_in_the_table_is_refused(vit_folder: Path, model_type: str):
    (vit_folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (vit_folder / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=f"model_type '{model_type}' is not supported") as told:
        load(str(vit_folder))
    assert all(f"{name}," in str(told.value) or f"{name}." in str(told.value) for name in FAMILIES)
    assert "docs/backbones.md says how to add a family" in str(told.value)


BAD_VIT: list[tuple[dict[str, Any], str]] = [
    ({"num_attention_heads": 0}, "num_attention_heads in config.json must be a whole number, 1 or more, not 0"),
    (
        {"num_attention_heads": 5},
        "hidden_size 32 .* not a multiple of num_attention_heads 5|not a multiple of the number",
    ),
    ({"patch_size": 0}, "patch_size in config.json must be a whole number, 1 or more, not 0"),
    ({"patch_size": [8, 4]}, r"only square images and patches are supported; patch_size in config.json is \[8, 4\]"),
    ({"image_size": [16, 32]}, r"only square .* image_size in config.json is \[16, 32\]"),
    ({"image_size": "16"}, "image_size in config.json must be a whole number"),
    ({"image_size": 20}, "image_size 20 is not a multiple of the patch size 8"),
    ({"image_size": 80000}, "describes a model of .* numbers|makes 100000000 patches of 8 px; at most 16384"),
    ({"hidden_size": True}, "hidden_size in config.json must be a whole number"),
    ({"hidden_size": "wide"}, "hidden_size in config.json must be a whole number, 1 or more, not 'wide'"),
    ({"hidden_size": 10**9}, r"config.json describes a model of \d+ numbers, and the weights hold \d+"),
    ({"hidden_size": 10**30}, "config.json does not make a ViTModel"),
    ({"num_hidden_layers": 10_000}, r"says 10000 blocks, and the weights hold \d+ tensors"),
    ({"num_hidden_layers": None}, "config.json does not say num_hidden_layers"),
    ({"num_channels": 4}, r"num_channels .* must be 1 \(grey\) or 3 \(RGB\), not 4"),
    ({"hidden_act": "swoosh"}, "hidden_act 'swoosh' .* is not an activation of transformers, such as gelu"),
    ({"hidden_act": 3}, "hidden_act 3 .* is not an activation"),
    ({"hidden_dropout_prob": 7.0}, "config.json does not make a ViTModel"),
    ({"layer_norm_eps": "small"}, "config.json does not make a ViTModel"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "config.json has a quantization_config"),
    ({"is_decoder": True}, "config.json sets is_decoder; only encoders"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_VIT, ids=lambda value: str(value)[:40])
@pytest.mark.usefixtures("nothing_read")
def test_settings_of_images_are_refused(vit_folder: Path, settings: dict[str, Any], message: str):
    configure(vit_folder, **settings)
    with pytest.raises(BackboneError, match=message):
        load(str(vit_folder))


BAD_BERT: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": None}, "config.json does not say num_hidden_layers"),
    ({"num_attention_heads": 0}, "num_attention_heads in config.json must be"),
    ({"vocab_size": 10**12}, "config.json describes a model of"),
    ({"max_position_embeddings": 10**12}, "config.json describes a model of"),
    ({"vocab_size": 0}, "vocab_size in config.json must be"),
    ({"pad_token_id": 10**6}, "config.json does not make a BertModel"),
    ({"add_cross_attention": True}, "config.json sets add_cross_attention"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_BERT, ids=lambda value: str(value)[:40])
@pytest.mark.usefixtures("nothing_read")
def test_settings_of_texts_are_refused(bert_folder: Path, settings: dict[str, Any], message: str):
    configure(bert_folder, **settings)
    with pytest.raises(BackboneError, match=message):
        load(str(bert_folder))


@pytest.mark.parametrize(
    "settings",
    [
        {"return_dict": False, "output_hidden_states": True, "output_attentions": True},
        {"num_labels": 10**9},
        {"id2label": ["cat"], "label2id": 3},
        {"dtype": "nonsense", "torch_dtype": "float99"},
        {"attn_implementation": "someone/kernels", "_attn_implementation": "flash_attention_2"},
        {"transformers_weights": "/etc/passwd", "auto_map": {"AutoModel": "x.py--X"}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_do_not_describe_the_encoder_change_nothing(vit_folder: Path, settings: dict[str, Any]):
    expected = load(str(vit_folder)).features(pixels(16))
    configure(vit_folder, **settings)
    assert torch.equal(load(str(vit_folder)).features(pixels(16)), expected)


def test_settings_that_compute_nothing_finite_are_refused(vit_folder: Path):
    configure(vit_folder, layer_norm_eps=-5.0)
    with pytest.raises(BackboneError, match="features of a blank example are not 32 finite numbers"):
        load(str(vit_folder))


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"image_mean": 0.5}, "image mean must be three numbers, one per channel, above -1000 and below 1000, not 0.5"),
        ({"image_mean": [0.5, 0.5]}, "image mean must be three numbers"),
        ({"image_mean": [0.5, "a", 0.5]}, "image mean must be three numbers"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "image mean must be three numbers"),
        ({"image_std": [0.5, 0.0, 0.5]}, "image std must be .* above 1e-06 and below 1000, not"),
        ({"image_std": [1e-320, 1, 1]}, "image std must be three numbers"),
        ({"image_std": [1, 1, 1e300]}, "image std must be three numbers"),
        ({"image_mean": [1e300, 0, 0]}, "image mean must be three numbers"),
        ({"image_mean": [0, 0, -(10**400)]}, r"image mean must be three numbers, .*, not \[0, 0, -10+\.\.\.$"),
        ({"image_std": {"r": 1}}, "image std must be three numbers"),
    ],
    ids=lambda given: str(given)[:60],
)
@pytest.mark.usefixtures("nothing_read")
def test_a_normalisation_is_checked(vit_folder: Path, beside: dict[str, Any], message: str):
    (vit_folder / "preprocessor_config.json").write_text(json.dumps(beside))
    with pytest.raises(BackboneError, match=message):
        load(str(vit_folder))


@pytest.mark.usefixtures("nothing_read")
def test_an_image_size_without_end_is_refused(vit_folder: Path):
    with pytest.raises(BackboneError, match="image_size 80000 makes 100000000 patches of 8 px; at most 16384"):
        load(str(vit_folder), image_size=80000)


@pytest.mark.parametrize(
    ("kind", "key"), [("DistilBert", "num_hidden_layers"), ("DistilBert", "n_layers"), ("Dinov2", "num_hidden_layers")]
)
@pytest.mark.parametrize("value", [10**40, "two", {"two": 2}], ids=str)
@pytest.mark.usefixtures("nothing_read")
def test_a_number_of_blocks_is_checked_before_transformers_sees_it(tmp_path: Path, kind: str, key: str, value: object):
    config = getattr(transformers, f"{kind}Config")(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    configure(tmp_path, **{key: value})
    with pytest.raises(
        BackboneError, match=rf"{key} in config\.json must be|says 1(0){{40}} blocks, and the weights hold"
    ):
        load(str(tmp_path))


# ---------------------------------------------------------------------------------------------- files


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # the name of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


def directory(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [pipe, device, listening, directory])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "preprocessor_config.json"])
def test_only_regular_files_are_read(vit_folder: Path, file: str, make: Any):
    (vit_folder / file).unlink(missing_ok=True)
    make(vit_folder / file)
    with pytest.raises(BackboneError, match=f"{file} is not a regular file"):
        load(str(vit_folder))


@pytest.mark.parametrize("make", [pipe, device, listening])
def test_only_regular_files_are_read_by_name(tmp_path: Path, make: Any):
    make(tmp_path / "weights.safetensors")
    for name in (tmp_path / "weights.safetensors", tmp_path):
        with pytest.raises(BackboneError, match=r"weights\.safetensors is not a regular file"):
            load(str(name))
        with pytest.raises(BackboneError, match=r"weights\.safetensors is not a regular file"):
            content_hash(str(name))


def test_settings_of_any_size_are_not_read(vit_folder: Path):
    with (vit_folder / "config.json").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(BackboneError, match=r"has 1000000000000 bytes; at most 67108864 are read"):
        load(str(vit_folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(vit_folder: Path, value: float):
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["encoder.layer.1.output.dense.weight"][3, 4] = value

    change(vit_folder, edit)
    with pytest.raises(
        BackboneError,
        match=r"model\.safetensors: encoder\.layer\.1\.output\.dense\.weight holds values that are not finite",
    ):
        load(str(vit_folder))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [1, 7, 32, 33, 1000, 40_000])
def test_one_number_that_is_not_finite_is_found_anywhere(size: int, value: float, dtype: torch.dtype):
    assert all_finite(torch.zeros(0, dtype=dtype))
    for position in {0, size // 2, size - 1}:
        numbers = noise((size,), "numbers").to(dtype)
        assert all_finite(numbers)
        numbers[position] = value
        assert not all_finite(numbers)
        assert not all_finite(numbers.reshape(1, -1).T)


@pytest.mark.parametrize("name", ["layer(norm", "(a+)+$", "a b", ""])
def test_names_that_are_none_are_refused(vit_folder: Path, name: str):
    change(vit_folder, lambda t: t.update({name: torch.ones(2)}))
    with pytest.raises(BackboneError, match="is not the name of a tensor"):
        load(str(vit_folder))


def test_quantised_weights_are_refused(vit_folder: Path):
    change(vit_folder, lambda t: t.update({"layernorm.weight": torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(BackboneError, match=r"layernorm\.weight is stored as I8; quantised weights are not supported"):
        load(str(vit_folder))


def test_an_adapter_is_told_from_a_model(tmp_path: Path):
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(8, 32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BackboneError, match=r"is a PEFT adapter, not a whole model\. Give its base model, or merge"):
        load(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "google/vit"}')
    for name in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(BackboneError, match=r"is a PEFT adapter, .*\. Give its base model, 'google/vit', or merge"):
            load(str(name))


def test_a_missing_tensor_is_named(vit_folder: Path):
    def edit(tensors):
        del tensors[next(k for k in tensors if ".1." in k and k.endswith(("query.weight", "q_proj.weight")))]

    change(vit_folder, edit)
    with pytest.raises(BackboneError, match=r"lack layers\.1\.attention\.q_proj\.weight"):
        load(str(vit_folder))


def test_a_wrong_shape_is_named_with_both_shapes(vit_folder):
    change(vit_folder, lambda t: t.update({"layernorm.weight": torch.ones(31)}))
    with pytest.raises(BackboneError, match=r"layernorm\.weight \(expected \[32\], found \[31\]\)"):
        load(str(vit_folder))


@pytest.mark.parametrize("shape", [(), (5,), (1, 3, 32), (1, 40, 32), (1, 5, 31)], ids=str)
def test_a_table_of_positions_that_does_not_fit_is_named(vit_folder: Path, shape: tuple[int, ...]):
    change(vit_folder, lambda t: t.update({"embeddings.position_embeddings": torch.ones(shape)}))
    for size in (None, 32):
        with pytest.raises(BackboneError, match=r"wrong shape for embeddings\.position_embeddings"):
            load(str(vit_folder), image_size=size)


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
        ("[" * 10**5, "not valid JSON"),
        ("[]", "expected a JSON object, found list"),
        ('{"a": ' + "1" * 5000 + "}", "not valid JSON"),
        ("{}", r"no config\.json"),
        ('{"hidden_size": 32}', "model_type None is not supported"),
        ('{"model_type": ["vit"]}', r"model_type \['vit'\] is not supported"),
    ],
    ids=range(7),
)
def test_a_file_of_settings_that_is_none_is_refused(vit_folder: Path, text: str, message: str):
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


@pytest.mark.parametrize("name", ["no-such-backbone", "./nowhere/at-all", "../x", "\0", "a b/c"])
def test_an_unknown_name_says_what_is_allowed(name):
    with pytest.raises(BackboneError, match="give 'nano', a folder"):
        load(name)


def test_a_name_that_the_system_does_not_take_is_refused():
    for read in (load, content_hash):
        with pytest.raises(BackboneError, match=r"cannot be read: .*File name too long"):
            read("n" * 300)


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


@pytest.mark.parametrize("weight_map", [["model.safetensors"], {}, None, 3, "model.safetensors"])
def test_an_index_without_a_map_is_refused(vit_folder: Path, weight_map: object):
    shard(vit_folder)
    (vit_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BackboneError, match="weight_map must be an object that names the file of each tensor"):
        load(str(vit_folder))
