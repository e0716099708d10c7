"""Every method, exported from split and fused layers, for images and texts; or refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.unit.backbones.test_families import ROWS
from tests.unit.export.worlds import taught, with_tokenizer

from lamina.errors import MethodError, ModelError
from lamina.export import export_merged, export_onnx, export_peft, export_tasks
from lamina.methods import METHODS

ROUTED = ("color", "duallora")
PER_TASK = ("olora", "inflora", "sora", *ROUTED)
"""Methods that keep an adapter per task."""
UNIFIED = {
    "lamina": {
        "consolidation.classifier": "lda",
        "consolidation.layers": 2,
        "consolidation.merging": "ema",
        "consolidation.drift": "linear+local",
    }
}
"""The settings that a method has by default are used for lamina only; others have their own classifier."""
WORLDS = {
    "split": ("vit", "image", {}),
    "fused": ("modernbert", "text", {"backbone.pooling": "cls", "data.max_length": 16}),
    "bert": ("bert", "text", {"backbone.pooling": "cls", "data.max_length": 16}),
}


def model_of(world: str, method: str, folder: Path, **more: object) -> Path:
    family, kind, settings = WORLDS[world]
    base, raw = folder / "base", ROWS[family].raw()
    if kind == "text":
        with_tokenizer(raw, base)
    else:
        raw.save_pretrained(base)
    taught(folder / "m", base, kind, method, settings | UNIFIED.get(method, {}) | more)
    return folder / "m"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ROUTED])
def test_one_adapter_and_a_checkpoint(method: str, world: str, tmp_path: Path):
    model = model_of(world, method, tmp_path)
    assert export_merged(model, tmp_path / "merged").differences[0].agreement == 1
    if method == "prototype":
        with pytest.raises(MethodError, match="has changed no weight"):
            export_peft(model, tmp_path / "peft")
        return
    done = export_peft(model, tmp_path / "peft", with_base=world != "split")
    assert done.differences[0].agreement == 1
    facts = json.loads((tmp_path / "peft" / "export.json").read_text())
    assert ("refitted" in facts) == (method == "lamina")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_per_task(method: str, world: str, tmp_path: Path):
    if method == "duallora" and world == "fused":
        pytest.skip("it needs attention without relative positions, and says so when a model is made")
    model = model_of(world, method, tmp_path)
    if method not in PER_TASK:
        with pytest.raises(MethodError, match=rf"{method!r} as configured does not keep an adapter per task"):
            export_tasks(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    done = export_tasks(model, tmp_path / "out")
    assert done.differences[0].by.startswith("load.py")
    assert [one.agreement for one in done.differences] == [1] * 3
    assert len((tmp_path / "out" / "load.py").read_text().splitlines()) <= 80
    assert (tmp_path / "out" / "router.safetensors").exists() == (method in ROUTED)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("color", {"method.identify": "first expert"}),
        ("color", {"method.distance": "l1"}),
        ("duallora", {"method.residual": "previous", "method.calibration": 0.5}),
        ("duallora", {"method.residual": "none", "method.calibration": 0.5}),
        ("duallora", {"method.dynamic_memory": False, "backbone.targets": ["v"]}),
    ],
)
def test_settings_of_routers(method: str, settings: dict[str, object], tmp_path: Path):
    model = model_of("split", method, tmp_path, **settings)
    assert export_tasks(model, tmp_path / "out").differences[0].agreement == 1


@pytest.mark.parametrize("method", ROUTED)
def test_a_router_is_refused_by_formats_with_one_update(method: str, tmp_path: Path):
    model = model_of("split", method, tmp_path)
    for export in (export_peft, export_merged, export_onnx):
        with pytest.raises(MethodError, match=rf"{method!r} selects or scales adapters for each input.*peft-tasks"):
            export(model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["base", "m"]


def test_a_cosine_predicts_the_same_class_without_its_length(tmp_path: Path):
    model = model_of("split", "prototype", tmp_path, **{"method.metric": "cosine"})
    done = export_merged(model, tmp_path / "merged")
    assert any("divides the scores" in note for note in done.notes)
    assert export_onnx(model, tmp_path / "onnx").differences[0].agreement == 1


@pytest.mark.parametrize("classifier", ["ncm", "lda", "aligned", "ridge", "lda+ridge"])
def test_unified_classifiers(classifier: str, tmp_path: Path):
    more = {"consolidation.classifier": classifier, "consolidation.random_features": 32}
    model = model_of("split", "finetune", tmp_path, **more)
    done = export_merged(model, tmp_path / "out")
    refitted = classifier in ("ridge", "lda+ridge")
    assert any(f"{classifier} on 1 block, replaced by lda" in note for note in done.notes) == refitted
    assert any("accuracy on the probes" in note for note in done.notes) == refitted


def test_the_mean_over_tokens_gives_encoder_matrix_and_page(tmp_path: Path):
    model = model_of("bert", "olora", tmp_path, **{"backbone.pooling": "mean"})
    for export, out in ((export_merged, "merged"), (export_peft, "peft")):
        done = export(model, tmp_path / out)
        assert done.differences[0].agreement == 1
        assert any("backbone.pooling=cls" in note for note in done.notes)
        assert {"load.py", "classifier.safetensors", "labels.json", "tokenizer.json"} <= {
            path.name for path in (tmp_path / out).iterdir()
        }
    from lamina import backbones

    assert backbones.load(str(tmp_path / "merged")).pooling == "mean"  # by 1_Pooling, as sentence-transformers has it


def test_without_probes_inputs_are_given_or_generated(tmp_path: Path):
    from PIL import Image

    model = model_of("split", "olora", tmp_path, **{"probes.per_class": 0})
    assert "images of noise" in export_merged(model, tmp_path / "a").differences[0].inputs
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    assert (
        export_merged(model, tmp_path / "b", inputs=tmp_path / "photos")
        .differences[0]
        .inputs.startswith("3 images from")
    )
    texts = model_of("bert", "olora", tmp_path / "t", **{"probes.per_class": 0})
    (tmp_path / "lines.txt").write_text("sun and rain\n\nsoup\n")
    assert (
        export_merged(texts, tmp_path / "c", inputs=tmp_path / "lines.txt")
        .differences[0]
        .inputs.startswith("2 texts from")
    )


@pytest.mark.parametrize("export", [export_peft, export_merged, export_onnx, export_tasks])
def test_what_differs_is_not_written(export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The weights in use are changed after the scores of the model were computed."""
    from lamina.export import opened

    model = model_of("split", "olora", tmp_path)
    right = opened.Opened.features

    def wrong(self: opened.Opened, layers: int = 1) -> list[torch.Tensor]:
        return [features_bd * 1.05 for features_bd in right(self, layers)]

    if export is export_onnx:
        scores = opened.Predictor.scores
        monkeypatch.setattr(opened.Predictor, "scores", lambda self, batch: scores(self, batch) * 1.05)
    else:
        monkeypatch.setattr("lamina.export.outputs._own", lambda _, found: found)
        monkeypatch.setattr(opened.Opened, "features", wrong)
    with pytest.raises(ModelError, match="nothing was written"):
        export(model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["base", "m"]


def test_an_existing_place_is_refused(tmp_path: Path):
    (tmp_path / "out").mkdir()
    for export in (export_peft, export_merged, export_onnx, export_tasks):
        with pytest.raises(ModelError, match="exists already"):
            export(tmp_path / "nothing", tmp_path / "out")


def test_a_base_that_transformers_reads_otherwise_must_be_written(tmp_path: Path):
    """Its table of positions was resized when the model was made."""
    model = model_of("split", "olora", tmp_path, **{"backbone.image_size": 24})
    with pytest.raises(ModelError, match="--with-base"):
        export_peft(model, tmp_path / "out")
    assert export_peft(model, tmp_path / "out", with_base=True).differences[0].agreement == 1


def test_ranks_that_are_not_needed_are_left_out(tmp_path: Path):
    """Merging adds a branch of the span of the others."""
    model = model_of("split", "lamina", tmp_path, **{"method.rank": 3})
    done = export_peft(model, tmp_path / "out")
    tensors = load_file(done.path / "adapter_model.safetensors")
    ranks = {len(value) for name, value in tensors.items() if "lora_A" in name}
    assert max(ranks) <= 6
