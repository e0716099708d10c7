"""What must hold of a model whatever is asked of it, in which order, and whatever was in its way."""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.models import CLASSES, SMALL, backbone, images, small

from lamina import runs
from lamina.errors import ConfigError, DataError, LaminaError, ModelError
from lamina.model import GateRefused, Model, Predictor, store

LOOSE = {"gate.task_drop": None, "gate.negative_flips": None}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return backbone(tmp_path_factory.mktemp("vit"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return images(tmp_path / "images.parquet")


@pytest.fixture
def model(tmp_path: Path, base: Path, data: Path) -> Model:
    """It has learnt ant and bee, then cat and dog."""
    made = small(tmp_path / "model", base, "finetune", {"probes.per_class": 2, **LOOSE})
    made.learn(data, name="a", classes=CLASSES[:2])
    made.learn(data, name="b", classes=CLASSES[2:4])
    return made


# -- settings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"backbone.image_size": 32}, {"consolidation.classifier": "lda"}, {"method.rank": 3}, {"precision": "bf16"}],
)
def test_what_weights_depend_on_is_chosen_once(
    model: Model, base: Path, data: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    empty = small(tmp_path / "empty", base)
    for work in (
        lambda: empty.learn(data, settings=settings),
        lambda: model.learn(data, name="c", settings=settings),
        lambda: model.configure(settings),
        lambda: (model.rollback(None), model.configure(settings)),
    ):
        with pytest.raises(ConfigError, match="depend on it"):
            work()
    section = {"backbone": {"name": str(base), "image_size": 32}}
    with pytest.raises(ConfigError, match=r"backbone\.image_size"):
        model.configure(section)


def test_another_backbone_is_refused(model: Model, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model.facts.config.backbone.name, other)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ModelError, match="has a backbone of its own"):
        model.learn(data, name="c", settings={"backbone.name": str(other)})
    with pytest.raises(ModelError, match="are not those of this model"):
        model.configure({"backbone.name": str(other)})
    with pytest.raises(ModelError, match="are not those of this model"):
        swapped(model, other, lambda: model.learn(data, name="c", classes=CLASSES[4:]))


def swapped(model: Model, other: Path, work: Any) -> None:
    """Do something while other weights lie in the place of the model's."""
    place = Path(model.facts.config.backbone.name)
    place.rename(place.with_name("aside"))
    shutil.copytree(other, place)
    try:
        work()
    finally:
        shutil.rmtree(place)
        place.with_name("aside").rename(place)


def test_a_run_keeps_its_settings_and_its_weights(base: Path, data: Path, tmp_path: Path) -> None:
    given = {
        "method.name": "finetune",
        "backbone.name": str(base),
        "data.source": str(data),
        "stream.tasks": 3,
        **SMALL,
    }
    out = tmp_path / "run"
    record = runs.create(runs.load_config(None, list(given.items())), out)
    with pytest.raises(ConfigError, match="depend on it"):
        Model.from_run(out, tmp_path / "m", settings={"backbone.image_size": 32})
    model = Model.from_run(out, tmp_path / "model")
    learnt = [task.accuracy for card in model.cards for task in card.tasks]
    assert learnt == np.diag(record.matrix.accuracy_ij).tolist()
    with pytest.raises(ModelError, match="Name 'task-03'"):
        model.rollback("task-01")
    file = base / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\0\0\0\1")
    try:
        with pytest.raises(ModelError, match="are not those of the run"):
            Model.from_run(out, tmp_path / "other")
    finally:
        file.write_bytes(whole)


# -- the gate -------------------------------------------------------------------------------------------------------------


def test_the_first_task_must_be_accurate_too(base: Path, data: Path, tmp_path: Path) -> None:
    model = small(
        tmp_path / "m", base, settings={"gate.new_accuracy": 1.0, "training.lr": 1e-9, "training.head_lr": 1e-9}
    )
    with pytest.raises(GateRefused, match="new task reaches"):
        model.learn(data)
    assert model.version == 0


def test_a_limit_may_change_after_a_refusal(model: Model, data: Path) -> None:
    with pytest.raises(GateRefused):
        model.learn(
            data, name="c", classes=CLASSES[4:], settings={"gate.slowdown": 1.0, "gate.new_accuracy": 1.0, **IDLE}
        )
    learnt = model.learn(data, name="c", classes=CLASSES[4:], settings={"gate.new_accuracy": 0.0, **IDLE})
    assert not learnt.card.forced


IDLE = {"training.lr": 1e-9, "training.head_lr": 1e-9}


def test_a_refused_task_of_another_version_does_not_wait(model: Model, data: Path) -> None:
    with pytest.raises(GateRefused):
        model.learn(data, name="c", classes=CLASSES[4:], settings={"gate.new_accuracy": 1.0, **IDLE})
    assert model.waiting() is not None
    model.rollback("a")
    assert model.waiting() is None
    model.rollback("b")
    assert model.waiting() is not None


def test_the_outcome_of_one_probe_is_not_that_of_another(model: Model, data: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"p{number}").mkdir()
    images(tmp_path / "p1" / "probe.parquet", CLASSES[:2], seed=5)
    images(tmp_path / "p2" / "probe.parquet", CLASSES[:2], seed=6, noise=120)
    found = []
    for number in (1, 2):
        with pytest.raises(GateRefused) as refused:
            model.learn(
                data,
                name="c",
                classes=CLASSES[4:],
                probe=tmp_path / f"p{number}" / "probe.parquet",
                settings={"gate.new_accuracy": 1.0, **IDLE},
            )
        found.append(refused.value.gate.tasks[-1])
    again = Model(model.path)
    for number, change in enumerate(found, 1):
        figures = again.evaluate(tmp_path / f"p{number}" / "probe.parquet").figures
        assert change.before == figures.accuracy


def test_only_what_a_probe_measures_is_measured(model: Model, data: Path, tmp_path: Path) -> None:
    model.forget_kept()
    probe = images(tmp_path / "ants.parquet", CLASSES[:1])
    learnt = model.learn(data, name="c", classes=CLASSES[4:], probe=probe)
    assert learnt.gate is not None
    assert learnt.gate.unmeasured == ("b",)
    assert [change.name for change in learnt.gate.classes] == ["ant"]


# -- going on -------------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process is gone."""


def crash(*_: Any, **__: Any) -> None:
    raise Crash


def test_a_crash_after_the_version_counts(model: Model, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "note", crash)
        with pytest.raises(Crash):
            model.learn(data, name="c", classes=CLASSES[4:5])
    assert model.version == 3
    model.learn(data, name="d", classes=CLASSES[5:])
    assert [card.name for card in model.cards] == ["a", "b", "c", "d"]
    assert [event["event"] for event in model.history] == ["created", "learnt", "learnt", "recovered", "learnt"]


def test_a_disk_that_is_full_at_the_last_moment(model: Model, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_checked", full)
        with pytest.raises(ModelError, match="is as it was before"):
            model.learn(data, name="c", classes=CLASSES[4:])
    assert model.version == 2
    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "note", full)
        assert model.learn(data, name="c", classes=CLASSES[4:]).card.version == 3
    assert model.version == 3


def test_discard_begins_anew(model: Model, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "add", crash)
        with pytest.raises(Crash):
            model.learn(data, name="c", classes=CLASSES[4:])
    checkpoints = model.path / "work" / "checkpoints"
    for file in checkpoints.glob("*/state.json"):
        file.write_text("{")
    with pytest.raises(LaminaError, match="no checkpoint is whole"):
        model.learn(data, name="c", classes=CLASSES[4:])
    model.learn(data, name="c", classes=CLASSES[4:], discard=True)
    assert model.version == 3


def test_an_older_model_json_costs_no_version(model: Model, data: Path) -> None:
    older = (model.path / "model.json").read_bytes()
    model.learn(data, name="c", classes=CLASSES[4:])
    (model.path / "model.json").write_bytes(older)
    model.configure({"probes.per_class": 3})
    names = sorted(path.name for path in (model.path / "tasks").iterdir())
    assert names == ["0001-a", "0002-b", "unclaimed-0003-c"]


def test_a_damaged_version_does_not_block_the_way_back(model: Model) -> None:
    (model.path / "tasks" / "0002-b" / "card.json").write_text("{")
    with pytest.raises(ModelError, match="lamina rollback"):
        model.predictor()
    model.rollback("a")
    assert model.classes == CLASSES[:2]


def test_folders_that_are_named_stay_inside(model: Model, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "probes.safetensors").write_bytes(b"mine")
    content = json.loads((model.path / "model.json").read_text())
    del content["sha256"]
    store.write_checked(model.path / "model.json", content | {"versions": ["../../victim"]})
    with pytest.raises(ModelError, match="is not the name of a folder"):
        model.forget_kept()
    assert (victim / "probes.safetensors").is_file()
    store.write_checked(model.path / "model.json", content | {"format": 99})
    with pytest.raises(ModelError, match="has format 99"):
        Model(model.path)


def test_events_in_any_script(model: Model) -> None:
    model.store.note("said", text="eins\u2028zwei")
    with (model.path / "events.jsonl").open("ab") as log:
        log.write('{"event": "Ä'.encode()[:-1])
    assert model.history[-1]["text"] == "eins\u2028zwei"
    model.store.note("after")
    assert model.history[-1]["event"] == "after"


def test_a_model_of_a_method_that_is_another_one_now_is_refused(base: Path, tmp_path: Path) -> None:
    model = small(tmp_path / "m", base, "lamina")
    content = store.read_checked(model.path / "model.json")
    content["config"]["method"] = {"name": "lamina", "rank": 10}
    store.write_checked(model.path / "model.json", content)
    with pytest.raises(ModelError, match=r"was made before lamina 0\.3, when 'lamina' was a different method"):
        Model(model.path)


@pytest.mark.parametrize("method", ["inflora", "fsa"])
def test_pruned_versions_cannot_come_back_and_nothing_else_changes(
    base: Path, data: Path, tmp_path: Path, method: str
) -> None:
    model = small(tmp_path / "m", base, method, {"method.rank": 3, **LOOSE})
    for name, classes in (("a", CLASSES[:2]), ("b", CLASSES[2:4]), ("c", CLASSES[4:])):
        model.learn(data, name=name, classes=classes)
    before = model.evaluate(data)
    assert model.prune(2) > 0
    assert Model(model.path).evaluate(data) == before
    model.rollback("b")
    model.rollback("c")
    with pytest.raises(ModelError, match="was pruned"):
        model.rollback("a")
    assert model.prune(2) == 0
    model.learn(images(tmp_path / "more.parquet", CLASSES[:2], seed=4), name="d")
    assert len(model.cards) == 4


# -- use ------------------------------------------------------------------------------------------------------------------


def test_a_class_is_asked_for_once(model: Model, data: Path) -> None:
    with pytest.raises(ModelError, match="more than once"):
        model.learn(data, name="c", classes=["eel", "eel"])


def test_what_was_trained_on_is_not_measured_on(base: Path, tmp_path: Path) -> None:
    table = pq.read_table(images(tmp_path / "all.parquet", CLASSES[:3], train=8, test=2)).drop_columns("split")
    pq.write_table(table, tmp_path / "unsplit.parquet")
    model = small(tmp_path / "m", base)
    learnt = model.learn(tmp_path / "unsplit.parquet")
    figures = model.evaluate(tmp_path / "unsplit.parquet").figures
    assert figures == learnt.card.figures
    assert sum(counts.total for counts in figures.classes.values()) == 6


def test_a_task_needs_examples_to_measure(base: Path, tmp_path: Path) -> None:
    """So every learnt task has an accuracy."""
    file = images(tmp_path / "few.parquet", CLASSES[:2], train=1, test=0)
    with pytest.raises(DataError, match="task 'few' of 'few' has no test example"):
        small(tmp_path / "m", base, "finetune", LOOSE).learn(file, name="few")


def test_data_with_nothing_to_train_on_is_measured(model: Model, tmp_path: Path) -> None:
    file = images(tmp_path / "held.parquet", CLASSES[:3], train=0, test=4)
    figures = model.evaluate(file).figures
    assert sum(counts.total for counts in figures.classes.values()) == 12


def test_threads_share_a_predictor(base: Path, data: Path, tmp_path: Path) -> None:
    model = small(tmp_path / "m", base, "lamina", {"method.rank": 3, **LOOSE})
    for number, classes in enumerate((CLASSES[:3], CLASSES[3:])):
        model.learn(data, name=str(number), classes=classes)
    predictor: Predictor = model.predictor()
    payload = pq.read_table(data)["image"][0].as_py()
    alone, wrong = predictor.predict([payload])[0], list[str]()

    def ask() -> None:
        for _ in range(30):
            if predictor.predict([payload])[0] != alone:
                wrong.append("another prediction")

    asking = threading.Thread(target=ask)
    asking.start()
    while asking.is_alive():
        model.evaluate(data)
    asking.join()
    assert wrong == []


def test_the_seconds_of_a_task_are_all_of_them(model: Model) -> None:
    seconds = model.cards[-1].seconds
    assert seconds["total"] == pytest.approx(
        sum(value for phase, value in seconds.items() if phase != "total"), abs=0.01
    )
    assert {"load", "train", "begin", "end"} <= seconds.keys()
