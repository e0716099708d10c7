"""Consolidation, for every method: a combination that does not fit is refused. All others survive kills, see nothing but their
own task, and start from and deploy the weights that the settings say."""

import itertools
from dataclasses import replace
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
from tests.tiny import Watched
from torch import Tensor

from lamina.config import ConsolidationConfig
from lamina.engine import checkpoint
from lamina.engine.consolidate import MERGED, update_of
from lamina.engine.loop import Loop
from lamina.engine.measure import Measure
from lamina.errors import BackboneError, MethodError
from lamina.learner import Learner
from lamina.maths.merging import weighted
from lamina.methods import METHODS
from lamina.types import Batch

SETTINGS: dict[str, dict[str, Any]] = {
    "weighted": {"merging": "weighted"},
    "fresh-mean": {"init": "fresh", "merging": "mean"},
    "merged-ema": {"init": "merged", "merging": "ema"},
    "lda-linear": {"classifier": "lda", "drift": "linear", "class_covariance_rank": 2},
    "deep": {"merging": "ema", "classifier": "lda", "drift": "linear+local", "layers": 2},
    "ridge-local": {"classifier": "ridge", "drift": "linear+local", "random_features": 32},
    "gram": {"classifier": "gram", "random_features": 32},
    "aligned": {"merging": "ema", "classifier": "aligned", "drift": "linear"},
    "both": {"merging": "ema", "drift": "random", "classifier": "lda+ridge", "random_features": 32},
}
TEXT = World("bert", "domain")
ASKED = {"init": "chain", "merging": "none", "drift": "none", "classifier": "own"}
on_every_method = pytest.mark.parametrize("name", sorted(METHODS))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "fsync", lambda _: None)


def loop_with(name: str, folder: Path, way: str | dict[str, Any], world: World = HOME, **more: Any) -> Loop:
    settings = SETTINGS[way] if isinstance(way, str) else way
    return make_loop(name, world, folder, consolidation=ConsolidationConfig(**settings), **more)


def refused(name: str, way: str) -> list[str]:
    """The parts of this way that the method refuses."""
    settings = {**ASKED, **SETTINGS[way]}
    return [part for part, _ in METHODS[name].refuses if settings[part] != ASKED[part]]


@pytest.mark.parametrize("world", [HOME, World("bert", "class")], ids=["images", "texts"])
def test_variants_are_the_same_before_and_after_a_task(world: World, tmp_path: Path):
    """Features of a frozen backbone do not move. Other variants after the task than before it would look like drift."""
    found = []
    for number, drift in enumerate(("linear", "none")):
        loop = loop_with("prototype", tmp_path / str(number), {"classifier": "lda", "drift": drift}, world)
        loop.run()
        found.append(loop.consolidation.memory["statistics/means_jd"])
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("classifier", ["lda", "own"])
@pytest.mark.parametrize("name", ["prototype", "fsa", "finetune"])
def test_what_no_training_moves_is_computed_once(
    name: str, classifier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One forward of every example, and the same result as with one after every task."""
    settings: dict[str, Any] = {"classifier": classifier}
    forwards: list[int] = []
    features = Learner.features

    def counted(learner: Learner, batch: Batch, layers: int = 1) -> Tensor:
        if not torch.is_grad_enabled():
            forwards.append(len(batch))
        return features(learner, batch, layers)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "features", counted)
        once = loop_with(name, tmp_path / "once", settings)
        once.run()
    monkeypatch.setattr("lamina.engine.loop.Measure", lambda *parts: replace(Measure(*parts), known=None))
    again = loop_with(name, tmp_path / "again", settings)
    again.run()
    assert state(newest(tmp_path / "once")) == state(newest(tmp_path / "again"))
    whole = sum(len(part) for task in once.stream for part in (task.train, task.test))
    assert (sum(forwards) == whole) == (name != "finetune" and classifier == "lda")


@pytest.mark.parametrize("way", ["fresh-mean", "merged-ema", "lda-linear", "deep"])
@on_every_method
def test_a_combination_that_does_not_fit_is_refused_with_the_reason_and_all_others_work(
    name: str, way: str, tmp_path: Path
):
    if parts := refused(name, way):
        with pytest.raises(MethodError) as error:
            loop_with(name, tmp_path, way)
        for part in (f"consolidation.{parts[0]}", name, dict(METHODS[name].refuses)[parts[0]], ASKED[parts[0]]):
            assert part in str(error.value)
        return
    loop = loop_with(name, tmp_path, way)
    loop.run()
    assert loop.matrix.tasks == 3
    assert all(torch.isfinite(value).all() for value in loop.consolidation.memory.values())
    assert not any(key.startswith(("before", "deployed/")) for key in loop.consolidation.memory), "of one task only"
    for layer in loop.learner.layers.values():
        assert torch.isfinite(layer.weight_oi).all()


@pytest.mark.parametrize("way", ["merged-ema", "weighted", "ridge-local", "aligned", "both", "deep", "gram"])
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
            loop.move_to(phases[phase](task))
            if phase != "evaluate":
                assert table.rows <= set(map(int, task.train.rows_n)), f"{phase} of {task.name}"
    finally:
        for task in loop.stream:
            for split in ("train", "val", "test"):
                object.__setattr__(task.split(split), "table", table.table)


def spied(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Updates of every site when the method begins a task, and when it has ended one."""
    begun: list[dict[str, Tensor]] = []
    ended: list[dict[str, Tensor]] = []
    begin, end = loop.method.begin, loop.method.end

    def updates() -> dict[str, Tensor]:
        return {name: update_of(site) for name, site in loop.learner.sites.items()}

    monkeypatch.setattr(loop.method, "begin", lambda *args: (begun.append(updates()), begin(*args))[1])
    monkeypatch.setattr(loop.method, "end", lambda *args: (end(*args), ended.append(updates()))[0])
    return begun, ended


@pytest.mark.parametrize("name", ["finetune", "inflora", "clora"])
@pytest.mark.parametrize("init", ["chain", "fresh", "merged"])
def test_training_starts_where_it_says_and_the_merged_weights_are_deployed(
    name: str, init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loop = loop_with(name, tmp_path, {"init": init, "merging": "ema"})
    begun, trained = spied(loop, monkeypatch)
    deployed: list[dict[str, Tensor]] = []
    end = loop.consolidation.end

    def note(*args: Any) -> None:
        end(*args)
        deployed.append({n: update_of(site) for n, site in loop.learner.sites.items()})

    monkeypatch.setattr(loop.consolidation, "end", note)
    loop.run()
    for site in loop.learner.sites:
        shares = [1.0, 2 / 3, 2 / 4]  # NEW_WEIGHT / (NEW_WEIGHT + t)
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
            expected = expected + shares[t] * (trained[t][site] - expected)
            torch.testing.assert_close(deployed[t][site], expected, atol=1e-6, rtol=1e-5)
        assert (deployed[1][site] - trained[1][site]).abs().max() > 1e-5, "a merge of different weights"
    if init != "merged":
        alone = make_loop(name, HOME, tmp_path / "alone", consolidation=ConsolidationConfig(init=init))
        alone.run()
        for site, update_oi in trained[-1].items():
            assert torch.equal(update_of(alone.learner.sites[site]), update_oi), (
                "training never sees the merged weights"
            )


def test_the_mean_is_that_of_all_trained_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loop = loop_with("finetune", tmp_path, {"merging": "mean"})
    _, trained = spied(loop, monkeypatch)
    loop.run()
    for name, site in loop.learner.sites.items():
        assert MERGED in site.finished()
        expected_oi = torch.stack([updates[name] for updates in trained]).mean(0)
        torch.testing.assert_close(update_of(site), expected_oi, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["finetune", "inflora", "duallora", "color", "prototype"])
def test_memory_grows_by_one_vector_per_class_and_task(name: str, tmp_path: Path):
    loop = loop_with(name, tmp_path, {"classifier": "lda", "drift": "linear"})
    sizes: list[int] = []
    end = loop.consolidation.end
    loop.consolidation.end = lambda *args: (end(*args), sizes.append(loop.consolidation.memory_bytes))[0]  # type: ignore[method-assign, assignment]
    loop.run()
    width, outputs = loop.learner.backbone.width, len(loop.stream[0].classes)
    for before, after in itertools.pairwise(sizes):
        assert after - before <= outputs * (
            8 * width + 8 + 8 * (width + 1)
        )  # mean, count, and an output of the classifier
    assert loop.state.lineage[-1].memory_bytes == loop.method.memory_bytes + sizes[-1]


def test_statistics_are_not_remeasured_on_examples_that_are_gone(tmp_path: Path):
    with pytest.raises(MethodError, match="examples, which are gone"):
        loop_with("finetune", tmp_path, {"drift": "remeasured", "classifier": "lda"}).run()


@pytest.mark.parametrize(("name", "layers"), [("finetune", 1), ("inflora", 1), ("finetune", 2)])
def test_a_unified_classifier_predicts_from_the_features_of_the_deployed_weights(
    name: str, layers: int, tmp_path: Path
):
    loop = loop_with(name, tmp_path, {"classifier": "ncm", "merging": "ema", "layers": layers})
    loop.run()
    assert loop.consolidation.memory["statistics/means_jd"].shape[1] == layers * loop.learner.backbone.width
    task = loop.stream[-1]
    batch = task.test.batch(np.arange(len(task.test)))
    with loop.learner.folded():
        features_bd = loop.learner.features(batch, layers).double()
        scores_bj = loop.consolidation.predict(loop.learner, batch).double()
        train = task.train.batch(np.arange(len(task.train)))
        train_nd = loop.learner.features(train, layers).double()
    first = len(loop.learner.outputs) - len(task.classes)
    for position, label in enumerate(task.classes):
        mean_d = train_nd[train.labels_b == label].mean(0)
        expected_b = 2 * features_bd @ mean_d - mean_d @ mean_d
        torch.testing.assert_close(scores_bj[:, first + position], expected_b, atol=1e-3, rtol=1e-4)


def test_features_of_several_blocks_are_refused_where_there_are_none(tmp_path: Path):
    way: dict[str, Any] = {"classifier": "lda", "layers": 2}
    for name in ("color", "duallora"):
        with pytest.raises(MethodError, match=rf"consolidation\.layers = 2 does not go with method {name!r}"):
            loop_with(name, tmp_path, way)
    with pytest.raises(BackboneError, match=r"leave `layers` at 1"):
        loop_with("finetune", tmp_path, way, World("fused_vit", "mixed"))


def test_later_tasks_have_a_rate_of_their_own(tmp_path: Path):
    slower = make_loop("finetune", HOME, tmp_path / "slower", training=TRAINING.model_copy(update={"later_lr": 1e-6}))
    slower.run()
    first = make_loop("finetune", HOME, tmp_path / "first")
    first.stream = first.stream.first(1)
    first.run()
    as_usual = make_loop("finetune", HOME, tmp_path / "as usual")
    as_usual.run()
    for name, site in slower.learner.sites.items():
        first_oi = update_of(first.learner.sites[name])
        torch.testing.assert_close(update_of(site), first_oi, atol=1e-4, rtol=0, msg="later tasks hardly move it")
        assert (update_of(as_usual.learner.sites[name]) - first_oi).abs().max() > 1e-2


def test_every_method_gives_reasons_for_what_it_refuses():
    for name, method in METHODS.items():
        assert name in CASES
        for part, reason in method.refuses:
            assert part in ConsolidationConfig.model_fields
            assert len(reason.split()) > 2


def test_weighted_merging_is_by_sums_over_the_inputs_of_the_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loop = loop_with("finetune", tmp_path, {"merging": "weighted"})
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
            expected_oi = weighted(expected_oi, trained[t][name], old_ii, new_ii, 2.0)
            old_ii = old_ii + new_ii
        torch.testing.assert_close(update_of(site), expected_oi, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(loop.consolidation.memory[f"inputs/{site.group}"], old_ii)
    tokens = (
        seen[0]["block0.attention"].trace()
        / moments([loop.stream[0].train.batch(np.arange(4))])["block0.attention"].trace()
    )
    assert tokens > 3 * len(loop.stream[0].train), "a sum over all tokens, not a mean"


@pytest.mark.parametrize("task", [0, 1])
def test_learnt_tasks_can_be_measured_before_a_task_has_ended(task: int, tmp_path: Path):
    class Stop(Exception):
        pass

    def stop(event: Any) -> None:
        if (event.task, event.phase, event.done) == (task, "train", 1):
            raise Stop

    loop = loop_with("finetune", tmp_path, "lda-linear", on_event=stop)
    with pytest.raises(Stop):
        loop.run()
    for number in range(task + 1):
        found = loop.measure().predictions(number)
        ended = loop.stream.tasks[: max(task, 1)]  # before that the method's own classifier predicts
        assert set(found.predicted_n) <= {label for t in ended for label in t.classes}
