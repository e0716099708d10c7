"""A model that learns task by task comes to the same bits as a run over the stream."""

from pathlib import Path

import pytest
import torch
from tests.conformance.cases import CASES
from tests.models import CLASSES, FEW, SMALL, backbone, images, small

from lamina import runs
from lamina.engine import checkpoint
from lamina.methods import METHODS
from lamina.model import Model

TASKS = (CLASSES[:2], CLASSES[2:4], CLASSES[4:])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return backbone(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("data") / "images.parquet")


def settings(method: str, **more: object) -> dict[str, object]:
    return {
        **SMALL,
        **FEW.get(method, {}),
        **{f"method.{key}": value for key, value in CASES[method].settings.items()},
        **more,
    }


def run_over(out: Path, base: Path, data: Path, method: str, given: dict[str, object]) -> Path:
    given = given | {
        "method.name": method,
        "backbone.name": str(base),
        "data.source": str(data),
        "stream.tasks": len(TASKS),
    }
    runs.create(runs.load_config(None, sorted(given.items(), key=lambda item: item[0] != "method.name")), out)
    return out


@pytest.mark.parametrize("per_class", [0, 3], ids=["alone", "rehearsal"])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_learnt_task_by_task_equals_a_run(
    method: str, per_class: int, base: Path, data: Path, tmp_path: Path
) -> None:
    if per_class and not METHODS[method].trains_on(1):
        pytest.skip("a method that trains nothing rehearses nothing")
    given = settings(method, **{"rehearsal.per_class": per_class})
    out = run_over(tmp_path / "run", base, data, method, given)
    model = small(tmp_path / "model", base, method, given, task_count=len(TASKS))
    for number, classes in enumerate(TASKS, 1):
        model.learn(data, name=f"task-{number:02d}", classes=classes, force=True)
    assert model.store.facts().head is not None
    ours = model.store.state(str(model.facts.head))[1]
    loaded = checkpoint.load_newest(out / "checkpoints")
    assert loaded is not None
    for group in ("learner", "memory", "consolidation"):
        theirs = loaded.tensors.get(group, {})
        assert ours[group].keys() == theirs.keys()
        assert [name for name in theirs if not torch.equal(ours[group][name], theirs[name])] == []


def test_a_run_opens_as_a_model_and_goes_on(base: Path, data: Path, tmp_path: Path) -> None:
    out = run_over(tmp_path / "run", base, data, "lamina", settings("lamina"))
    record = runs.read_record(out)
    model = Model.from_run(out, tmp_path / "model", settings={"probes.per_class": 2})
    assert model.classes == tuple(sorted(CLASSES))
    assert [task.name for card in model.cards for task in card.tasks] == ["task-01", "task-02", "task-03"]
    figures = model.evaluate(data).figures
    assert {name: (counts.correct, counts.total) for name, counts in figures.classes.items()} == {
        one.name: (one.correct, one.total) for one in record.classes
    }
    assert sum(one.correct for one in record.classes) > 12
    more = images(tmp_path / "more.parquet", CLASSES[:2], seed=9)
    learnt = model.learn(more, force=True)
    assert learnt.gate is not None
    assert learnt.gate.unmeasured == ("task-01", "task-02", "task-03")
    assert model.cards[-1].tasks[0].new_classes == ()
    assert len(model.cards[-1].class_names) == len(CLASSES)
