"""A run with rehearsal, as people use it: less is forgotten, and the record, the report and the command say what is kept."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.end_to_end.conftest import QUICK, Command

DIGITS = (
    *("run", "--data=digits", "--method=finetune", "--tasks=5", "--image-size=32", "--per-class=60", "--epochs=5"),
    *("--lr=0.02", "--set=training.head_lr=0.02", "--set=training.batch_size=32", "--set=data.augment=none"),
    *("--set=stream.first=3", "--set=backbone.blocks=[6,7,8]", "--set=evaluation.per_class=20"),
    *("--set=precision=fp32", "--set=threads=1"),
)


def record_in(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


@pytest.mark.slow
def test_with_ten_examples_per_class_clearly_less_is_forgotten(lamina: Command, tmp_path: Path) -> None:
    found = {}
    for kept in (0, 10):
        said = lamina(*DIGITS, "--rehearsal", kept, "--out", tmp_path / str(kept))
        assert said.code == 0, said.err
        assert ("Training examples kept: 60 (at most 10 per class and task)" in said.out) == (kept > 0)
        found[kept] = record_in(tmp_path / str(kept))
    without, rehearsed = found[0], found[10]
    assert rehearsed["metrics"]["final_accuracy"] > without["metrics"]["final_accuracy"] + 0.2
    assert rehearsed["metrics"]["forgetting"] < without["metrics"]["forgetting"] - 0.05
    assert (without["name"], rehearsed["name"]) == ("finetune", "finetune-rehearsal")
    assert not without["cost"].keys() & {"kept_examples", "kept_per_class"}
    assert (rehearsed["cost"]["kept_examples"], rehearsed["cost"]["kept_per_class"]) == (60, 10)
    assert rehearsed["cost"]["steps"] == without["cost"]["steps"]
    page = (tmp_path / "10" / "report.html").read_text(encoding="utf-8")
    assert "keeps 60 training examples" in page


def test_what_rehearsal_does_not_go_with(lamina: Command, photos: Path, tmp_path: Path) -> None:
    run = ("run", "--data", photos, "--tasks", 2, "--rehearsal", 3, "--out", tmp_path / "run", *QUICK)
    message = lamina.refused(*run, "--method", "prototype")
    assert "rehearsal.per_class = 3 does not go with method 'prototype': it trains nothing" in message
    message = lamina.refused(*run, "--method", "taskarithmetic", "--jobs", 2)
    assert "jobs = 2: with rehearsal.per_class = 3" in message
    assert "Leave jobs at 1, or rehearsal.per_class at 0." in message
    assert not (tmp_path / "run").exists()


def test_a_finished_run_cannot_go_on_in_parallel(lamina: Command, photos: Path, tmp_path: Path) -> None:
    run = (
        "run",
        "--data",
        photos,
        "--tasks",
        2,
        "--rehearsal",
        3,
        "--method",
        "color",
        "--out",
        tmp_path / "run",
        *QUICK,
    )
    assert lamina(*run).code == 0
    (tmp_path / "run" / "results.json").unlink()
    assert "jobs = 2: with rehearsal.per_class = 3" in lamina.refused("resume", tmp_path / "run", "--jobs", 2)
    assert lamina("resume", tmp_path / "run").code == 0


@pytest.mark.parametrize(("name", "more"), [("finetune", True), ("prototype", False)])
def test_a_methods_own_storage_is_told_from_that_of_rehearsal(lamina: Command, name: str, more: bool) -> None:
    shown = lamina("methods", name).out
    assert ("Stored examples: none; --rehearsal N adds N per class." in shown) == more
    assert ("Stored examples: none." in shown) != more
    assert "With `run --rehearsal N` it stores N more examples per class." in lamina("methods").out
