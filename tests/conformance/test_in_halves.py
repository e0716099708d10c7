"""Every method that trains learns the same from batches in two halves as from batches in one piece, and to the same bits each
time, also when it is stopped between."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.conformance.cases import HOME, TRAINING, make_loop, newest, state
from torch import Tensor

from lamina import learner as learners
from lamina.engine.loop import Interrupted, Loop
from lamina.halves import Halves
from lamina.methods import METHODS

TRAINED = sorted(name for name, method in METHODS.items() if method.trains)
GENTLE = TRAINING.model_copy(update={"optimizer": "sgd", "momentum": 0.0, "distil": 0.5})
"""Adam would make much of the last bits of gradients that are nearly zero."""


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that were computed in halves, from here on all of two and more."""
    sizes: list[int] = []
    call = Halves.__call__

    def noted(self: Halves, compute: object, inputs: dict[str, Tensor]) -> Tensor:
        sizes.append(len(inputs["pixel_values"]))
        return call(self, compute, inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(Halves, "__call__", noted)
    monkeypatch.setattr(learners, "SMALLEST", 2)
    return sizes


def run(name: str, folder: Path) -> Loop:
    loop = make_loop(name, HOME, folder, training=GENTLE)
    loop.run()
    return loop


@pytest.mark.parametrize("name", TRAINED)
def test_it_learns_the_same(name: str, tmp_path: Path, halved: list[int], monkeypatch: pytest.MonkeyPatch):
    found = run(name, tmp_path / "halves")
    assert halved
    monkeypatch.setattr(learners, "SMALLEST", 10**6)
    whole = run(name, tmp_path / "whole")
    losses = [torch.tensor([loss for _, _, loss in loop.losses]) for loop in (found, whole)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.usefixtures("halved")
def test_it_ends_in_the_same_bits(name: str, tmp_path: Path):
    run(name, tmp_path / "one")
    for allowed in (5, 7, 10**6):
        asked = iter(range(10**6))
        loop = make_loop(name, HOME, tmp_path / "pieces", training=GENTLE)
        loop.should_stop = lambda asked=asked, allowed=allowed: next(asked) >= allowed  # type: ignore[misc]
        loop.restore()
        try:
            loop.run()
        except Interrupted:
            continue
    assert loop.position.phase == "done"
    assert state(newest(tmp_path / "pieces")) == state(newest(tmp_path / "one"))
