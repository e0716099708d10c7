"""What a method is: every law here holds for every method of the library, on every kind of backbone and stream."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conformance.cases import (
    CASES,
    HOME,
    TRAINING,
    WORLDS,
    Killed,
    Trail,
    World,
    make_loop,
    make_method,
    may_be_idle,
    newest,
    other_labels,
    run_in_pieces,
    state,
    stream,
    walk,
)
from torch import Tensor

from lamina.engine import checkpoint
from lamina.engine.evaluate import predict_all
from lamina.engine.loop import Interrupted, Loop
from lamina.engine.measure import Memos, Recalling
from lamina.engine.order import set_torch_seed
from lamina.engine.state import Position
from lamina.errors import CheckpointError, MethodError
from lamina.learner import Learner
from lamina.learner.head import class_scores
from lamina.methods import METHODS, table
from lamina.methods.base import SCENARIOS, describe
from lamina.types import SPLITS, Batch, Examples

on_every_method = pytest.mark.parametrize("name", [name for name in METHODS if name in CASES])
SHORT = ("fsa", "ranpac", "slca", "lamina")
"""Methods that treat all backbones alike. `make test` checks them in one world, `make test-slow` in all."""


def pairs(worlds: Sequence[World]) -> list[Any]:
    """Every method in every one of these worlds."""
    return [
        pytest.param(
            name, world, marks=[pytest.mark.slow] if name in SHORT and world != HOME else [], id=f"{name}-{world}"
        )
        for world in worlds
        for name in METHODS
        if name in CASES
    ]


everywhere = pytest.mark.parametrize(("name", "world"), pairs(WORLDS))
everywhere_in_fp32 = pytest.mark.parametrize(("name", "world"), pairs([w for w in WORLDS if w.dtype == torch.float32]))

Walks = Callable[[str, World], Trail]


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk():
    """Power cuts have their own tests (tests/unit/test_checkpoint.py); here the processes die, not the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def trail(tmp_path_factory: pytest.TempPathFactory) -> Walks:
    """One unbroken run per method and world, shared by all laws: they read it and leave it as it is."""
    walked: dict[tuple[str, World], Trail] = {}

    def find(name: str, world: World) -> Trail:
        if world.scenario not in METHODS[name].scenarios:
            pytest.skip(f"{name} does not fit {world.scenario}-incremental streams")
        if (name, world) not in walked:
            walked[name, world] = walk(name, world, tmp_path_factory.mktemp("trail"))
        return walked[name, world]

    return find


def everything(trail: Trail) -> Batch:
    """The test examples of all tasks, as the engine would hand them over."""
    examples = trail.stream.joint()[0].test
    return examples.batch(np.arange(len(examples)))


def whole(examples: Examples) -> list[Batch]:
    """As one batch."""
    return [examples.batch(np.arange(len(examples)))]


def scores(loop: Loop, batch: Batch) -> Tensor:
    with loop.learner.folded():
        return loop.method.predict(loop.learner, batch)


# -------------------------------------------------------------------------------------- the table and the record


def test_every_method_has_a_row_in_the_table():
    missing = sorted(METHODS.keys() ^ CASES.keys())
    assert not missing, f"{missing}: every method of lamina.methods.METHODS needs a row in tests/conformance/cases.py"


@on_every_method
def test_it_is_one_file_that_bears_its_name(name: str):
    method = METHODS[name]
    assert method.name == name
    assert method.__module__ == f"lamina.methods.{name}"
    assert method.config_type.__module__ == method.__module__


@on_every_method
def test_every_setting_is_explained_has_a_default_and_cannot_be_changed(name: str):
    config_type = METHODS[name].config_type
    for setting, field in config_type.model_fields.items():
        assert field.description, f"{setting} of {name} has no sentence under it"
        assert field.description.strip().endswith("."), f"{setting} of {name}: write a whole sentence"
        assert not field.is_required(), f"{setting} of {name} has no default"
    config = config_type()
    for setting in config_type.model_fields:
        with pytest.raises(ValueError, match="frozen"):
            setattr(config, setting, 1)
    with pytest.raises(ValueError, match="no_such_setting"):
        config_type(no_such_setting=1)


@on_every_method
def test_its_row_of_the_generated_table_is_complete_and_fits_on_a_screen(name: str):
    rows = table()
    assert [row["method"] for row in rows] == list(METHODS)
    row = next(row for row in rows if row["method"] == name)
    assert all(value.strip() for value in row.values())
    assert all(len(value) <= 100 for value in row.values())
    assert (row["examples"] != "none stored") == (METHODS[name].needs.stored_examples > 0)
    assert (row["task count"] != "not needed") == METHODS[name].needs.task_count


@on_every_method
def test_its_record_is_complete_and_plain_json(name: str):
    method, facts = METHODS[name], describe(METHODS[name])
    assert json.loads(json.dumps(facts)) == facts
    stated = ("title", "authors", "venue", "advice", "storage", "cost")
    assert facts.keys() >= {"name", "link", "scenarios", "settings", *stated}
    for fact in stated:
        assert facts[fact].strip(), f"{name} says nothing as its {fact}"
        assert "\n" not in facts[fact]
    assert re.fullmatch(r"https://\S+", facts["link"])
    assert re.search(r"\b(19|20)\d\d\b", facts["venue"]), "a venue has a year"
    assert facts["scenarios"]
    assert set(facts["scenarios"]) <= set(SCENARIOS)
    assert facts["stored_examples"] >= 0
    assert facts["cost"].startswith("Cost per training step")
    assert all(facts[fact].endswith(".") for fact in ("storage", "cost", "advice"))
    for departure in method.paper.departures:
        assert departure.what.strip()
        for switch in (departure.switch or "").split(", "):
            assert not switch or switch in facts["settings"], f"{name} has no setting {switch!r}"


@on_every_method
def test_an_unfit_scenario_is_refused_with_what_would_fit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Narrow(METHODS[name]):  # type: ignore[misc]
        scenarios = ("domain",)

    monkeypatch.setitem(METHODS, name, Narrow)
    with pytest.raises(MethodError, match=rf"{name!r} does not fit a class-incremental stream; .* for domain\."):
        make_loop(name, HOME, tmp_path)
    make_loop(name, World("vit", "domain"), tmp_path)


# ------------------------------------------------------------------------------------------------- what may move


@everywhere
def test_frozen_weights_stay_bit_for_bit(name: str, world: World, trail: Walks, tmp_path: Path):
    before, after = make_loop(name, world, tmp_path).learner, trail(name, world).loop.learner
    parameters, buffers = dict(before.backbone.module.named_parameters()), dict(before.backbone.module.named_buffers())
    own = {n for n in parameters if ".live." not in n}
    assert own
    assert own <= dict(after.backbone.module.named_parameters()).keys()
    for parameter, value in after.backbone.module.named_parameters():
        if parameter in own:
            assert torch.equal(value, parameters[parameter]), parameter
            assert not value.requires_grad, parameter
            assert value.grad is None, parameter
    for buffer, value in after.backbone.module.named_buffers():
        folded = buffer.endswith("weight_oi") or ".live." in buffer
        assert folded or torch.equal(value, buffers[buffer]), buffer
    assert after.layers
    for path, layer in after.layers.items():
        assert torch.equal(layer.base_oi, before.layers[path].base_oi), path
        assert torch.equal(layer.bias_o, before.layers[path].bias_o), path


@everywhere
def test_training_moves_what_is_declared_and_nothing_else(name: str, world: World, trail: Walks):
    found = trail(name, world)
    for number, task in enumerate(found.stream):
        if not METHODS[name].trains_on(number):
            assert not any((at["task"], at["phase"]) == (number, "train") for at in found.at)
            continue
        before = found.tensors(
            min(i for i, at in enumerate(found.at) if (at["task"], at["phase"]) == (number, "train"))
        )
        after = found.tensors(found.index(task=number, phase="end"))
        assert before["learner"].keys() == after["learner"].keys(), "training neither adds nor removes"
        moved = {key for key, value in after["learner"].items() if not torch.equal(value, before["learner"][key])}
        allowed = [pattern.replace("TASK", re.escape(task.name)) for pattern in CASES[name].moves]
        strays = {key for key in moved if not any(re.fullmatch(pattern, key) for pattern in allowed)}
        assert not strays, f"training {task.name!r} moved {sorted(strays)}"
        for pattern in allowed:
            meant = {key for key in after["learner"] if re.fullmatch(pattern, key)}
            assert meant, f"there is nothing like {pattern}"
            left = meant - moved
            assert all(may_be_idle(key, CASES[name].idle, after["learner"]) for key in left), f"{task.name}: {left}"


@everywhere
def test_what_is_finished_never_changes(name: str, world: World, trail: Walks):
    """The factors of a finished branch, and the outputs of a finished task, except for what is declared."""
    found, kept = trail(name, world), {}
    revised = "|".join(CASES[name].revises) or "nothing"
    for number, task in enumerate(found.stream):
        now = found.tensors(found.index(task=number, phase="evaluate"))["learner"]
        assert all(torch.equal(now[key], value) for key, value in kept.items())
        done = {k: v for k, v in now.items() if k.startswith(("finished/", f"head/{task.name}/"))}
        kept |= {k: v for k, v in done.items() if not re.fullmatch(revised, k)}
    assert CASES[name].revises or len(kept) >= 2 * len(found.stream)
    last = found.loop.learner.tensors()
    assert all(torch.equal(last[key], value) for key, value in kept.items())


# ----------------------------------------------------------------------------------------- stopping and going on


def die_when_saved_beyond(loop: Loop, start: Position, what: str) -> None:
    if what == "renamed" and loop.position != start:
        raise Killed


@everywhere
def test_every_saved_state_leads_to_the_next_one(name: str, world: World, trail: Walks, tmp_path: Path):
    """A new process that finds state k on disk comes to state k + 1 bit for bit: every phase boundary, every step."""
    found = trail(name, world)
    phases = {(at["task"], at["phase"]) for at in found.at}
    phases_of = ("train", "end", "evaluate")
    wanted = {(t, p) for t in range(3) for p in phases_of if METHODS[name].trains_on(t) or p != "train"}
    assert phases == wanted | {(1, "begin"), (2, "begin"), (2, "done")}
    for index, at in enumerate(found.at[:-1]):
        folder = tmp_path / str(index)
        loop = found.resumed(index, folder, seconds=0.0)
        assert asdict(loop.position) == at
        loop.on_save = partial(die_when_saved_beyond, loop, loop.position)
        with pytest.raises(Killed):
            loop.run()
        assert state(newest(folder)) == state(found.saved[index + 1]), f"from {at} to {found.at[index + 1]}"


def test_a_short_task_is_saved_three_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not between preparing and training, which saves by itself when it has gone on for long enough."""
    monkeypatch.setattr(checkpoint, "KEEP", 10**6)
    loop = make_loop("inflora", HOME, tmp_path, seconds=1e6)
    loop.run()
    saved = [checkpoint.read_json(path / "state.json")["position"] for path in sorted(tmp_path.iterdir())]
    tasks = len(loop.stream)
    expected = [(t, phase) for t in range(tasks) for phase in ("begin", "end", "evaluate")]
    assert [(at["task"], at["phase"]) for at in saved] == [*expected[1:], (tasks - 1, "done")]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one", "every"])
@on_every_method
def test_a_run_resumed_from_anywhere_ends_in_the_same_bits(name: str, every: bool, trail: Walks, tmp_path: Path):
    """Without the help of any further saved state: whatever the unbroken run carried in memory alone would show.

    From one state of every method, another one for each, or from all states."""
    found = trail(name, HOME)
    last = len(found.saved) - 1
    for index in range(last) if every else [list(METHODS).index(name) % last]:
        loop = found.resumed(index, tmp_path / str(index))
        loop.run()
        assert state(newest(tmp_path / str(index))) == state(found.saved[-1]), f"resumed from {found.at[index]}"


@on_every_method
def test_asked_to_stop_again_and_again_it_ends_in_the_same_bits(name: str, trail: Walks, tmp_path: Path):
    """Between steps and inside passes over the data: what was half done is done again from its start."""
    found = trail(name, HOME)

    def process(number: int) -> Loop:
        asked = iter(range(10**6))
        return make_loop(name, HOME, tmp_path, should_stop=lambda: next(asked) >= 4 + number % 4)

    loop, processes = run_in_pieces(process)
    assert processes > 1
    assert state(newest(tmp_path)) == state(found.saved[-1])
    assert loop.matrix.as_dict() == found.loop.matrix.as_dict()


@on_every_method
def test_killed_at_any_moment_again_and_again_it_ends_in_the_same_bits(name: str, trail: Walks, tmp_path: Path):
    """While saving, between steps, and at the end of passes; saving after every step."""
    found = trail(name, HOME)

    def process(number: int) -> Loop:
        moments = iter(range(10**6))

        def perhaps(_: object) -> None:
            if next(moments) == 9 + number % 13:
                raise Killed

        return make_loop(name, HOME, tmp_path, seconds=0.0, on_save=perhaps, on_event=perhaps)

    _, processes = run_in_pieces(process)
    assert processes > 3
    assert state(newest(tmp_path)) == state(found.saved[-1])


@on_every_method
def test_begin_and_end_can_be_done_twice(name: str, trail: Walks, tmp_path: Path):
    """From one saved state, each gives the same learner and memory, whatever was done half-way before."""
    found = trail(name, HOME)
    for number, phase in ((0, "begin"), (1, "begin"), (1, "end")):
        results = []
        for attempt in range(2):
            if (number, phase) == (0, "begin"):
                loop = make_loop(name, HOME, tmp_path / "nothing")
            else:
                index = found.index(task=number, phase=phase)
                loop = found.resumed(index, tmp_path / f"{number}{phase}{attempt}")
            task = found.stream[number]
            set_torch_seed(0, phase, task.name)
            getattr(loop.method, phase)(loop.learner, task, loop.pass_over(phase, task))
            results.append(loop.learner.tensors() | {f"memory/{k}": v for k, v in loop.method.memory.items()})
        first, second = results
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), f"{phase} of task {number}"


@dataclass
class Gone:
    """A table of examples that nothing may read."""

    what: str

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{self.what} is asked for its {name}")


@on_every_method
def test_a_task_is_learnt_from_its_own_training_and_validation_examples_and_what_is_stored(
    name: str, trail: Walks, tmp_path: Path
):
    """Nothing else reaches weights, statistics, or a choice: test examples and other tasks cannot be read meanwhile."""
    found = trail(name, HOME)
    loop = found.resumed(found.index(task=1, phase="begin"), tmp_path)

    def gone(examples: Examples, what: str) -> Examples:
        return replace(examples, table=Gone(what))

    loop.stream = replace(
        loop.stream,
        tasks=tuple(
            replace(
                task,
                **{
                    split: gone(task.split(split), f"{split} of {task.name}")
                    for split in SPLITS
                    if number != 1 or split == "test"
                },
            )
            for number, task in enumerate(loop.stream)
        ),
    )
    loop.run(until="evaluate")
    assert state(newest(tmp_path)) == state(found.saved[found.index(task=1, phase="evaluate")])


@everywhere
def test_a_saved_learner_predicts_the_same_bits(name: str, world: World, trail: Walks, tmp_path: Path):
    found = trail(name, world)
    loop = found.resumed(len(found.saved) - 1, tmp_path)
    ours, saved = loop.learner.tensors(), found.loop.learner.tensors()
    assert ours.keys() == saved.keys()
    assert all(torch.equal(ours[key], saved[key]) for key in saved)
    assert json.dumps(loop.learner.outline()) == json.dumps(found.loop.learner.outline()), "in the same order"
    batch = everything(found)
    assert torch.equal(scores(loop, batch), scores(found.loop, batch))


# -------------------------------------------------------------------------------------------------------- chance


@everywhere
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    name: str, world: World, trail: Walks, tmp_path: Path
):
    found = trail(name, world)
    make_loop(name, world, tmp_path / "same").run()
    assert state(newest(tmp_path / "same")) == state(found.saved[-1])
    other = make_loop(name, world, tmp_path / "other", seed=1)
    other.run()
    mine, theirs = found.loop.learner.tensors(), other.learner.tensors()
    assert mine.keys() == theirs.keys()
    equal = {key: torch.equal(mine[key], theirs[key]) for key in mine}
    if not CASES[name].random:
        assert all(equal.values())
    else:
        frozen, idle = "|".join(CASES[name].of_data), CASES[name].idle
        alike = {key for key, same in equal.items() if same and not re.fullmatch(frozen, key)}
        assert all(may_be_idle(key, idle, mine) for key in alike)


# ---------------------------------------------------------------------------------------------------- prediction


@everywhere_in_fp32
def test_a_prediction_does_not_depend_on_the_rest_of_its_batch(name: str, world: World, trail: Walks):
    found = trail(name, world)
    examples = found.stream.joint()[0].test
    n = len(examples)
    together_nr = scores(found.loop, examples.batch(np.arange(n)))
    assert together_nr.shape == (n, len(found.loop.learner.outputs))
    assert together_nr.dtype == torch.float32
    alone_nr = torch.cat([scores(found.loop, examples.batch(np.array([i]))) for i in range(n)])
    order = np.random.default_rng(0).permutation(n)
    permuted_nr = torch.empty_like(together_nr)
    permuted_nr[order] = scores(found.loop, examples.batch(order))
    for other_nr in (alone_nr, permuted_nr):
        torch.testing.assert_close(other_nr, together_nr, atol=1e-5, rtol=1e-5)
        assert torch.equal(other_nr.argmax(1), together_nr.argmax(1))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.selects])
def test_what_a_method_remembers_of_test_examples_saves_passes_and_changes_no_bit(
    name: str, trail: Walks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    passes = dict.fromkeys(("with", "without"), 0)
    compute = Learner.features

    def measured(memos: str) -> Path:
        def counted(learner: Learner, batch: Batch, layers: int = 1) -> Tensor:
            passes[memos] += loop.position.phase == "evaluate"
            return compute(learner, batch, layers)

        loop = make_loop(name, HOME, tmp_path / memos)
        measure = loop.measure
        if memos == "without":
            monkeypatch.setattr(loop, "measure", lambda: replace(measure(), memos=None))
        with monkeypatch.context() as patch:
            patch.setattr(Learner, "features", counted)
            loop.run()
        return newest(tmp_path / memos)

    assert state(measured("with")) == state(measured("without")) == state(trail(name, HOME).saved[-1])
    assert passes["with"] < 0.8 * passes["without"]


@everywhere_in_fp32
def test_folding_changes_the_cost_and_not_the_prediction(name: str, world: World, trail: Walks, tmp_path: Path):
    """In the middle of a task, where a branch is live and has moved; and after the last."""
    found = trail(name, world)
    for index in (found.index(task=1, phase="end"), len(found.saved) - 1):
        loop = found.resumed(index, tmp_path / str(index))
        batch = everything(found)
        weights = {path: layer.weight_oi.clone() for path, layer in loop.learner.layers.items()}
        with torch.no_grad():
            unfolded_br = loop.method.predict(loop.learner, batch)
        folded_br = scores(loop, batch)
        torch.testing.assert_close(folded_br, unfolded_br, atol=1e-4, rtol=1e-4)
        assert all(torch.equal(layer.weight_oi, weights[path]) for path, layer in loop.learner.layers.items()), "undone"


@everywhere
def test_prediction_gets_neither_the_task_nor_the_label(
    name: str, world: World, trail: Walks, monkeypatch: pytest.MonkeyPatch
):
    found = trail(name, world)
    seen: list[Batch] = []
    inner = found.loop.method.predict
    monkeypatch.setattr(
        found.loop.method, "predict", lambda learner, batch: (seen.append(batch), inner(learner, batch))[1]
    )
    for number, task in enumerate(found.stream):
        predict_all(found.loop.learner, found.loop.method, task.test, whole, task.name)
        found.loop.measure().predictions(number)
    assert len(seen) >= 2 * len(found.stream)
    assert all(vars(batch).keys() == {"inputs", "labels_b", "memo"} for batch in seen)
    assert all(batch.inputs.keys() <= {"pixel_values", "input_ids", "attention_mask"} for batch in seen)
    monkeypatch.undo()
    batch = everything(found)
    assert torch.equal(scores(found.loop, batch), scores(found.loop, other_labels(batch)))
    assert torch.equal(scores(found.loop, batch), scores(found.loop, replace(batch, labels_b=-1 - batch.labels_b)))
    remembered = []
    for task in found.stream:  # given the one task or the other
        memos: Memos = []
        recalling = Recalling(found.loop.method, memos)
        predict_all(found.loop.learner, recalling, found.stream[0].test, whole, task.name)
        ((own, _),) = memos
        remembered.append(own)
    assert all(one.keys() == remembered[0].keys() for one in remembered)
    assert all(torch.equal(one[what], remembered[0][what]) for one in remembered for what in one)


@everywhere
def test_predictions_are_the_best_outputs(name: str, world: World, trail: Walks):
    """The matrix's last row, counted by hand from the scores; in task-incremental streams among the task's outputs only."""
    found = trail(name, world)
    outputs = found.loop.learner.outputs
    assert [output.label for output in outputs] == [label for task in found.stream for label in task.classes]
    for number, task in enumerate(found.stream):
        examples = task.test
        batch = examples.batch(np.arange(len(examples)))
        best = [outputs[int(r)].label for r in scores(found.loop, batch).argmax(1)]
        with found.loop.learner.folded():
            aware_nj = found.loop.method.predict_task_aware(found.loop.learner, batch, task.name)
        own = [
            max((s, output.label) for s, output in zip(line, outputs, strict=True) if output.task == task.name)[1]
            for line in aware_nj
        ]
        counted = {
            which: sum(a == b for a, b in zip(given, examples.labels_n, strict=True))
            for which, given in (("best", best), ("own", own))
        }
        assert found.loop.state.task_aware.correct_ij[-1, number] == counted["own"]
        assert found.loop.matrix.correct_ij[-1, number] == counted["own" if world.scenario == "task" else "best"]


# --------------------------------------------------------------------------------------------- tasks side by side


@pytest.mark.parametrize("world", WORLDS, ids=str)
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.independent])
def test_tasks_said_to_be_independent_train_alone_to_the_same_bits(
    name: str, world: World, trail: Walks, tmp_path: Path
):
    found, folders = trail(name, world), {number: tmp_path / str(number) for number in range(3)}
    for number, folder in folders.items():
        alone = make_loop(name, world, folder)
        alone.move_to(Position(number))
        alone.run(until="end")
        before, after = (found.tensors(found.index(task=number, phase=phase)) for phase in ("train", "end"))
        assert alone.learner.trainable()
        for key, value in alone.learner.tensors().items():
            assert torch.equal(value, after["learner"][key]), f"{key} depends on what was learnt before"
        assert alone.state.losses == tuple(loss for loss in found.loop.state.losses if loss.task == number)
        assert before["memory"].keys() == after["memory"].keys()
        assert all(torch.equal(value, after["memory"][key]) for key, value in before["memory"].items())
    loop = make_loop(name, world, tmp_path / "whole", trained=folders)
    loop.run()
    assert state(newest(tmp_path / "whole")) == state(found.saved[-1])
    assert loop.state.clock.examples == found.loop.state.clock.examples
    assert loop.state.clock.train_seconds.keys() == found.loop.state.clock.train_seconds.keys()


@pytest.mark.parametrize("until", ["train", "nothing"])
def test_what_is_not_trained_to_its_end_is_not_taken(tmp_path: Path, until: str):
    if until == "train":
        alone = make_loop("color", HOME, tmp_path / "0", should_stop=lambda: True)
        with pytest.raises(Interrupted):
            alone.run()
    loop = make_loop("color", HOME, tmp_path / "whole", trained={0: tmp_path / "0"})
    with pytest.raises(CheckpointError, match=r"0 does not hold the finished training of task 'task-01'\. .*resume"):
        loop.run()


# -------------------------------------------------------------------------------------------------------- growth


@everywhere
def test_it_keeps_what_it_declares(name: str, world: World, trail: Walks, tmp_path: Path):
    found, case = trail(name, world), CASES[name]
    for number in range(len(found.stream)):
        index = found.index(task=number, phase="evaluate")
        loop = found.resumed(index, tmp_path / str(number))
        learner, method = loop.learner, loop.method
        assert method.memory_bytes <= method.memory_bound(learner), f"memory after task {number + 1}"
        assert (method.memory_bytes > 0) == (case.memory != "none")
        assert learner.stored_parameters() == case.stored(learner, number + 1)
        assert len(learner.outputs) == sum(len(task.classes) for task in found.stream.tasks[: number + 1])
        assert not any(value.requires_grad for block in learner.head.blocks for value in block.parameters())
        after = found.loop.state.lineage[number]
        assert (after.stored_parameters, after.memory_bytes) == (learner.stored_parameters(), method.memory_bytes)


@on_every_method
def test_every_task_trains_as_many_parameters_as_the_first_or_as_declared(name: str, trail: Walks):
    lineage, more = trail(name, HOME).loop.state.lineage, CASES[name].more_to_train(trail(name, HOME).loop.learner)
    assert [entry.task for entry in lineage] == [task.name for task in stream("image", "class")]
    trained = [number for number in range(len(lineage)) if METHODS[name].trains_on(number)]
    assert len({lineage[number].trainable_parameters - number * more for number in trained}) <= 1
    assert [number for number, entry in enumerate(lineage) if entry.trainable_parameters] == trained


@on_every_method
def test_it_works_on_a_stream_without_a_known_end(name: str, tmp_path: Path):
    loop = make_loop(name, HOME, tmp_path)
    loop.method = loop.consolidation.method = make_method(name, task_count=None)
    loop.run()
    assert loop.matrix.tasks == 3


def test_a_small_task_is_trained_for_the_least_number_of_steps(tmp_path: Path):
    training = TRAINING.model_copy(update={"least_steps": 9})
    loop = make_loop("finetune", HOME, tmp_path, training=training)
    loop.run()
    per_epoch = [-(-len(task.train) // training.batch_size) for task in loop.stream]
    assert [entry.steps for entry in loop.state.lineage] == [n * -(-9 // n) for n in per_epoch]
    assert [loss.step for loss in loop.state.losses if loss.task == 2][-1] == loop.state.lineage[2].steps - 1


@on_every_method
def test_it_learns(name: str, trail: Walks):
    """The examples it was trained on, given their task; a method that does nothing would be at chance, one half."""
    loop = trail(name, HOME).loop
    task = stream("image", "class")[0 if METHODS[name].first_session else -1]
    found = predict_all(loop.learner, loop.method, task.train, whole, task.name)
    assert found.task_aware_correct / len(task.train) >= 0.8


@on_every_method
def test_scores_of_classes_are_the_largest_of_their_outputs(name: str, trail: Walks):
    found = trail(name, World("vit", "domain"))
    outputs, batch = found.loop.learner.outputs, everything(found)
    scores_bj = scores(found.loop, batch)
    classes = sorted({output.label for output in outputs})
    by_hand = torch.stack(
        [
            torch.stack([s for s, output in zip(line, outputs, strict=True) if output.label == c]).max()
            for line in scores_bj
            for c in classes
        ]
    ).view(len(scores_bj), -1)
    assert torch.equal(class_scores(scores_bj, outputs, classes), by_hand)
