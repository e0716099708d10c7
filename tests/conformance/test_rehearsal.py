"""Rehearsal, for every method, through its unchanged file: a run that is stopped ends in the same bits, frozen weights stay,
training moves what it moves without rehearsal, and nothing but kept old examples is seen. A method without training refuses it.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conformance.cases import CASES, HOME, Killed, World, make_loop, may_be_idle, newest, run_in_pieces, state
from tests.tiny import ImageTable, Watched

from lamina.config import RehearsalConfig
from lamina.engine import checkpoint
from lamina.engine.loop import Interrupted, Loop
from lamina.engine.rehearsal import keep
from lamina.errors import MethodError
from lamina.methods import METHODS

ON = RehearsalConfig(per_class=2)
TRAINED = sorted(name for name, method in METHODS.items() if method.trains_on(1))
MIXED, TEXT = World("fused_vit", "mixed"), World("bert", "domain")
on_every_method = pytest.mark.parametrize("name", TRAINED)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "fsync", lambda _: None)


def rehearsing(name: str, folder: Path, world: World = HOME, **more: Any) -> Loop:
    if world.scenario not in METHODS[name].scenarios:
        pytest.skip(f"{name} does not fit {world.scenario}-incremental streams")
    return make_loop(name, world, folder, rehearsal=ON, **more)


@pytest.mark.parametrize("world", [HOME, MIXED, TEXT], ids=str)
@on_every_method
def test_stopped_in_the_middle_of_a_task_it_ends_in_the_same_bits(name: str, world: World, tmp_path: Path):
    whole = rehearsing(name, tmp_path / "whole", world)
    whole.run()
    for task in (1, 2):
        folder = tmp_path / f"stopped in {task}"
        loop = rehearsing(name, folder, world)
        loop.should_stop = lambda loop=loop, task=task: (loop.position.task, loop.position.step) == (task, 1)
        with pytest.raises(Interrupted):
            loop.run()
        at = checkpoint.read_json(newest(folder) / "state.json")["position"]
        assert at == {"task": task, "phase": "train", "step": 1}
        again = rehearsing(name, folder, world)
        again.restore()
        again.run()
        assert state(newest(folder)) == state(newest(tmp_path / "whole"))


def test_killed_again_and_again_it_ends_in_the_same_bits(tmp_path: Path):
    whole = rehearsing("inflora", tmp_path / "whole")
    whole.run()

    def process(number: int) -> Loop:
        moments = iter(range(10**6))

        def perhaps(_: object) -> None:
            if next(moments) == 9 + number % 13:
                raise Killed

        return rehearsing("inflora", tmp_path / "pieces", seconds=0.0, on_save=perhaps, on_event=perhaps)

    _, processes = run_in_pieces(process)
    assert processes > 3
    assert state(newest(tmp_path / "pieces")) == state(newest(tmp_path / "whole"))


@pytest.mark.parametrize("world", [HOME, MIXED], ids=str)
@on_every_method
def test_training_moves_what_it_moves_without_rehearsal_and_frozen_weights_stay(
    name: str, world: World, tmp_path: Path
):
    loop, fresh = rehearsing(name, tmp_path, world), rehearsing(name, tmp_path / "fresh", world).learner
    for number, task in enumerate(loop.stream):
        loop.run(until="train")
        before = {key: value.clone() for key, value in loop.learner.tensors().items()}
        loop.run(until="end")
        after = loop.learner.tensors()
        moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
        allowed = [pattern.replace("TASK", re.escape(task.name)) for pattern in CASES[name].moves]
        assert all(any(re.fullmatch(pattern, key) for pattern in allowed) for key in moved), f"{number}: {moved}"
        for pattern in allowed:
            left = {key for key in after if re.fullmatch(pattern, key)} - moved
            assert all(may_be_idle(key, CASES[name].idle, after) for key in left), f"{number}: {left}"
        loop.run(until="evaluate")
        loop.run(until="begin" if number < 2 else "done")
    for path, layer in loop.learner.layers.items():
        assert torch.equal(layer.base_oi, fresh.layers[path].base_oi), path
    bare = dict(fresh.backbone.module.named_parameters())
    for parameter, value in loop.learner.backbone.module.named_parameters():
        assert ".live." in parameter or torch.equal(value, bare[parameter]), parameter


@on_every_method
def test_it_changes_training_from_the_second_task_on(name: str, tmp_path: Path):
    loops = [rehearsing(name, tmp_path / "on"), make_loop(name, HOME, tmp_path / "off")]
    for task, same in ((0, True), (1, False)):
        for loop in loops:
            loop.run(until="end")
        on, off = (loop.learner.tensors() for loop in loops)
        assert all(torch.equal(on[key], off[key]) for key in on) == same, task
        for loop in loops:
            loop.run(until="begin")
    assert len(loops[0].state.losses) == len(loops[1].state.losses), "as many steps"


def test_of_old_tasks_nothing_but_the_kept_examples_is_seen(tmp_path: Path):
    loop = rehearsing("finetune", tmp_path)
    table = loop.stream[0].train.table
    assert isinstance(table, ImageTable)
    watched = Watched(table)
    for task in loop.stream:
        object.__setattr__(task.train, "table", watched)
    kept = set[int]()
    try:
        for task in loop.stream:
            watched.rows.clear()
            loop.run(until="evaluate")
            assert watched.rows == set(task.train.rows_n.tolist()) | kept
            kept |= set(keep(task.train, ON.per_class).rows_n.tolist())
            loop.run(until="begin" if task is not loop.stream[2] else "done")
    finally:
        for task in loop.stream:
            object.__setattr__(task.train, "table", table)
    assert len(kept) == 2 * 6


@pytest.mark.parametrize("name", sorted(METHODS))
def test_off_it_changes_no_bit(name: str, tmp_path: Path):
    make_loop(name, HOME, tmp_path / "without").run()
    make_loop(name, HOME, tmp_path / "off", rehearsal=RehearsalConfig()).run()
    assert state(newest(tmp_path / "off")) == state(newest(tmp_path / "without"))


@pytest.mark.parametrize("name", sorted(METHODS.keys() - set(TRAINED)))
def test_a_method_without_training_refuses_it(name: str, tmp_path: Path):
    with pytest.raises(
        MethodError, match=rf"rehearsal\.per_class = 2 does not go with method {name!r}.*Leave it at 0\."
    ):
        rehearsing(name, tmp_path)
    make_loop(name, HOME, tmp_path, rehearsal=RehearsalConfig())
