"""Trackers, each read back from the files of its own library; and one that fails, which ends no run."""

import importlib.util
import json
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.end_to_end.conftest import Command

from lamina import record, runs
from lamina.runs import tracking

SMALL = {
    "data.source": "digits",
    "data.per_class": 12,
    "backbone.image_size": 32,
    "stream.tasks": 2,
    "method.name": "finetune",
    "training.epochs": 2,
    "training.batch_size": 8,
    "tracking.every": 2,
    "tracking.project": "digits-project",
}


def run_with(folder: Path, *names: str, monkeypatch: pytest.MonkeyPatch) -> tuple[record.Record, list[str]]:
    """Runs with these trackers. Returns the record, and the notes that were told."""
    for name in names:
        if name in tracking.NEEDS and importlib.util.find_spec(tracking.NEEDS[name]) is None:
            pytest.skip(f"needs {name}: pip install 'lamina[{name}]'")
    for variable in ("MLFLOW_TRACKING_URI", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    config = runs.load_config(None, list((SMALL | {"tracking.to": list(names)}).items()))
    notes: list[str] = []
    made = runs.create(config, folder / "run", lambda _, event: notes.append(event.note) if event.note else None)
    return made, notes


def same_as(made: record.Record, final: Mapping[str, float]) -> None:
    accuracy = made.matrix.accuracy_ij
    assert final["accuracy/task-01"] == pytest.approx(accuracy[1, 0], abs=1e-6)
    assert final["accuracy/task-02"] == pytest.approx(accuracy[1, 1], abs=1e-6)
    assert final["average accuracy"] == pytest.approx(made.metrics.final_accuracy, abs=1e-6)
    assert final["forgetting"] == pytest.approx(made.metrics.forgetting, abs=1e-6)
    assert final["tasks learnt"] == 2


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made, notes = run_with(tmp_path, "tensorboard", monkeypatch=monkeypatch)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert not any("failed" in note for note in notes), notes
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    scalars = {tag: read.Scalars(tag) for tag in read.Tags()["scalars"]}
    same_as(made, {tag: values[-1].value for tag, values in scalars.items()})
    steps = made.cost.steps or 0
    assert [one.step for one in scalars["loss"]] == [
        step for step in range(1, steps + 1) if (step - 1) % (steps // 2) % 2
    ]
    assert scalars["tasks learnt"][-1].step == steps


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made, notes = run_with(tmp_path, "mlflow", monkeypatch=monkeypatch)
    from mlflow.tracking import MlflowClient

    assert not any("failed" in note for note in notes), notes
    client = MlflowClient(f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}")
    (experiment,) = (one for one in client.search_experiments() if one.name == "digits-project")
    (found,) = client.search_runs([experiment.experiment_id])
    same_as(made, found.data.metrics)
    assert found.data.params["training.epochs"] == "2"
    assert found.info.status == "FINISHED"
    assert len(client.get_metric_history(found.info.run_id, "tasks learnt")) == 2


def records_of(content: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log behind a header of 7 bytes, which is what W&B writes offline."""
    at, part = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last
            yield part
            part = b""


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made, notes = run_with(tmp_path, "wandb", monkeypatch=monkeypatch)
    from wandb.proto import wandb_internal_pb2

    assert not any("failed" in note for note in notes), notes
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    final = dict[str, Any]()
    for data in records_of(file.read_bytes()):
        line = wandb_internal_pb2.Record()
        line.ParseFromString(data)
        final |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in line.history.item}
    same_as(made, final)


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(
        "TRACKIO_DIR", str(tmp_path / "own")
    )  # read when it is imported, which another test may have done
    made, notes = run_with(tmp_path, "trackio", monkeypatch=monkeypatch)
    import trackio

    assert not any("failed" in note for note in notes), notes
    folder = Path(trackio.utils.TRACKIO_DIR)
    (file,) = folder.glob("digits-project.db")
    with sqlite3.connect(file) as base:
        lines = [json.loads(text) for (text,) in base.execute("select metrics from metrics order by id")]
    same_as(made, {key: value for line in lines for key, value in line.items()})


class Failing:
    """A tracker that fails at a moment."""

    def __init__(self, moment: str) -> None:
        self.moment, self.calls = moment, list[str]()

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name == self.moment:
            raise OSError("no space left")

    def begin(self, name: str, settings: Mapping[str, Any]) -> None:
        self._called("begin")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._called("log")

    def end(self) -> None:
        self._called("end")


@pytest.mark.parametrize("moment", ["begin", "log", "end"])
def test_a_tracker_that_fails_ends_no_run(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    failing = Failing(moment)
    monkeypatch.setattr(tracking, "NEEDS", {"tensorboard": "lamina"})
    monkeypatch.setitem(tracking.TRACKERS, "tensorboard", lambda project, folder: failing)
    monkeypatch.setattr("tests.end_to_end.test_tracking.SMALL", SMALL | {"training.epochs": 1})
    made, notes = run_with(tmp_path, "tensorboard", monkeypatch=monkeypatch)
    assert made.matrix.tasks == 2
    assert [n for n in notes if "tensorboard" in n] == [
        "tensorboard failed and is not used any more (OSError: no space left). The run goes on."
    ]
    assert failing.calls[-1] == moment


def test_what_is_not_installed_is_refused(lamina: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(tracking.NEEDS, "mlflow", "no_such_module")
    message = lamina.refused("run", "--data", "digits", "--track", "mlflow", "--out", "run")
    assert "tracking.to: mlflow is not installed. pip install 'lamina[mlflow]'" in message
    assert not (tmp_path / "run").exists()
    assert "tracking.to" in lamina.refused("run", "--data", "digits", "--track", "tensorbord")
