"""The device changes where a run computes and nothing else: what is drawn, what is stored, how it is saved and resumed.

Without a GPU, a pretended one (see tests/pretend.py) shows that nothing is left on the CPU. Its numbers are the CPU's, so they
must be the same bits. With a GPU, its own numbers must be near them. All runs have the layers of `lamina.speed`.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tests.conformance.cases import CASES, HOME, TRAINING, World, make_loop
from tests.pretend import OnGpu, pretended_gpu
from tests.tiny import noise
from torch import Tensor

from lamina.config import ConsolidationConfig, RehearsalConfig
from lamina.engine import checkpoint
from lamina.engine.loop import Interrupted, Loop
from lamina.engine.state import Position
from lamina.maths.linalg import sorted_eigh
from lamina.methods import METHODS
from lamina.speed import accelerate

TEXT = World("bert", "domain")
EVERY = [(name, HOME) for name in sorted(METHODS)] + [("duallora", TEXT), ("ewc", TEXT), ("taskarithmetic", TEXT)]
AROUND: dict[str, dict[str, Any]] = {
    "weighted": {
        "merging": "weighted",
        "classifier": "lda+ridge",
        "drift": "linear+local",
        "random_features": 32,
        "class_covariance_rank": 2,
    },
    "merged": {"init": "merged", "merging": "ema", "classifier": "aligned", "drift": "random"},
}
SWITCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "inflora random": ("inflora", {"design": "random", "spectrum": "paper", "criterion": "paper"}),
    "task arithmetic without memory": ("taskarithmetic", {"memory_per_class": 0}),
    "color++": ("color", {"identify": "first expert", "distance": "l1"}),
    "clora": ("clora", {"projection": 0.9, "sides": "two", "start": "lora"}),
    "duallora previous": ("duallora", {"residual": "previous"}),
    "duallora none": ("duallora", {"dynamic_memory": False, "residual": "own"}),
    "prototype": ("prototype", {"metric": "euclidean"}),
    "sora": ("sora", {"operator": "released", "threshold": "constant", "penalty": 0.1, "lam": 0.01}),
    "sdlora": ("sdlora", {"carry": True, "norm": "paper"}),
    "ewc": ("ewc", {"fisher": "empirical"}),
}
"""Settings that decide which lines of a method run, beyond its row in the table of cases."""
on_every_method = pytest.mark.parametrize(("name", "world"), EVERY, ids=lambda value: str(value))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "fsync", lambda _: None)


def finished(name: str, world: World, folder: Path, device: Literal["cpu", "cuda"], **how: Any) -> Loop:
    """Returns a run that was stopped within the second task and resumed. Its batches are made by its own thread: others know
    nothing of the pretended GPU."""
    for last in (False, True):
        loop = make_loop(name, world, folder, device=device, **how)
        accelerate(loop.learner)
        loop.restore()
        loop.should_stop = lambda loop=loop, last=last: not last and loop.position == Position(1, "train", 1)
        with suppress(Interrupted):
            loop.run()
    assert loop.position.phase == "done"
    return loop


def outcome(loop: Loop) -> dict[str, Tensor]:
    parts = {"learner": loop.learner.tensors(), "memory": loop.method.memory, "predictions": loop.last_predictions}
    parts["consolidation"] = loop.consolidation.memory
    found = {f"{part}/{name}": value.cpu() for part, group in parts.items() for name, value in group.items()}
    return found | {"losses": torch.tensor([loss.value for loss in loop.state.losses], dtype=torch.float64)}


def check_same_bits(name: str, world: World, folder: Path, **how: Any) -> None:
    with pretended_gpu():
        there = finished(name, world, folder / "there", "cuda", **how)
        got = outcome(there)
    wanted = outcome(finished(name, world, folder / "here", "cpu", **how))
    assert got.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(got[key], wanted[key])] == []
    weights = [*there.learner.backbone.module.parameters(), *(layer.base_oi for layer in there.learner.layers.values())]
    kept = [*there.learner.tensors().values(), *there.method.memory.values(), *weights]
    assert [value.shape for value in kept if value.ndim and not isinstance(value, OnGpu)] == []
    assert not any(isinstance(value, OnGpu) for value in there.consolidation.memory.values())


@on_every_method
def test_a_run_on_a_pretended_gpu_leaves_nothing_behind_and_has_the_same_bits(name: str, world: World, tmp_path: Path):
    check_same_bits(name, world, tmp_path)


def test_eigenvectors_have_the_signs_of_the_cpu(monkeypatch: pytest.MonkeyPatch):
    eigh, seen = torch.linalg.eigh, list[Tensor]()
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix_dd: seen.append(matrix_dd) or eigh(matrix_dd))
    rows_nd = noise((9, 4), "rows").double()
    with pretended_gpu():
        values_d, vectors_dd = sorted_eigh((rows_nd.T @ rows_nd).to("cuda"))
    assert isinstance(values_d, OnGpu)
    assert isinstance(vectors_dd, OnGpu)
    assert not any(isinstance(matrix_dd, OnGpu) for matrix_dd in seen)
    assert len(seen) == 1


@pytest.mark.slow
@pytest.mark.parametrize("switch", sorted(SWITCHES))
def test_the_same_with_every_switch(switch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name, settings = SWITCHES[switch]
    monkeypatch.setitem(CASES, name, replace(CASES[name], settings=CASES[name].settings | settings))
    check_same_bits(name, HOME, tmp_path)


@pytest.mark.parametrize("way", sorted(AROUND))
def test_the_same_with_consolidation(way: str, tmp_path: Path):
    check_same_bits("finetune", HOME, tmp_path, consolidation=ConsolidationConfig(**AROUND[way]))


@pytest.mark.parametrize("world", [HOME, TEXT], ids=str)
def test_the_same_with_rehearsal(world: World, tmp_path: Path):
    check_same_bits("finetune", world, tmp_path, rehearsal=RehearsalConfig(per_class=2))


@pytest.fixture
def plain_float32() -> Iterator[None]:
    """As engine/device.py prepares it."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("plain_float32")
@on_every_method
def test_a_run_on_a_gpu_is_near_that_on_the_cpu(name: str, world: World, tmp_path: Path):
    """With SGD: Adam turns the sign of a gradient that is rounding alone into a whole step. The scores of all test examples
    are compared, since directions may differ in sign."""
    sgd = TRAINING.model_copy(update={"optimizer": "sgd", "momentum": 0.0})
    scores: dict[str, Tensor] = {}
    for device in ("cpu", "cuda"):
        loop = finished(name, world, tmp_path / device, device, training=sgd)
        with loop.learner.folded():
            batches = [batch for task in loop.stream for batch in loop._batches("evaluate", task.test)]
            scores[device] = torch.cat([loop.method.predict(loop.learner, batch).cpu() for batch in batches])
    torch.testing.assert_close(scores["cuda"], scores["cpu"], rtol=1e-4, atol=1e-4)
