"""What happens around a method, for every method: what cannot be combined is refused, everything else survives kills,
sees nothing but its own task, and starts and deploys the weights it says."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conformance.cases import (
    CASES,
    HOME,
    TRAINING,
    Killed,
    World,
    make_loop,
    newest,
    run_in_pieces,
    state,
)
from tests.tiny import ImageTable, TextTable
from torch import Tensor

from lamina.config import ConsolidationConfig
from lamina.engine import checkpoint
from lamina.engine.consolidate import MERGED, update_of
from lamina.engine.loop import Loop
from lamina.errors import BackboneError, MethodError
from lamina.maths.merging import weighted
from lamina.methods import METHODS
from lamina.types import Augment, Ints

SETTINGS: dict[str, dict[str, Any]] = {
    "weighted": {"merging": "weighted"},
    "fresh-mean": {"init": "fresh", "merging": "mean"},
    "merged-ema": {"init": "merged", "merging": "ema"},
    "lda-linear": {"classifier": "lda", "drift": "linear", "class_covariance_rank": 2},
    "deep": {"merging": "ema", "classifier": "lda", "drift": "linear+local", "layers": 2},
    "ridge-local": {"classifier": "ridge", "drift": "linear+local", "random_features": 32},
    "aligned": {"merging": "ema", "classifier": "aligned", "drift": "linear"},
    "both": {"merging": "ema", "drift": "random", "classifier": "lda+ridge", "random_features": 32},
}
TEXT = World("bert", "domain")
ASKED = {"init": "chain", "merging": "none", "drift": "none", "classifier": "own"}
on_every_method = pytest.mark.parametrize("name", sorted(METHODS))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_fsync", lambda _: None)


def loop_with(name: str, folder: Path, way: str | dict[str, Any], world: World = HOME, **more: Any) -> Loop:
    settings = SETTINGS[way] if isinstance(way, str) else way
    return make_loop(name, world, folder, consolidation=ConsolidationConfig(**settings), **more)


def refused(name: str, way: str) -> list[str]:
    """The parts of this way that the method refuses."""
    settings = {**ASKED, **SETTINGS[way]}
    return [part for part, _ in METHODS[name].refuses if settings[part] != ASKED[part]]


@pytest.mark.parametrize("way", ["fresh-mean", "merged-ema", "lda-linear", "deep"])
@on_every_method
def test_what_does_not_fit_is_refused_with_the_reason_and_all_else_works(name: str, way: str, tmp_path: Path):
    if parts := refused(name, way):
        with pytest.raises(MethodError) as error:
            loop_with(name, tmp_path, way)
        for told in (f"consolidation.{parts[0]}", name, dict(METHODS[name].refuses)[parts[0]], ASKED[parts[0]]):
            assert told in str(error.value)
        return
    loop = loop_with(name, tmp_path, way)
    loop.run()
    assert loop.matrix.tasks == 3
    assert all(torch.isfinite(value).all() for value in loop.consolidation.memory.values())
    assert not any(key.startswith(("before", "deployed/")) for key in loop.consolidation.memory), "of one task only"
    for layer in loop.learner.layers.values():
        assert torch.isfinite(layer.weight_oi).all()


@pytest.mark.parametrize("way", ["merged-ema", "weighted", "ridge-local", "aligned", "both", "deep"])
def test_killed_at_any_phase_it_ends_in_the_same_bits(way: str, tmp_path: Path):
    world = TEXT if way == "both" else HOME
    whole = loop_with("finetune", tmp_path / "whole", way, world)
    whole.run()
    seen: set[tuple[int, str]] = set()

    def start(_: int) -> Loop:
        def die_once(event: Any) -> None:
            if (event.task, event.phase) not in seen and event.done:
                seen.add((event.task, event.phase))
                raise Killed

        return loop_with("finetune", tmp_path / "pieces", way, world, on_event=die_once)

    _, processes = run_in_pieces(start)
    assert processes > 6
    assert state(newest(tmp_path / "pieces")) == state(newest(tmp_path / "whole"))


class Watched:
    """A table that notes the rows that are asked for."""

    augments = True

    def __init__(self, table: ImageTable | TextTable) -> None:
        self.table, self.rows = table, set[int]()

    def inputs(self, rows: Ints, augment: Augment | None) -> dict[str, Tensor]:
        self.rows |= set(map(int, rows))
        return self.table.inputs(rows, augment)

    def lengths(self, rows: Ints) -> Ints:
        return self.table.lengths(rows)


@pytest.mark.parametrize("way", ["both", "weighted"])
def test_nothing_but_the_tasks_own_training_examples_is_seen_until_it_is_measured(way: str, tmp_path: Path):
    loop = loop_with("finetune", tmp_path, way)
    table = Watched(loop.stream[0].train.table)
    for task in loop.stream:
        for split in ("train", "val", "test"):
            object.__setattr__(task.split(split), "table", table)
    try:
        phases = {"begin": loop._begin, "train": loop._train, "end": loop._end, "evaluate": loop._evaluate}
        while loop.position.phase != "done":
            phase, task = loop.position.phase, loop.stream[loop.position.task]
            table.rows.clear()
            loop.position = phases[phase](task)
            if phase != "evaluate":
                assert table.rows <= set(map(int, task.train.rows_n)), f"{phase} of {task.name}"
    finally:
        for task in loop.stream:
            for split in ("train", "val", "test"):
                object.__setattr__(task.split(split), "table", table.table)


def spied(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Changes of every site when the method begins a task, and when it has ended one."""
    begun: list[dict[str, Tensor]] = []
    ended: list[dict[str, Tensor]] = []
    begin, end = loop.method.begin, loop.method.end

    def changes() -> dict[str, Tensor]:
        return {name: update_of(site) for name, site in loop.learner.sites.items()}

    monkeypatch.setattr(loop.method, "begin", lambda *args: (begun.append(changes()), begin(*args))[1])
    monkeypatch.setattr(loop.method, "end", lambda *args: (end(*args), ended.append(changes()))[0])
    return begun, ended


@pytest.mark.parametrize("name", ["finetune", "inflora", "clora"])
@pytest.mark.parametrize("init", ["chain", "fresh", "merged"])
def test_training_starts_where_it_says_and_the_average_is_deployed(
    name: str, init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loop = loop_with(name, tmp_path, {"init": init, "merging": "ema", "gamma": 1.0, "floor": 0.4})
    begun, trained = spied(loop, monkeypatch)
    deployed: list[dict[str, Tensor]] = []
    end = loop.consolidation.end

    def note(*args: Any) -> None:
        end(*args)
        deployed.append({n: update_of(site) for n, site in loop.learner.sites.items()})

    monkeypatch.setattr(loop.consolidation, "end", note)
    loop.run()
    for site in loop.learner.sites:
        gains = [1.0, max(0.4, 1 / 2), max(0.4, 1 / 3)]
        expected = torch.zeros_like(trained[0][site])
        for t in range(3):
            starts = {
                "chain": trained[t - 1][site],
                "merged": deployed[t - 1][site],
                "fresh": torch.zeros_like(expected),
            }
            torch.testing.assert_close(
                begun[t][site], starts[init] if t else torch.zeros_like(expected), atol=1e-6, rtol=0
            )
            expected = expected + gains[t] * (trained[t][site] - expected)
            torch.testing.assert_close(deployed[t][site], expected, atol=1e-6, rtol=1e-5)
        assert (deployed[1][site] - trained[1][site]).abs().max() > 1e-5, "an average of different weights"
    if init != "merged":
        alone = make_loop(name, HOME, tmp_path / "alone", consolidation=ConsolidationConfig(init=init))
        alone.run()
        for site, change_oi in trained[-1].items():
            assert torch.equal(update_of(alone.learner.sites[site]), change_oi), "training never sees the average"


def test_a_gain_of_one_deploys_what_was_trained(tmp_path: Path):
    plain, averaged = (
        loop_with("finetune", tmp_path / "a", {}),
        loop_with("finetune", tmp_path / "b", {"merging": "ema", "floor": 1.0}),
    )
    for loop in (plain, averaged):
        loop.run()
    assert plain.matrix.as_dict() == averaged.matrix.as_dict()
    assert all(MERGED in site.finished() for site in averaged.learner.sites.values())


@pytest.mark.parametrize("name", ["finetune", "inflora", "duallora", "color", "prototype"])
def test_what_is_kept_grows_by_one_vector_per_class_and_task(name: str, tmp_path: Path):
    loop = loop_with(name, tmp_path, {"classifier": "lda", "drift": "linear"})
    sizes: list[int] = []
    end = loop.consolidation.end
    loop.consolidation.end = lambda *args: (end(*args), sizes.append(loop.consolidation.memory_bytes))[0]  # type: ignore[method-assign, assignment]
    loop.run()
    width, rows = loop.learner.backbone.width, len(loop.stream[0].classes)
    a_row_of_the_classifier = 8 * (width + 1)
    for before, after in itertools.pairwise(sizes):
        assert after - before <= rows * (8 * width + 8 + a_row_of_the_classifier)
    assert loop.state.lineage[-1]["memory_bytes"] == loop.method.memory_bytes + sizes[-1]


@pytest.mark.parametrize("name", ["inflora", "duallora"])
def test_a_chain_that_was_kept_is_consolidated_without_training(name: str, tmp_path: Path):
    """To the same bits as if it had been asked for at once."""
    way: dict[str, Any] = {"drift": "linear", "classifier": "lda"}
    if name == "inflora":
        way["merge"] = "ema"
    direct = loop_with(name, tmp_path / "direct", way)
    direct.run()
    loop_with(name, tmp_path / "plain", {}, keep_chain=tmp_path / "chain").run()
    again = loop_with(name, tmp_path / "again", way, replay=tmp_path / "chain")
    again.method.loss = None  # type: ignore[method-assign, assignment]
    again.run()
    assert again.matrix.as_dict() == direct.matrix.as_dict()
    for key, value in direct.consolidation.memory.items():
        assert torch.equal(again.consolidation.memory[key], value), key
    assert [task["trainable_parameters"] for task in again.lineage] == [
        task["trainable_parameters"] for task in direct.lineage
    ]


def test_the_oracle_measures_old_rows_on_old_examples_and_only_in_a_replay(tmp_path: Path):
    way: dict[str, Any] = {"drift": "oracle", "classifier": "lda"}
    with pytest.raises(MethodError, match="examples, which are gone"):
        loop_with("finetune", tmp_path / "direct", way)
    loop_with("finetune", tmp_path / "plain", {}, keep_chain=tmp_path / "chain").run()
    loop = loop_with("finetune", tmp_path / "again", way, replay=tmp_path / "chain")
    loop.run()
    means = []
    with loop.learner.folded():
        for task in loop.stream:
            train = task.train.batch(np.arange(len(task.train)))
            features_nd = loop.learner.features(train).double()
            means += [features_nd[train.labels_b == label].mean(0) for label in task.classes]
    torch.testing.assert_close(
        loop.consolidation.memory["statistics/means_jd"], torch.stack(means), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("name", "layers"), [("finetune", 1), ("inflora", 1), ("finetune", 2)])
def test_a_unified_head_predicts_from_the_features_of_what_is_deployed(name: str, layers: int, tmp_path: Path):
    loop = loop_with(name, tmp_path, {"classifier": "ncm", "merging": "ema", "layers": layers})
    loop.run()
    assert loop.consolidation.memory["statistics/means_jd"].shape[1] == layers * loop.learner.backbone.width
    task = loop.stream[-1]
    batch = task.test.batch(np.arange(len(task.test)))
    with loop.learner.folded():
        features_bd = loop.learner.features(batch, layers).double()
        scores_br = loop.consolidation.predict(loop.learner, batch).double()
        train = task.train.batch(np.arange(len(task.train)))
        train_nd = loop.learner.features(train, layers).double()
    first = len(loop.learner.outputs) - len(task.classes)
    for position, label in enumerate(task.classes):
        mean_d = train_nd[train.labels_b == label].mean(0)
        expected_b = 2 * features_bd @ mean_d - mean_d @ mean_d
        torch.testing.assert_close(scores_br[:, first + position], expected_b, atol=1e-3, rtol=1e-4)


def test_features_of_several_blocks_are_refused_where_there_are_none(tmp_path: Path):
    way: dict[str, Any] = {"classifier": "lda", "layers": 2}
    for name in ("color", "duallora"):
        with pytest.raises(MethodError, match=rf"consolidation\.layers = 2 does not go with method {name!r}"):
            loop_with(name, tmp_path, way)
    with pytest.raises(BackboneError, match=r"leave consolidation\.layers at 1"):
        loop_with("finetune", tmp_path, way, World("fused_vit", "mixed"))


def test_a_later_rate_and_self_distillation(tmp_path: Path):
    """The scores of older rows move less on new examples, and a kill changes no bit."""
    moved: dict[float, float] = {}
    for weight in (0.0, 20.0):
        training = TRAINING.model_copy(update={"distil": weight})
        loop = make_loop("finetune", HOME, tmp_path / str(weight))
        loop.training = training
        examples = loop.stream[1].train
        batch = examples.batch(np.arange(len(examples)))
        scores: list[Tensor] = []
        end = loop.method.end

        def note(
            *args: Any, loop: Loop = loop, batch: Any = batch, scores: list[Tensor] = scores, end: Any = end
        ) -> None:
            end(*args)
            with loop.learner.folded():
                scores.append(loop.learner.head.block(loop.stream[0].name)(loop.learner.features(batch)))

        loop.method.end = note  # type: ignore[method-assign]
        loop.run()
        moved[weight] = (scores[1] - scores[0]).norm().item()

        def again(number: int, weight: float = weight, training: Any = training) -> Loop:
            def stop(event: Any) -> None:
                if number < 12 and event.phase == "train" and event.done == 1 + number % 3:
                    raise Killed

            piece = make_loop("finetune", HOME, tmp_path / f"pieces{weight}", seconds=0.0, on_event=stop)
            piece.training = training
            return piece

        run_in_pieces(again)
        assert state(newest(tmp_path / f"pieces{weight}")) == state(newest(tmp_path / str(weight)))
    assert moved[20.0] < 0.8 * moved[0.0]
    slower = make_loop("finetune", HOME, tmp_path / "slower")
    slower.training = TRAINING.model_copy(update={"later_lr": 1e-6})
    slower.run()
    first = make_loop("finetune", HOME, tmp_path / "first")
    first.stream = first.stream.first(1)
    first.run()
    for name, site in slower.learner.sites.items():
        torch.testing.assert_close(
            update_of(site), update_of(first.learner.sites[name]), atol=1e-4, rtol=0, msg="later tasks hardly move it"
        )


def test_every_method_says_why_of_what_it_refuses():
    for name, method in METHODS.items():
        assert name in CASES
        for part, reason in method.refuses:
            assert part in ConsolidationConfig.model_fields
            assert len(reason.split()) > 2


def test_the_weighted_average_is_by_sums_over_the_tasks_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loop = loop_with("finetune", tmp_path, {"merging": "weighted", "gamma": 1.5})
    _, trained = spied(loop, monkeypatch)
    seen: list[dict[str, Tensor]] = []
    moments = loop.learner.input_moments
    monkeypatch.setattr(
        loop.learner, "input_moments", lambda *args, **kind: (seen.append(moments(*args, **kind)), seen[-1])[1]
    )
    loop.run()
    assert len(seen) == len(loop.stream)
    for name, site in loop.learner.sites.items():
        expected_oi, old_ii = trained[0][name], seen[0][site.group]
        for t in (1, 2):
            new_ii = seen[t][site.group]
            expected_oi = weighted(expected_oi, trained[t][name], old_ii, new_ii, 1.5)
            old_ii = old_ii + new_ii
        torch.testing.assert_close(update_of(site), expected_oi, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(loop.consolidation.memory[f"inputs/{site.group}"], old_ii)
    tokens = (
        seen[0]["block0.attention"].trace()
        / moments([loop.stream[0].train.batch(np.arange(4))])["block0.attention"].trace()
    )
    assert tokens > 3 * len(loop.stream[0].train), "a sum over all tokens, not a mean"


@pytest.mark.parametrize("task", [0, 1])
def test_what_is_learnt_can_be_measured_before_a_task_has_ended(task: int, tmp_path: Path):
    class Stop(Exception):
        pass

    def stop(event: Any) -> None:
        if (event.task, event.phase, event.done) == (task, "train", 1):
            raise Stop

    loop = loop_with("finetune", tmp_path, "lda-linear", on_event=stop)
    with pytest.raises(Stop):
        loop.run()
    for learnt in loop.stream.tasks[: task + 1]:
        found = loop._predictions(learnt)
        ended = loop.stream.tasks[: max(task, 1)]  # rows of the first task answer as the method has them
        assert set(found.classes_n) <= {label for t in ended for label in t.classes}
