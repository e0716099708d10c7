"""Which training steps come from a recording. Without a GPU: stand-ins do what it would do."""

from types import SimpleNamespace

import pytest
import torch
from tests.tiny import noise
from torch import Tensor, nn

from lamina.speed import cuda_graph
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

        monkeypatch.setattr(cuda_graph, "_Recording", Recording)
        monkeypatch.setattr(cuda_graph, "_seconds", lambda way, _: replayed if way.__name__ == "replay" else plain)
        self.gradients = cuda_graph.GraphedGradients(self.loss, [self.weight], SIZE, self.notes.append)

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


def test_a_recording_that_is_hardly_faster_is_discarded(monkeypatch: pytest.MonkeyPatch):
    world = World(monkeypatch, plain=2.0, replayed=1.9)
    for number in range(3):
        world.check(SIZE, str(number))
    assert (world.made, world.replayed, world.notes) == (1, 0, [])


def test_a_step_that_cannot_be_recorded_is_noted_once_and_computed(monkeypatch: pytest.MonkeyPatch):
    world = World(
        monkeypatch, plain=2.0, replayed=1.0, error="operation not permitted when stream is capturing\nand more"
    )
    for number in range(3):
        world.check(SIZE, str(number))
    assert (world.made, world.replayed) == (1, 0)
    assert [note.endswith("without one: operation not permitted when stream is capturing") for note in world.notes] == [
        True
    ]


@pytest.mark.parametrize(
    ("device", "kind", "full_batches", "worth"),
    [
        ("cuda", "image", 50, True),
        ("cuda", "image", 49, False),
        ("cuda", "text", 50, False),
        ("cpu", "image", 50, False),
    ],
)
def test_steps_are_recorded_where_they_are_alike_and_many(device: str, kind: str, full_batches: int, worth: bool):
    learner = SimpleNamespace(device=torch.device(device), backbone=SimpleNamespace(kind=kind))
    assert cuda_graph.worth_recording(learner, full_batches) == worth
