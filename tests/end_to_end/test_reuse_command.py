"""A run that reuses what is computed below its adapters leaves nothing behind, however it ends."""

import json
import os
from pathlib import Path

import pytest
from tests.end_to_end.conftest import QUICK, Command

from lamina.engine.loop import Loop
from lamina.errors import TrainingError
from lamina.reuse import Reuse

REUSING = (*QUICK, "--set=backbone.blocks=[7,8]", "--set=backbone.reuse_mb=20", "--set=data.augment=none", "--tasks=2")


def open_in(folder: Path) -> list[str]:
    """Files there that this process holds, with a name or without."""
    links = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:  # the one that listed them
            continue
    return [link for link in links if link.startswith(str(folder))]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """How many files were held after each batch that came through."""
    counts: list[int] = []
    hidden = Reuse.hidden

    def watched(self: Reuse, *given: object) -> object:
        found = hidden(self, *given)
        counts.append(len([name for name in open_in(tmp_path / "out") if name.endswith("(deleted)")]))
        return found

    monkeypatch.setattr(Reuse, "hidden", watched)
    return counts


def test_a_finished_run_leaves_no_file(lamina: Command, tmp_path: Path, photos: Path, held: list[int]) -> None:
    said = lamina("run", "--data", photos, *REUSING, "--out", tmp_path / "out")
    assert said.code == 0, said
    assert set(held) == {1}
    assert open_in(tmp_path / "out") == []
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json",
        "environment.json",
        "checkpoints",
        "events.jsonl",
        "results.json",
        "report.html",
        "lock",
    }
    assert json.loads((tmp_path / "out" / "results.json").read_text())["config"]["backbone"]["reuse_mb"] == 20
    again = lamina("evaluate", tmp_path / "out")
    assert again.code == 0, again
    assert open_in(tmp_path / "out") == []


def test_nor_does_one_that_fails(
    lamina: Command, tmp_path: Path, photos: Path, held: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = Loop._evaluate

    def fail(self: Loop, task: object) -> None:
        evaluate(self, task)
        raise TrainingError("made to fail")

    monkeypatch.setattr(Loop, "_evaluate", fail)
    assert "made to fail" in lamina.refused("run", "--data", photos, *REUSING, "--out", tmp_path / "out")
    assert set(held) == {1}
    assert open_in(tmp_path / "out") == []
