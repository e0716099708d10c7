"""Which steps come from a recording. Without a card: what a card would do is stood in for."""

import pytest
import torch
from tests.tiny import noise
from torch import Tensor, nn

from lamina.speed.prefetch import ahead
from lamina.types import Batch

SIZE = 4


def batch(size: int, key: str) -> Batch:
    return Batch(inputs={"pixel_values": noise((size, 3), key)}, labels_b=torch.zeros(size, dtype=torch.int64))


class World:
    """A parameter, and a stand-in for recordings that counts. seconds: of a plain and of a replayed step."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, plain: float, replayed: float, error: str | None = None
    ) -> None:
        self.weight, self.notes, self.made, self.replayed = nn.Parameter(torch.ones(3)), list[str](), 0, 0
        world = self

        class Recording:
            def __init__(self, compute: object, parameters: object, batch: Batch) -> None:
                world.made += 1
                if error:
                    raise RuntimeError(error)

            def replay(self, batch: Batch) -> Tensor:
                world.replayed += 1
                return world.gradients._plain(batch)

        monkeypatch.setattr(graphs, "_Recording", Recording)
        monkeypatch.setattr(graphs, "_seconds", lambda way, _: replayed if way.__name__ == "replay" else plain)
        self.gradients = graphs.Gradients(self.loss, [self.weight], SIZE, self.notes.append)

    def loss(self, batch: Batch) -> Tensor:
        return (batch.inputs["pixel_values"] @ self.weight).square().mean()

    def check(self, size: int, key: str) -> None:
        given = batch(size, key)
        loss = self.gradients(given)
        wanted = self.loss(given)
        assert torch.equal(loss, wanted.detach())
        assert self.weight.grad is not None
        torch.testing.assert_close(self.weight.grad, torch.autograd.grad(wanted, self.weight)[0])


def test_a_faster_recording_is_made_once_and_replayed_for_full_batches(monkeypatch: pytest.MonkeyPatch):
    world = World(monkeypatch, plain=2.0, replayed=1.0)
    for number, size in enumerate((SIZE, SIZE, 3, SIZE)):
        world.check(size, str(number))
    assert (world.made, world.replayed, world.notes) == (1, 3, [])


def test_a_recording_that_is_hardly_faster_is_given_up(monkeypatch: pytest.MonkeyPatch):
    world = World(monkeypatch, plain=2.0, replayed=1.9)
    for number in range(3):
        world.check(SIZE, str(number))
    assert (world.made, world.replayed, world.notes) == (1, 0, [])


def test_what_cannot_be_recorded_is_said_once_and_computed(monkeypatch: pytest.MonkeyPatch):
    world = World(
        monkeypatch, plain=2.0, replayed=1.0, error="operation not permitted when stream is capturing\nand more"
    )
    for number in range(3):
        world.check(SIZE, str(number))
    assert (world.made, world.replayed) == (1, 0)
    assert [note.endswith("without one: operation not permitted when stream is capturing") for note in world.notes] == [
        True
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_made_ahead_are_those_asked_for_in_order(device: str):
    made: list[int] = []

    def make(number: int) -> Batch:
        made.append(number)
        return batch(1, str(number))

    for number, got in enumerate(ahead((lambda n=n: make(n) for n in range(6)), torch.device(device))):
        assert torch.equal(got.inputs["pixel_values"], batch(1, str(number)).inputs["pixel_values"])
        assert len(made) <= number + (1 if device == "cpu" else 3)
    assert made == list(range(6))


def test_what_a_maker_raises_is_raised_where_its_batch_would_have_come():
    def make(number: int) -> Batch:
        if number == 2:
            raise ValueError("damaged")
        return batch(1, str(number))

    batches = ahead((lambda n=n: make(n) for n in range(6)), torch.device("cuda"))
    assert [len(next(batches)), len(next(batches))] == [1, 1]
    with pytest.raises(ValueError, match="damaged"):
        next(batches)
