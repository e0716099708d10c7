"""Killed wherever it was, a run resumed ends in the bits of the run that was never killed."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.faults.processes import (
    PHASES,
    SAVED_FILES,
    Moment,
    Sight,
    assert_same_bits,
    kill_and_resume,
    small_run,
)

FREQUENT = 0.05
"""Seconds between saves within a task: every few steps. The unbroken run never saves there; how often a run saves is no
part of its result."""


def test_killed_three_times(tmp_path: Path, unbroken: Callable[[str], Path]) -> None:
    out = tmp_path / "run"
    moments = [Moment(0, "train", 5, delay=0.03), Moment(1, "end", files=3), Moment(2, "begin")]
    kills = kill_and_resume(out, small_run(out, "inflora", checkpoint_seconds=FREQUENT), moments)
    assert len(kills) >= 2
    assert kills[0].task == 0
    assert_same_bits(out, unbroken("inflora"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["inflora", "finetune"])
def test_killed_twenty_times(tmp_path: Path, unbroken: Callable[[str], Path], method: str) -> None:
    draw = random.Random(f"kills of {method}")
    kills: list[Sight] = []
    moments = [moment for task in range(3) for moment in moments_of_task(draw, task)]
    for attempt, often in enumerate((FREQUENT, 0.0, FREQUENT, 0.0)):
        out = tmp_path / f"run{attempt}"
        kills += kill_and_resume(out, small_run(out, method, checkpoint_seconds=often), moments)
        assert_same_bits(out, unbroken(method))
        unhit = set(PHASES) - {kill.phase for kill in kills if kill.saving is None}
        saves = sum(kill.saving is not None for kill in kills)
        if len(kills) >= 20 and not unhit and saves >= 3:
            break
        # What was met too late by the one that watches is tried again.
        moments = [Moment(0, phase) for phase in PHASES if phase in unhit]
        moments += [Moment(1, "train", files=draw.randint(0, SAVED_FILES - 1)) for _ in range(3 - saves)]
        moments += [Moment(2, "train", draw.randint(1, 8)) for _ in range(20 - len(kills) - len(moments))]
    assert len(kills) >= 20
    assert not unhit
    assert saves >= 3


def moments_of_task(draw: random.Random, task: int) -> list[Moment]:
    """Seven, in the order they come: each phase, twice in training, twice inside a save."""
    first, later = sorted(draw.sample(range(1, 9), 2))
    return [
        Moment(task, "begin", delay=draw.uniform(0, 0.05)),
        Moment(task, "train", first, delay=draw.uniform(0, 0.1)),
        Moment(task, "train", first, files=draw.randint(0, SAVED_FILES - 1)),
        Moment(task, "train", later),
        Moment(task, "end"),
        Moment(task, "evaluate", delay=draw.uniform(0, 0.1)),
        Moment(task, "evaluate", files=draw.randint(0, SAVED_FILES)),
    ]
