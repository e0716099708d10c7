"""The first thing anyone runs: four methods on digits, compared, and what is more than the floor visibly worth it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.end_to_end.conftest import Command

from lamina.cli import demo, tables
from lamina.maths.metrics import AccuracyMatrix
from lamina.record import CostRecord, MethodRecord, Record, StreamRecord

DIRECTORIES = {"finetune": "finetune", "inflora": "inflora", "frozen + LDA": "frozen-LDA", "lamina": "lamina"}


def run_demo(lamina: Command, out: Path) -> dict[str, Any]:
    """The figures of each method, after a look at what is said and written."""
    said = lamina("demo", "--out", out)
    assert said.code == 0, said.err
    page = out / "report.html"
    assert page.is_file()
    lines = said.out.splitlines()
    assert "minutes" in lines[0]
    assert lines[-1] == f"Open the report: {page}"
    for title in ("method", "final accuracy", "forgetting"):
        assert title in said.out
    measured = {}
    for number, (name, directory) in enumerate(DIRECTORIES.items(), 1):
        record = json.loads((out / directory / "results.json").read_text())
        measured[name] = record["metrics"]
        accuracy = f"{measured[name]['final_accuracy']:.1%}"
        assert (
            lines[number] == f"{number}/4 {name}: final accuracy {accuracy}, {record['cost']['seconds']['total']:.0f} s"
        )
        assert name in page.read_text(encoding="utf-8")
    assert "learnt" not in said.err, "one line for each method, no more"
    again = lamina("demo", "--out", out)
    assert again.out == said.out, "a finished demo is shown again"
    return measured


def test_demo_in_short(lamina: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"training.epochs": 1, "data.per_class": 20, "evaluation.per_class": 10}.items():
        monkeypatch.setitem(demo.SETTINGS, key, value)
    run_demo(lamina, tmp_path / "demo")


@pytest.mark.slow
def test_demo_shows_forgetting_and_its_cure(lamina: Command, tmp_path: Path) -> None:
    measured = run_demo(lamina, tmp_path / "demo")
    assert measured["inflora"]["final_accuracy"] >= measured["finetune"]["final_accuracy"] + 0.05
    assert measured["inflora"]["forgetting"] < measured["finetune"]["forgetting"]
    assert measured["lamina"]["final_accuracy"] >= 0.9
    assert measured["frozen + LDA"]["final_accuracy"] >= 0.9
    assert measured["lamina"]["forgetting"] < 0.05


def test_the_table_fits_a_narrow_terminal_however_long_a_run_was(capsys: pytest.CaptureFixture[str]) -> None:
    whole = AccuracyMatrix(np.array([[10, 0], [10, 10]]), np.array([[10, 0], [10, 10]]))
    run = Record(
        name="prototype",
        method=MethodRecord(name="prototype"),
        stream=StreamRecord(),
        matrix=whole,
        task_aware=whole,
        cost=CostRecord(seconds={"total": 123456.7}, trainable_parameters=123456),
    )
    tables.print_records([run])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(lines) == 2
    assert all(len(line) <= 80 for line in lines)
