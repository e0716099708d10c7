"""Adapters that peft has trained, or lamina has exported, become tasks; those that cannot are refused by name."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.models import CLASSES, content, images
from tests.unit.backbones.test_families import ROWS
from tests.unit.export.worlds import taught, texts, with_tokenizer

from lamina.errors import LaminaError, MethodError, ModelError
from lamina.export import export_merged, export_peft, import_adapter
from lamina.export.checking import silently
from lamina.export.importing import ADDED, BY_END, REFUSED, ROUTED
from lamina.methods import METHODS
from lamina.model import GateRefused, Model, kept
from lamina.runs.setup import image_transform

NEW = ("eel", "fox")


def trained_by_peft(base: Path, out: Path, **more: Any) -> Path:
    """A LoRA of two classes with random weights, saved by plain peft."""
    from peft import LoraConfig, get_peft_model

    settings = {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["k_proj", "v_proj"],
        "modules_to_save": ["classifier"],
    } | more
    with silently(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = transformers.AutoModelForImageClassification.from_pretrained(base, num_labels=2)
        tuned = get_peft_model(model, LoraConfig(**settings))
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.05)
        tuned.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, an adapter of it, a model that has learnt two tasks, and data of the new classes."""
    folder = tmp_path_factory.mktemp("import")
    ROWS["vit"].raw().save_pretrained(folder / "base")
    taught(folder / "m", folder / "base")
    return {
        "base": folder / "base",
        "adapter": trained_by_peft(folder / "base", folder / "adapter"),
        "m": folder / "m",
        "data": images(folder / "new.parquet", NEW),
    }


def copied(world: dict[str, Path], what: str, to: Path) -> Path:
    import shutil

    shutil.copytree(world[what], to)
    return to


def test_every_method_says_whether_it_can_take_one():
    assert {*BY_END, *ADDED, *REFUSED} == METHODS.keys()


@pytest.mark.parametrize("rslora", [False, True])
def test_the_first_task_predicts_as_plain_peft_does(world: dict[str, Path], tmp_path: Path, rslora: bool):
    from peft import PeftModel

    adapter = trained_by_peft(
        world["base"], tmp_path / "a", use_rslora=rslora, rank_pattern={"layers.0.attention.k_proj": 2}
    )
    model = Model.create(
        tmp_path / "m", backbone=str(world["base"]), method="olora", settings={"precision": "fp32", "device": "cpu"}
    )
    learnt = import_adapter(tmp_path / "m", adapter, name="new", classes=NEW)
    assert (learnt.card.version, learnt.card.imported_from, learnt.gate) == (1, str(adapter), None)
    pixels = [np.random.default_rng(n).integers(0, 256, (20, 20, 3), np.uint8) for n in range(4)]
    predictor = Model(tmp_path / "m").predictor()
    batch, _ = predictor.read(pixels)
    with silently(), torch.no_grad():
        base = transformers.AutoModelForImageClassification.from_pretrained(world["base"], num_labels=2)
        wanted_bj = PeftModel.from_pretrained(base, adapter).eval()(batch.inputs["pixel_values"]).logits
    assert torch.allclose(predictor.scores(batch), wanted_bj, atol=1e-5)
    assert model.history[-1]["event"] == "imported"
    assert "new" in (tmp_path / "m" / "README.md").read_text()


def weights_in_use(model: Path) -> dict[str, torch.Tensor]:
    """The weight of every adapted layer, with all updates that act on any input."""
    layers = Model(model).predictor().learner.layers
    return {path: layer.effective().clone() for path, layer in layers.items()}


def updates_in(adapter: Path) -> dict[str, torch.Tensor]:
    """What peft adds to a layer, from the files: alpha is twice the rank."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    start = "base_model.model.vit."
    return {
        name.removeprefix(start).removesuffix(".lora_A.weight"): 2 * tensors[name.replace("_A.", "_B.")] @ down_ri
        for name, down_ri in tensors.items()
        if name.endswith("lora_A.weight")
    }


def acts(model: Path, before: dict[str, torch.Tensor], adapter: Path) -> bool:
    """Whether the model's weights have changed by what peft adds, and by nothing else."""
    after, updates = weights_in_use(model), updates_in(adapter)
    assert updates.keys() <= before.keys()
    none = torch.zeros(())
    return all(torch.allclose(after[path] - before[path], updates.get(path, none), atol=1e-6) for path in before)


@pytest.mark.parametrize("method", [*BY_END, *ADDED])
def test_every_such_method_goes_on_learning(method: str, world: dict[str, Path], tmp_path: Path):
    needed = BY_END.get(method)
    taught(tmp_path / "m", world["base"], method=method)
    before = weights_in_use(tmp_path / "m")
    if needed:
        with pytest.raises(ModelError, match="--data"):
            import_adapter(tmp_path / "m", world["adapter"], name="new", classes=NEW)
    data = world["data"] if needed else None
    learnt = import_adapter(tmp_path / "m", world["adapter"], name="new", classes=NEW, data=data, force=True)
    model = Model(tmp_path / "m")
    assert model.version == 3
    assert model.classes == (*CLASSES[:4], *NEW)
    assert (learnt.card.figures.accuracy is not None) == bool(needed)
    if method not in ROUTED:
        assert acts(tmp_path / "m", before, world["adapter"])
    saved = load_file(world["adapter"] / "adapter_model.safetensors")
    block = list(model.predictor().learner.head.blocks)[-1]
    assert torch.equal(block.weight, saved["base_model.model.classifier.weight"])
    assert torch.equal(block.bias, saved["base_model.model.classifier.bias"])
    model.learn(images(tmp_path / "more.parquet", CLASSES[:2], seed=7), name="more", force=True)
    assert [card.name for card in model.cards] == ["task 0", "task 1", "new", "more"]
    assert model.rollback("task 1").name == "task 1"


def test_a_routed_adapter_acts_alone(world: dict[str, Path], tmp_path: Path):
    taught(tmp_path / "m", world["base"], method="color")
    import_adapter(tmp_path / "m", world["adapter"], name="new", classes=NEW, data=world["data"], force=True)
    from peft import PeftModel

    predictor = Model(tmp_path / "m").predictor()
    colours = [np.random.default_rng(CLASSES.index(name)).integers(0, 256, (4, 4, 3)) for name in (*NEW, *CLASSES[:4])]
    batch, _ = predictor.read([np.kron(colour, np.ones((5, 5, 1))).astype(np.uint8) for colour in colours])
    scores_bj = predictor.scores(batch)
    routed_b = scores_bj[:, -2] > -torch.inf
    assert 0 < int(routed_b.sum()) < len(colours), "some are routed to it, and some are not"
    with silently(), torch.no_grad():
        base = transformers.AutoModelForImageClassification.from_pretrained(world["base"], num_labels=2)
        wanted_bj = PeftModel.from_pretrained(base, world["adapter"]).eval()(batch.inputs["pixel_values"]).logits
    assert torch.allclose(scores_bj[routed_b, -2:], wanted_bj[routed_b], atol=1e-5)
    assert (scores_bj[routed_b, :-2] == -torch.inf).all()


@pytest.mark.parametrize(("classifier", "merging"), [("ncm", "none"), ("lda", "ema"), ("lda+ridge", "none")])
def test_a_unified_classifier_is_fitted_with_the_new_classes(
    classifier: str, merging: str, world: dict[str, Path], tmp_path: Path
):
    settings = {
        "consolidation.classifier": classifier,
        "consolidation.layers": 2,
        "consolidation.merging": merging,
        "consolidation.drift": "linear+local",
        "consolidation.random_features": 32,
    }
    taught(tmp_path / "m", world["base"], method="finetune", settings=settings)
    before = weights_in_use(tmp_path / "m")
    with pytest.raises(ModelError, match=f"the {classifier.replace('+', '.')} classifier needs the statistics.*--data"):
        import_adapter(tmp_path / "m", world["adapter"], name="new", classes=NEW)
    adapter = trained_by_peft(world["base"], tmp_path / "headless", modules_to_save=None)
    learnt = import_adapter(tmp_path / "m", adapter, name="new", classes=NEW, data=world["data"], force=True)
    assert learnt.card.figures.accuracy is not None
    assert learnt.card.kept["probes"].examples == 6
    assert acts(tmp_path / "m", before, adapter) == (merging == "none"), "a merged weight is an average"
    predictor = Model(tmp_path / "m").predictor()
    assert predictor.labels == (*CLASSES[:4], *NEW)
    found = predictor.outcomes(kept.unpacked(Model(tmp_path / "m").store.kept(learnt.card.folder, "probes"),
                                             image_transform(predictor.config, predictor.backbone)))  # fmt: skip
    assert found.correct == 6, "the new classes differ in colour"


def test_what_lamina_exports_it_imports(world: dict[str, Path], tmp_path: Path):
    """The exported adapter as the only task of another model: the same scores, also for texts."""
    for family, kind, pooling in (("vit", "image", "auto"), ("bert", "text", "cls")):
        here = tmp_path / family
        here.mkdir()
        raw, base = ROWS[family].raw(), here / "base"
        with_tokenizer(raw, base) if kind == "text" else raw.save_pretrained(base)
        settings = {"backbone.pooling": pooling, "data.max_length": 16}
        taught(here / "m", base, kind, settings=settings, again=False)
        export_peft(here / "m", here / "peft")
        more = {"precision": "fp32", "device": "cpu"} | settings
        Model.create(here / "other", backbone=str(base), method="olora", settings=more)
        import_adapter(here / "other", here / "peft", name="all", classes=CLASSES[:4])
        file = (
            images(here / "i.parquet", CLASSES[:4]) if kind == "image" else texts(here / "t.csv", CLASSES[:4], seed=9)
        )
        first, second = (Model(here / name).evaluate(file).figures for name in ("m", "other"))
        assert first.accuracy == second.accuracy
        inputs = [np.random.default_rng(n).integers(0, 256, (20, 20, 3), np.uint8) for n in range(4)]
        given = inputs if kind == "image" else ["sun rain", "soup", "goal team ball", "bread and salt"]
        predictors = [Model(here / name).predictor() for name in ("m", "other")]
        wanted_bj, found_bj = (one.scores(one.read(given)[0]) for one in predictors)
        assert torch.allclose(wanted_bj, found_bj, atol=1e-3 * float(wanted_bj.std(0).mean()))
        merged = export_merged(here / "other", here / "merged")
        assert merged.differences[0].agreement == 1


def test_a_fused_layer_gives_every_role_its_outputs(tmp_path: Path):
    base = with_tokenizer(ROWS["modernbert"].raw(), tmp_path / "base")
    settings = {"backbone.pooling": "cls", "consolidation.classifier": "lda", "data.max_length": 16}
    taught(tmp_path / "m", base, "text", settings=settings, again=False)
    taught(tmp_path / "q", base, "text", settings=settings | {"backbone.targets": ["q"]}, again=False)
    # Of its own, the head of this base has no bias before the classifier.
    with pytest.raises(ModelError, match=r"for another head.*--with-base"):
        export_peft(tmp_path / "m", tmp_path / "peft")
    export_peft(tmp_path / "m", tmp_path / "peft", with_base=True)
    data = texts(tmp_path / "t.csv", CLASSES[:4])
    learnt = import_adapter(tmp_path / "m", tmp_path / "peft", name="new", classes=CLASSES[:4], data=data, force=True)
    assert learnt.card.tasks[0].new_classes == ()
    with pytest.raises(ModelError, match=r"updates layers.0.attn.Wqkv, and the model adapts q in its blocks only"):
        import_adapter(tmp_path / "q", tmp_path / "peft", name="new", classes=CLASSES[:4], data=data)


def test_the_gate_measures_what_an_adapter_changes(world: dict[str, Path], tmp_path: Path):
    adapter = copied(world, "adapter", tmp_path / "loud")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: 50 * v if "lora_B" in k else v for k, v in tensors.items()}, adapter / "adapter_model.safetensors")
    taught(tmp_path / "m", world["base"], settings={"training.epochs": 6, "gate.negative_flips": 0.0})
    before = content(tmp_path / "m")
    with pytest.raises(GateRefused, match="--force"):
        import_adapter(tmp_path / "m", adapter, name="new", classes=NEW)
    assert content(tmp_path / "m") == before
    assert import_adapter(tmp_path / "m", adapter, name="new", classes=NEW, force=True).card.forced


# -- refused --------------------------------------------------------------------------------------------------------------


def config(**changed: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))

    return edit


def weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        file = path / "adapter_model.safetensors"
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file)

    return apply


def raw(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(data) and None


def linked(name: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        (path / name).rename(path.parent / name)
        (path / name).symlink_to(path.parent / name)

    return edit


def first(tensors: dict[str, torch.Tensor], end: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(end))


def pickled(path: Path) -> None:
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")


def header(path: Path) -> None:
    file = path / "adapter_model.safetensors"
    file.write_bytes(struct.pack("<Q", 10**10) + file.read_bytes()[8:])


def beyond(path: Path) -> None:
    """Offsets that lie outside the file."""
    text = json.dumps({"x": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}).encode()
    (path / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)


A, B = "lora_A.weight", "lora_B.weight"
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "another base by name": (config(base_model_name_or_path="google/other"), "its base is 'google/other'.*--same-base"),
    "no base": (config(base_model_name_or_path=None), "its base is None"),
    "another base of the same last name": (
        config(base_model_name_or_path="/nowhere/other-project/base"),
        "its base is '/nowhere/other-project/base'.*--same-base",
    ),
    "a base that is no name": (config(base_model_name_or_path="\0"), "its base is"),
    "a base with a name that is too long": (config(base_model_name_or_path="x" * 10_000), "its base is"),
    "missing half": (weights(lambda t: t.pop(first(t, B))), "has lora_A.weight and lacks lora_B.weight"),
    "missing layer, and another one excluded": (
        lambda path: (
            weights(lambda t: [t.pop(first(t, A)), t.pop(first(t, B))])(path),
            config(exclude_modules=["layers.1.attention.k_proj"])(path),
        ),
        "the weights lack the update of 'layers.0.attention.k_proj'",
    ),
    "target_modules as a regular expression": (config(target_modules=r".*\.k_proj"), "only a list of names is read"),
    "no target_modules": (config(target_modules=None), "target_modules is None"),
    "exclude_modules as a regular expression": (config(exclude_modules=".*"), "exclude_modules is '..'"),
    "missing layer": (weights(lambda t: [t.pop(first(t, A)), t.pop(first(t, B))]), "the weights lack the update of"),
    "no such target": (
        config(target_modules=["k_proj", "v_proj", "w_proj"]),
        "the weights lack any layer of that name",
    ),
    "empty": (weights(lambda t: [t.pop(k) for k in list(t) if "lora" in k]), "the weights lack"),
    "left over": (
        weights(lambda t: t.update({"base_model.model.vit.extra": torch.ones(2)})),
        "left-over tensor 'vit.extra'",
    ),
    "left-over factor": (
        weights(
            lambda t: t.update({"base_model.model.vit.layers.0.attention.k_proj.lora_magnitude_vector": torch.ones(2)})
        ),
        "left-over tensor",
    ),
    "other architecture": (
        weights(
            lambda t: [
                t.update({k.replace("vit.layers", "vit.encoder.layer"): t.pop(k)}) for k in list(t) if "lora" in k
            ]
        ),
        "no linear layer of this model's base",
    ),
    "no prefix": (weights(lambda t: t.update({"x": torch.ones(2)})), "does not begin with 'base_model.model.'"),
    "wrong inputs": (weights(lambda t: t.update({first(t, A): torch.ones(3, 7)})), "belongs to another base"),
    "wrong outputs": (weights(lambda t: t.update({first(t, B): torch.ones(9, 3)})), "belongs to another base"),
    "no matrix": (weights(lambda t: t.update({first(t, B): torch.ones(3)})), "belongs to another base"),
    "NaN": (weights(lambda t: t[first(t, A)].fill_(float("nan"))), "NaN or infinity"),
    "infinity": (weights(lambda t: t["base_model.model.classifier.bias"].fill_(float("inf"))), "NaN or infinity"),
    "a number beyond float32": (
        weights(lambda t: t.update({first(t, A): torch.full((3, 32), 1e300, dtype=torch.float64)})),
        "too large for float32",
    ),
    "a product beyond float32": (
        weights(lambda t: t.update({first(t, A): torch.full((3, 32), 1e30), first(t, B): torch.full((32, 3), 1e30)})),
        "larger than float32 can hold",
    ),
    "rank 0": (
        weights(lambda t: t.update({first(t, A): torch.ones(0, 32), first(t, B): torch.ones(32, 0)})),
        "has rank 0",
    ),
    "absurd rank": (
        weights(lambda t: t.update({first(t, A): torch.ones(500, 32), first(t, B): torch.ones(32, 500)})),
        "has rank 500",
    ),
    "rank of the configuration": (config(r=4), "has rank 3.*says 4"),
    "alpha": (config(lora_alpha="6"), "lora_alpha of"),
    "alpha 0": (config(lora_alpha=0), "lora_alpha of"),
    "DoRA": (config(use_dora=True), "DoRA"),
    "bias": (config(bias="all"), "bias is 'all'"),
    "transposed": (config(fan_in_fan_out=True), "fan_in_fan_out"),
    "layers_pattern": (config(layers_pattern="layers"), "layers_pattern"),
    "layers_to_transform": (config(layers_to_transform=[0]), "layers_to_transform"),
    "unknown field": (config(use_tomorrows_lora=True), "use_tomorrows_lora"),
    "pissa": (config(init_lora_weights="pissa_niter_4"), "changes the weights of the base"),
    "unknown initialisation": (config(init_lora_weights="tomorrow"), "or is unknown; allowed are True, False"),
    "initialisation of no kind": (config(init_lora_weights={"a": 1}), "init_lora_weights is"),
    "regular expression": (config(rank_pattern={"(a+)+$": 3}), "no regular expressions"),
    "another type": (config(peft_type="IA3"), "peft_type is 'IA3'; only LORA"),
    "no type": (config(peft_type=["LORA"]), "only LORA"),
    "pickle": (pickled, "pickle can run any code"),
    "linked weights": (linked("adapter_model.safetensors"), "symbolic link"),
    "linked settings": (linked("adapter_config.json"), "symbolic link"),
    "header": (header, "its header says 10000000000 bytes"),
    "short": (raw("adapter_model.safetensors", b"\x01"), "is damaged"),
    "offsets": (beyond, "is damaged"),
    "noise": (raw("adapter_model.safetensors", b"\x20" + bytes(7) + b"{" * 40), "is damaged"),
    "no JSON": (raw("adapter_config.json", b"{r: 3"), "is not JSON"),
    "deep JSON": (raw("adapter_config.json", b"[" * 100_000), "is not JSON"),
    "no object": (raw("adapter_config.json", b"[1]"), "must hold an object"),
    "no text": (raw("adapter_config.json", b"\xff\xfe\x00"), "is not JSON"),
    "huge JSON": (raw("adapter_config.json", b" " * (2**20 + 1)), "at most 1048576 are read"),
    "no settings": (lambda path: (path / "adapter_config.json").unlink(), "is missing"),
    "integers": (
        weights(lambda t: t.update({first(t, A): torch.ones(3, 32, dtype=torch.int64)})),
        "stored as I64, not as floats",
    ),
    "another export": (raw("export.json", b'{"base": {"sha256": "0123456789ab"}}'), "with the hash 0123456789ab"),
    "damaged export": (raw("export.json", b'{"base": 3}'), "export.json is damaged"),
    "outputs": (
        weights(lambda t: t.update({"base_model.model.classifier.weight": torch.ones(3, 32)})),
        "--classes names 2 classes",
    ),
    "other features": (
        weights(lambda t: t.update({"base_model.model.classifier.weight": torch.ones(2, 64)})),
        "reads other features",
    ),
    "a norm in the classifier": (
        weights(lambda t: t.update({"base_model.model.classifier.norm.weight": torch.ones(32)})),
        "its classifier has classifier.norm.weight besides",
    ),
    "no classifier": (
        weights(lambda t: [t.pop(k) for k in list(t) if "classifier" in k]),
        "holds no classifier.weight.*modules_to_save",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_an_adapter_that_cannot_be_imported_is_refused_by_name(case: str, world: dict[str, Path], tmp_path: Path):
    edit, told = HOSTILE[case]
    adapter = copied(world, "adapter", tmp_path / "adapter")
    edit(adapter)
    before = content(world["m"])
    with pytest.raises(ModelError, match=told):
        import_adapter(world["m"], adapter, name="new", classes=NEW)
    assert content(world["m"]) == before


def test_layers_may_be_excluded(world: dict[str, Path], tmp_path: Path):
    without = {"exclude_modules": ["layers.1.attention.v_proj"]}
    adapter = trained_by_peft(world["base"], tmp_path / "adapter", **without)
    taught(tmp_path / "m", world["base"])
    before = weights_in_use(tmp_path / "m")
    import_adapter(tmp_path / "m", adapter, name="new", classes=NEW, force=True)
    assert "layers.1.attention.v_proj" not in updates_in(adapter)
    assert acts(tmp_path / "m", before, adapter)


def test_a_head_that_reads_the_mean_is_not_for_a_class_token(tmp_path: Path):
    """BEiT's setting says what its classifier reads, and both features have the same width."""
    ROWS["beit"].raw().save_pretrained(tmp_path / "base")
    adapter = trained_by_peft(tmp_path / "base", tmp_path / "adapter")
    for pooling in ("cls", "mean"):
        settings = {"backbone.pooling": pooling, "backbone.targets": ["k", "v"], "precision": "fp32"}
        Model.create(tmp_path / pooling, backbone=str(tmp_path / "base"), method="olora", settings=settings)
    assert import_adapter(tmp_path / "mean", adapter, name="new", classes=NEW).card.version == 1
    with pytest.raises(ModelError, match="reads other features than the model's, of width 32 by pooling 'cls'"):
        import_adapter(tmp_path / "cls", adapter, name="new", classes=NEW)


def test_classes_of_an_export_keep_their_names_and_order(world: dict[str, Path], tmp_path: Path):
    taught(tmp_path / "m", world["base"], again=False)
    export_peft(tmp_path / "m", tmp_path / "peft")
    settings = {"precision": "fp32", "device": "cpu"}
    Model.create(tmp_path / "other", backbone=str(world["base"]), method="olora", settings=settings)
    for wrong in (CLASSES[3::-1], (*CLASSES[:3], "eel")):
        with pytest.raises(ModelError, match=f"outputs are ant,bee,cat,dog, and --classes names {','.join(wrong)}"):
            import_adapter(tmp_path / "other", tmp_path / "peft", name="all", classes=wrong)
    import_adapter(tmp_path / "other", tmp_path / "peft", name="all", classes=CLASSES[:4])


def test_other_weights_at_the_place_that_an_adapter_names_are_found(world: dict[str, Path], tmp_path: Path):
    other = tmp_path / "base"  # of the same name
    transformers.ViTModel(ROWS["vit"].raw().config, add_pooling_layer=False).save_pretrained(other)
    adapter = trained_by_peft(other, tmp_path / "adapter")
    with pytest.raises(ModelError, match="whose weights are not those of"):
        import_adapter(world["m"], adapter, name="new", classes=NEW)


@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_cannot_take_one_say_why(method: str, world: dict[str, Path], tmp_path: Path):
    Model.create(tmp_path / "m", backbone=str(world["base"]), method=method)
    with pytest.raises(MethodError, match=f"{method!r} cannot take an adapter.*{REFUSED[method][:20]}"):
        import_adapter(tmp_path / "m", world["adapter"], name="new", classes=NEW)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"name": "task 0"}, "learnt a task named 'task 0' already"),
        ({"classes": ("eel", "eel")}, "once, none of them empty"),
        ({"classes": ("eel", " ")}, "once, none of them empty"),
        ({"adapter": "nowhere"}, "is no folder with an adapter"),
    ],
)
def test_a_request_that_cannot_be(asked: dict[str, Any], told: str, world: dict[str, Path]):
    given = {"name": "new", "classes": NEW, "adapter": world["adapter"]} | asked
    with pytest.raises(LaminaError, match=told):
        import_adapter(world["m"], given.pop("adapter"), **given)
