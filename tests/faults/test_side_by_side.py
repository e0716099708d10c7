"""Tasks trained side by side: the bits of training them one after another, whatever is killed on the way."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.faults.processes import Lamina, assert_same_bits, finish, newest, small_run, start

from lamina import runs
from lamina.engine.loop import Event, Interrupted
from lamina.errors import RunError
from lamina.record import read
from lamina.runs import side_by_side
from lamina.runs.directory import begun

SMALLER: dict[str, Any] = {
    "stream.tasks": 2,
    "backbone.image_size": 16,
    "backbone.blocks": [0],
    "training.epochs": 10,
    "precision": "fp32",
    "threads": 1,
    "checkpoint_seconds": 0,
}
"""Two tasks of 10 steps, saved after each."""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Class folders of a few images of noise, which need less to be loaded than digits do."""
    draw = np.random.default_rng(0)
    for label in range(4):
        (tmp_path / "photos" / f"class{label}").mkdir(parents=True)
        for i in range(8):
            pixels = draw.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / f"class{label}" / f"{i}.png")
    return tmp_path / "photos"


def position_of(out: Path, number: int) -> tuple[str, int]:
    """Phase and step of the newest state that the process of a task has saved."""
    try:
        position = json.loads((newest(side_by_side.place(out, number)) / "state.json").read_text())["position"]
    except (FileNotFoundError, ValueError):  # none yet, or it went while it was read
        return "nothing", 0
    return position["phase"], position["step"]


def process_of(out: Path, number: int) -> int:
    found = re.search(r"process (\d+)", (side_by_side.place(out, number) / "lock").read_text())
    assert found is not None
    return int(found[1])


def test_one_of_two_processes_killed(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "PAUSE", 0.01)
    out, whole = tmp_path / "run", tmp_path / "whole"
    given = [("method", {"name": "taskarithmetic", "memory_per_class": 0}), ("data.source", str(photos))]
    given += SMALLER.items()
    runs.create(runs.load_config(None, given), whole)
    halted: list[int] = []

    def strike(_: object, event: Event) -> None:
        """The first task's process is halted while it trains, and killed when the other one has ended."""
        phase, step = position_of(out, 0)
        if not halted and phase == "train" and step > 0:
            halted.append(process_of(out, 0))
            os.kill(halted[0], signal.SIGSTOP)
        if halted and event.phase == "parallel" and event.done == 1:
            os.kill(halted[0], signal.SIGKILL)

    with pytest.raises(RunError, match="'task-01' ended early: it was killed by SIGKILL"):
        runs.create(runs.load_config(None, [*given, ("jobs", 2)]), out, strike)
    left = position_of(out, 0)
    assert left[0] == "train"

    with pytest.raises(Interrupted):  # as in a process whose run is gone
        runs.train_task(out, 0, parent=-1, watch=lambda *_: None)
    assert position_of(out, 0) == left

    told: list[Event] = []
    record = runs.resume(out, lambda _, event: told.append(event))
    assert {(e.done, e.total) for e in told if e.phase == "parallel"} == {(1, 2), (2, 2)}
    assert not [e for e in told if e.workers and "task-02" in e.workers], "what is trained is not trained again"
    assert_same_bits(out, whole)
    assert not (out / "parallel").exists()
    logged = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [(e["phase"], e["done"]) for e in logged if e["phase"] == "parallel"] == [("parallel", 2)]
    expected = read(whole)
    assert record.cost.parallel_seconds > 0
    assert expected.cost.parallel_seconds is None
    assert all(task.seconds > 0 for task in record.lineage)
    assert record.cost.seconds["train"] == pytest.approx(sum(task.seconds for task in record.lineage), abs=1e-2)
    clock = {"seconds": None, "finished": None}
    assert [task.model_copy(update=clock) for task in record.lineage] == [
        task.model_copy(update=clock) for task in expected.lineage
    ]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["taskarithmetic", "color"])
def test_the_run_itself_killed_and_stopped(tmp_path: Path, unbroken: Callable[[str], Path], method: str) -> None:
    out = tmp_path / "run"
    process = start(*small_run(out, method, jobs=2, checkpoint_seconds=0))
    wait_until(process, lambda: steps_saved(out) > 0)
    workers = [process_of(out, n) for n in range(2) if (side_by_side.place(out, n) / "lock").exists()]
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while any(is_at_work(pid) for pid in workers):
        assert time.monotonic() < deadline, "a process outlives its run"
        time.sleep(0.05)

    before = steps_saved(out)
    process = start("resume", out)
    wait_until(process, lambda: steps_saved(out) > before)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 130, err
    assert "Traceback" not in err

    process = start("resume", out, "--jobs", "3")
    code, _, err = finish(process)
    assert code == 0, err
    assert begun(out).config.jobs == 3, "for later commands too"
    assert_same_bits(out, unbroken(method))


def steps_saved(out: Path) -> int:
    return sum(position_of(out, number)[1] for number in range(3))


def wait_until(process: Lamina, come: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not come():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_at_work(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
