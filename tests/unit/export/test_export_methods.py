"""Every method, exported from split and fused layers, for images and texts; or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.models import CLASSES, images, small
from tests.unit.backbones.test_families import ROWS
from tests.unit.export.worlds import slow, taught, with_tokenizer

from lamina.adapters import AdaptedLinear
from lamina.errors import DataError, MethodError, ModelError
from lamina.export import Exported, export_merged, export_onnx, export_peft, export_tasks
from lamina.export.checking import by_script
from lamina.export.opened import Opened, open_model
from lamina.export.outputs import linear_outputs
from lamina.export.written import Draft
from lamina.learner import Learner
from lamina.methods import METHODS

ROUTED = ("color", "duallora", "lamina")
PER_TOKEN = ("moram",)
"""Methods that weight adapters for every token, which no format holds."""
PER_TASK = ("olora", "inflora", "sora", *ROUTED)
"""Methods that keep an adapter per task."""
QUICK = {(method, "split") for method in METHODS if method not in ("inflora", "sora")} | {("lamina", "fused")}
"""Adapters per task that `make test` writes; `make test-slow` writes the others, in all worlds."""
CONSOLIDATED = {
    "consolidation.classifier": "lda",
    "consolidation.layers": 2,
    "consolidation.merging": "ema",
    "consolidation.drift": "linear+local",
}


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
    taught(folder / "m", base, kind, method, settings | more)
    return folder / "m"


@pytest.mark.parametrize("world", [slow(name) if name == "bert" else name for name in WORLDS])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ROUTED + PER_TOKEN])
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
    assert "refitted" not in facts
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"]


@pytest.mark.parametrize(
    ("method", "world"),
    [
        pytest.param(
            method,
            world,
            marks=() if (method, world) in QUICK else pytest.mark.slow,
        )
        for method in METHODS
        for world in WORLDS
        if method not in PER_TOKEN
    ],
)
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
    assert [one.agreement for one in done.differences] == [1] * (3 if method in ROUTED else 4)
    assert len((tmp_path / "out" / "load.py").read_text().splitlines()) <= 80
    assert (tmp_path / "out" / "router.safetensors").exists() == (method in ROUTED)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("color", {"method.identify": "first expert"}),
        pytest.param("color", {"method.distance": "l1"}, marks=pytest.mark.slow),
        ("duallora", {"method.residual": "previous", "method.calibration": 0.5}),
        pytest.param("duallora", {"method.residual": "none", "method.calibration": 0.5}, marks=pytest.mark.slow),
        pytest.param("duallora", {"method.dynamic_memory": False, "backbone.targets": ["v"]}, marks=pytest.mark.slow),
    ],
)
def test_settings_of_routers(method: str, settings: dict[str, object], tmp_path: Path):
    model = model_of("split", method, tmp_path, **settings)
    assert export_tasks(model, tmp_path / "out").differences[0].agreement == 1


@pytest.mark.parametrize("method", ROUTED)
def test_a_router_is_refused_by_formats_with_one_update(method: str, tmp_path: Path):
    model = model_of("split", method, tmp_path)
    for export in (export_peft, export_merged, *([] if method == "lamina" else [export_onnx])):
        with pytest.raises(MethodError, match=rf"{method!r} selects or scales adapters for each input.*peft-tasks"):
            export(model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["base", "m"]


@pytest.mark.parametrize("world", ["split", slow("fused"), slow("bert")])
@pytest.mark.parametrize("layers", [slow(1), 2])
def test_a_graph_that_infers_the_task(layers: int, world: str, tmp_path: Path):
    """Of inputs of both tasks, in batches of several sizes, and texts of several lengths."""
    model = model_of(world, "lamina", tmp_path, **{"method.layers": layers})
    done = export_onnx(model, tmp_path / "out")
    assert [one.agreement for one in done.differences] == [1, 1]
    with open_model(model) as opened:
        method: Any = opened.predictor.method
        chosen = [method.routed(opened.learner, batch)[0].argmax(1) for batch in opened.batches]
    assert set(torch.cat(chosen).tolist()) == {0, 1}


@pytest.mark.parametrize("method", PER_TOKEN)
def test_weights_for_every_token_are_refused_by_every_format(method: str, tmp_path: Path):
    model = model_of("split", method, tmp_path)
    for export in (export_peft, export_merged, export_onnx, export_tasks):
        with pytest.raises(MethodError, match=rf"{method!r} selects or scales adapters for each input.*No format does"):
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
    if not refitted:  # the matrix computes what is deployed, but for what all outputs share
        with open_model(model) as opened:
            outputs = linear_outputs(opened)
            mine_nj = torch.cat([outputs.scores(features_bd) for features_bd in opened.features()])
            deployed_nj = torch.cat(opened.scores).double()
        apart_nj = (mine_nj - mine_nj.mean(1, keepdim=True)) - (deployed_nj - deployed_nj.mean(1, keepdim=True))
        assert apart_nj.abs().max() < 1e-4 * mine_nj.std(0).mean()


def test_the_mean_over_tokens_gives_encoder_matrix_and_script(tmp_path: Path):
    model = model_of("bert", "olora", tmp_path, **{"backbone.pooling": "mean"})
    for export, out in ((export_merged, "merged"), (export_peft, "peft")):
        done = export(model, tmp_path / out)
        assert done.differences[0].agreement == 1
        assert any("backbone.pooling=cls" in note for note in done.notes)
        assert {"load.py", "classifier.safetensors", "labels.json", "tokenizer.json"} <= {
            path.name for path in (tmp_path / out).iterdir()
        }


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
    (tmp_path / "latin.txt").write_bytes("Où est-il ?".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.txt cannot be read as UTF-8 text .*a text per line"):
        export_merged(texts, tmp_path / "d", inputs=tmp_path / "latin.txt")


def scaled_files(by: float, patch: pytest.MonkeyPatch) -> None:
    """Every update is written with another size, whatever the format."""
    from lamina.export import adapter, merged, updates

    save, state, linear = adapter.save_file, merged.state_of, updates.plain_linear

    def save_scaled(tensors: dict[str, torch.Tensor], *more: object) -> None:
        save({name: by * value if "lora_B" in name else value for name, value in tensors.items()}, *more)

    def state_scaled(learner: Learner, *, folded: bool) -> dict[str, torch.Tensor]:
        before, after = state(learner, folded=False), state(learner, folded=folded)
        return {name: torch.lerp(before[name].float(), after[name].float(), by) for name in before}

    def linear_scaled(layer: AdaptedLinear) -> torch.nn.Linear:
        made = linear(layer)
        made.weight.copy_(torch.lerp(layer.base_oi.float(), made.weight, by))
        return made

    patch.setattr(adapter, "save_file", save_scaled)
    patch.setattr(merged, "state_of", state_scaled)
    patch.setattr(updates, "plain_linear", linear_scaled)


@pytest.mark.parametrize("by", [slow(0.0), slow(0.5), 0.98, slow(1.0)])
@pytest.mark.parametrize("export", [export_peft, export_merged, export_onnx, export_tasks])
def test_what_differs_is_not_written(
    export: Callable[..., Exported], by: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("split", "olora", tmp_path, **{"training.epochs": 4})
    scaled_files(by, monkeypatch)
    if by == 1:
        assert export(model, tmp_path / "out").differences[0].agreement == 1
        return
    with pytest.raises(ModelError, match="nothing was written"):
        export(model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["base", "m"]


INF, NAN = float("inf"), float("nan")
WANTED = [[0.0, 1.0, 9.0], [1.0, 0.0, 9.0], [0.5, 0.2, 9.0]]


@pytest.mark.parametrize(
    ("wanted", "found", "told"),
    [
        ([[0, 1, 1e4], [1, 0, 1e4]], [[1, 0, 1e4], [0, 1, 1e4]], "A score of 'a' differs by 1.0e"),
        (WANTED, [[0.0, 1.0, 9.0], [1.0, 0.0, NAN], [0.5, 0.2, 9.0]], "1 of 9 scores as NaN or infinity"),
        ([[NAN, 1.0]] * 2, [[NAN, 1.0]] * 2, "the model computes 2 of 4 scores as NaN or infinity"),
        ([[INF, 1.0]] * 2, [[INF, 1.0]] * 2, "the model computes 2 of 4 scores as NaN or infinity"),
        ([[NAN, NAN]], [[NAN, NAN]], "the model computes 2 of 2 scores as NaN or infinity"),
        ([[-INF, 1.0], [0.0, -INF]], [[INF, 1.0], [0.0, -INF]], "1 of 4 scores as NaN or infinity"),
        ([[-INF, 1.0], [0.0, -INF]], [[1.0, -INF], [0.0, -INF]], "uses other outputs than the model"),
        ([[-INF, 1.0], [0.0, -INF]], [[-INF, 1.0], [0.0, -INF]], None),
        ([[3.0]], [[3.0]], None),
        ([[3.0]], [[3.00001]], None),
        ([[3.0]], [[3.1]], "A score of 'a' differs by 1.0e-01"),
        ([[0.0, 0.0]] * 3, [[0.0, 0.0]] * 3, None),
        (WANTED, WANTED, None),
        ([[1.0, 2.0]], [[1.0, 2.0, 3.0]], r"scores of shape \(1, 3\), and the model \(1, 2\)"),
    ],
)
def test_scores_are_compared_one_by_one(
    wanted: list[list[float]], found: list[list[float]], told: str | None, tmp_path: Path
) -> None:
    opened: Any = SimpleNamespace(origin="inputs", as_run=None)
    draft = Draft(tmp_path / "out", tmp_path, "none", opened)
    labels = ["a", "b", "c"][: len(wanted[0])]
    if told is None:
        draft.compare("it", [torch.tensor(wanted)], [torch.tensor(found)], labels)
        assert draft.differences[0].agreement == 1
        return
    with pytest.raises(ModelError, match=told):
        draft.compare("it", [torch.tensor(wanted)], [torch.tensor(found)], labels)


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("probes", [1, slow(3)])
@pytest.mark.parametrize("method", ["finetune", slow("olora"), "fsa"])
def test_one_class_and_two_are_enough(method: str, probes: int, classes: int, tmp_path: Path) -> None:
    ROWS["vit"].raw().save_pretrained(tmp_path / "base")
    model = small(tmp_path / "m", tmp_path / "base", method, {"training.epochs": 1, "probes.per_class": probes})
    model.learn(images(tmp_path / "a.parquet", CLASSES[:classes]), name="only")
    for export in (export_merged, export_onnx, *([export_tasks] if method == "olora" else [])):
        assert export(tmp_path / "m", tmp_path / export.__name__).differences[0].agreement == 1
    if classes == 1:  # nothing distinguishes it, so nothing was learnt
        with pytest.raises(MethodError, match="has changed no weight of the backbone"):
            export_peft(tmp_path / "m", tmp_path / "peft")
    else:
        assert export_peft(tmp_path / "m", tmp_path / "peft").differences[0].agreement == 1


@pytest.mark.parametrize("with_base", [slow(False), True])
@pytest.mark.parametrize("world", ["split", slow("bert")])
def test_relative_paths(world: str, with_base: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the base, the model and the export; and the export may be moved."""
    monkeypatch.chdir(tmp_path)
    model = model_of(world, "olora", Path(), **({"backbone.pooling": "mean"} if world == "bert" else {}))
    with open_model(model) as opened:
        batches = opened.batches
    for export in (export_tasks, export_peft):
        out = Path(export.__name__)
        assert export(model, out, with_base=with_base).differences[0].agreement == 1
        configs = [json.loads(file.read_text()) for file in out.rglob("adapter_config.json")]
        bases = {config["base_model_name_or_path"] for config in configs}
        assert bases == {"base"} if with_base else bases == {str(tmp_path / "base")}
        if with_base and (out / "load.py").exists():
            out.rename("moved")
            (tmp_path / "base").rename("hidden")
            assert len(by_script(tmp_path / "moved", batches)) == len(batches)
            (tmp_path / "hidden").rename("base")
            shutil.rmtree("moved")


def test_what_a_library_raises_is_told_and_no_lack_of_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def failing(*_: object, **__: object) -> None:
        raise OSError("there is no file named model.safetensors")

    model = model_of("split", "olora", tmp_path)
    monkeypatch.setattr(transformers.AutoModelForImageClassification, "from_pretrained", failing)
    with pytest.raises(ModelError, match=r"loading the checkpoint .* fails \(OSError: there is no file") as refused:
        export_merged(model, tmp_path / "out")
    assert "Make room" not in str(refused.value)
    with pytest.raises(ModelError, match=r"does not load the base .*\(OSError: there is no file") as refused:
        export_peft(model, tmp_path / "out")
    assert "Make room" not in str(refused.value)


def test_a_disk_that_is_full_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lamina.export import written

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    model = model_of("split", "olora", tmp_path)
    monkeypatch.setattr(written, "fsync", full)
    with pytest.raises(ModelError, match=r"out cannot be written: .*No space left on device. Make room"):
        export_merged(model, tmp_path / "out")


def test_the_next_export_removes_what_a_crash_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lamina.export import written

    model = model_of("split", "olora", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(written.shutil, "rmtree", lambda *_, **__: None)  # as if the process had ended
        patch.setattr(written.os, "rename", lambda *_: 1 / 0)
        patch.setattr(written.os, "getpid", lambda: 1)
        with pytest.raises(ZeroDivisionError):
            export_merged(model, tmp_path / "out")
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")]
    assert left
    export_merged(model, tmp_path / "out")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_a_processor_with_other_pixels_is_refused(tmp_path: Path) -> None:
    """The crop of an image that is not square begins between two pixels in lamina, and at one in transformers."""
    from PIL import Image

    model = model_of("split", "olora", tmp_path, **{"data.evaluate": "resize-crop"})
    (tmp_path / "photos").mkdir()
    for number, shape in enumerate(((30, 20, 3), (20, 31, 3))):
        pixels = np.random.default_rng(number).integers(0, 256, shape, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    with pytest.raises(ModelError, match=r"differ from lamina's by [\d.]+ of 255 levels, and 2 are allowed"):
        export_merged(model, tmp_path / "out", inputs=tmp_path / "photos")
    assert export_merged(model, tmp_path / "out").differences[0].agreement == 1


def test_a_pipeline_with_another_class_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lamina.export import merged

    model = model_of("split", "olora", tmp_path, **{"training.epochs": 4})
    right = merged.processor_of

    def other(opened: Opened) -> dict[str, Any]:
        return {**right(opened), "image_mean": [-9.0, 9.0, 0.5]}

    monkeypatch.setattr(merged, "processor_of", other)
    with pytest.raises(ModelError, match=r"pipeline\(\) of transformers names .* clearly"):
        export_merged(model, tmp_path / "out")


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
    model = model_of("split", "finetune", tmp_path, **{"method.rank": 3}, **CONSOLIDATED)
    done = export_peft(model, tmp_path / "out")
    assert "refitted" in json.loads((tmp_path / "out" / "export.json").read_text())
    tensors = load_file(done.path / "adapter_model.safetensors")
    ranks = {len(value) for name, value in tensors.items() if "lora_A" in name}
    assert max(ranks) <= 6
