"""Every method learns and answers the same from batches in two halves as from batches in one piece, and to the same bits each
time, also when it is stopped between."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.conformance.cases import HOME, TRAINING, make_loop, newest, run_in_pieces, state
from torch import Tensor

from lamina import learner as learners
from lamina.engine.loop import Loop
from lamina.methods import METHODS
from lamina.speed.split_batch import Compute, Halves

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

    def noted(self: Halves, compute: Compute, inputs: Mapping[str, Tensor], wanted: Mapping[Tensor, Tensor]) -> Tensor:
        sizes.append(len(inputs["pixel_values"]))
        return call(self, compute, inputs, wanted)

    monkeypatch.setattr(Halves, "__call__", noted)
    monkeypatch.setattr(learners, "SMALLEST", 2)
    return sizes


def run(name: str, folder: Path) -> Loop:
    loop = make_loop(name, HOME, folder, training=GENTLE)
    loop.run()
    return loop


@pytest.mark.parametrize("name", sorted(METHODS))
def test_it_learns_and_answers_the_same(name: str, tmp_path: Path, halved: list[int], monkeypatch: pytest.MonkeyPatch):
    found = run(name, tmp_path / "halves")
    assert halved
    monkeypatch.setattr(learners, "SMALLEST", 10**6)
    whole = run(name, tmp_path / "whole")
    losses = [torch.tensor([loss for _, _, loss in loop.state.losses]) for loop in (found, whole)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    assert found.matrix.as_dict() == whole.matrix.as_dict()


@pytest.mark.parametrize("name", TRAINED)
def test_it_ends_in_the_same_bits(name: str, tmp_path: Path, halved: list[int]):
    run(name, tmp_path / "one")

    def process(number: int) -> Loop:
        allowances = iter([False] * (5 + 2 * number))
        return make_loop(name, HOME, tmp_path / "pieces", training=GENTLE, should_stop=partial(next, allowances, True))

    _, processes = run_in_pieces(process)
    assert processes > 1
    assert halved
    assert state(newest(tmp_path / "pieces")) == state(newest(tmp_path / "one"))
