"""Every family that an export claims, reloaded by plain transformers, peft or onnxruntime; and those it refuses, by name."""

import json
from functools import partial
from pathlib import Path

import pytest
import transformers
from safetensors.torch import save_file
from tests.models import CLASSES, images, small
from tests.tiny import timm_vit
from tests.unit.backbones.test_families import IMAGE, ROWS
from tests.unit.export.worlds import slow, taught, with_tokenizer

from lamina.errors import ModelError
from lamina.export import export_merged, export_onnx, export_peft
from lamina.export.heads import IMAGE_HEADS, TEXT_HEADS

IMAGES = {
    "vit": {},
    "deit": {},
    "vit_msn": {},
    "beit": {},
    "beit, class token": {},
    "dinov2": {},
    "dinov2, gated": {},
    "dinov2, mean": {"backbone.pooling": "mean"},
    "dinov2_with_registers": {},
    "dinov2_with_registers, mean": {"backbone.pooling": "mean"},
    "siglip_vision_model": {},
}
TEXTS = [name for name, row in ROWS.items() if row.kind == "text"]
INEXPRESSIBLE = ["dinov3_vit", "clip_vision_model", "siglip2_vision_model"]


def test_every_family_of_the_tables_is_tested():
    assert {name.partition(",")[0] for name in IMAGES} == IMAGE_HEADS.keys()
    assert {name.partition(",")[0] for name in TEXTS} == TEXT_HEADS.keys()


def base(name: str, folder: Path) -> Path:
    row = ROWS.get(name) or ROWS[name.partition(",")[0]]
    raw = row.raw()
    return with_tokenizer(raw, folder) if row.kind == "text" else (raw.save_pretrained(folder), folder)[1]


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str, tmp_path: Path):
    settings = {"backbone.targets": ["k", "fc1"], **IMAGES[name]}
    taught(tmp_path / "m", base(name, tmp_path / "base"), settings=settings)
    done = export_merged(tmp_path / "m", tmp_path / "merged")
    assert done.differences[0].agreement == 1
    labels = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "merged").config.id2label
    assert labels == {0: "ant", 1: "bee", 2: "bee", 3: "cat", 4: "dog"}
    done = export_peft(tmp_path / "m", tmp_path / "peft", with_base=True)
    assert done.differences[0].agreement == 1
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]


@pytest.mark.parametrize("name", TEXTS)
def test_texts_by_their_first_token(name: str, tmp_path: Path):
    settings = {"backbone.pooling": "cls", "backbone.targets": ["k", "v", "fc2"], "data.max_length": 16}
    taught(tmp_path / "m", base(name, tmp_path / "base"), "text", settings=settings)
    for export, out in ((export_merged, "merged"), (export_peft, "peft")):
        more = {"with_base": True} if out == "peft" else {}
        done = export(tmp_path / "m", tmp_path / out, **more)
        assert done.differences[0].agreement == 1
        assert done.differences[0].largest < 1e-3 * done.differences[0].spread
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert loaded.model_max_length == 16


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_a_family_without_a_class_is_refused_and_onnx_is_named(name: str, tmp_path: Path):
    taught(tmp_path / "m", base(name, tmp_path / "base"))
    for export in (export_merged, export_peft):
        with pytest.raises(ModelError, match=rf"{name.partition(',')[0]} has no class.*--format onnx"):
            export(tmp_path / "m", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_pooling_that_the_class_does_not_read_is_refused(tmp_path: Path):
    taught(tmp_path / "m", base("vit", tmp_path / "base"), settings={"backbone.pooling": "mean"})
    with pytest.raises(ModelError, match="does not read the features of pooling 'mean'"):
        export_merged(tmp_path / "m", tmp_path / "out")


def test_a_backbone_of_one_channel_is_refused_by_merged_and_written_by_onnx(tmp_path: Path):
    config = transformers.ViTConfig(**IMAGE, num_channels=1)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    taught(tmp_path / "m", tmp_path / "base")
    with pytest.raises(ModelError, match="one channel"):
        export_merged(tmp_path / "m", tmp_path / "out")
    assert export_onnx(tmp_path / "m", tmp_path / "out").differences[0].agreement == 1


def test_a_graph_for_one_batch_size_is_not_written(tmp_path: Path):
    taught(tmp_path / "m", base("siglip2_vision_model", tmp_path / "base"), "image")
    with pytest.raises(ModelError, match="positions of siglip2_vision_model one image after another"):
        export_onnx(tmp_path / "m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["vit", "bert", *map(slow, ["clip_vision_model", "siglip_vision_model", "modernbert"])]
)
def test_onnx(name: str, tmp_path: Path):
    """With the features of several blocks and the nonlinear classifier."""
    kind = ROWS[name].kind
    settings = {
        "consolidation.classifier": "lda+ridge",
        "consolidation.layers": 2,
        "consolidation.random_features": 64,
        "data.max_length": 16,
    }
    model = taught(tmp_path / "m", base(name, tmp_path / "base"), kind, settings=settings)
    done = export_onnx(tmp_path / "m", tmp_path / "out")
    assert [one.agreement for one in done.differences] == [1, 1]
    assert json.loads((tmp_path / "out" / "labels.json").read_text())["labels"] == list(model.classes)


@pytest.mark.parametrize("method", ["olora", slow("fsa")])
def test_a_checkpoint_with_fused_queries_keys_and_values(method: str, tmp_path: Path):
    """A ViT as timm stores it, q, k and v in one tensor: the exports are in the layout of transformers, base included."""
    base = tmp_path / "timm"
    base.mkdir()
    save_file({name: value.contiguous() for name, value in timm_vit().state_dict().items()}, base / "model.safetensors")
    (base / "config.json").write_text('{"architecture": "vit_tiny", "num_heads": 2, "global_pool": "token"}')
    model = small(tmp_path / "m", base, method, {"method.rank": 2, "probes.per_class": 2})
    model.learn(images(tmp_path / "a.parquet", CLASSES[:3]), name="a")
    model.learn(images(tmp_path / "b.parquet", CLASSES[3:]), name="b", force=True)
    with pytest.raises(ModelError, match="--with-base"):
        export_peft(model.path, tmp_path / "bare")
    for name, write in (
        ("peft", partial(export_peft, with_base=True)),
        ("merged", export_merged),
        ("onnx", export_onnx),
    ):
        done = write(model.path, tmp_path / name)
        assert [one.agreement for one in done.differences] == [1] * len(done.differences)
