"""Prefetched batches are those asked for, in order, and not many of them wait."""

import threading

import pytest
import torch
from tests.tiny import noise

from lamina.engine.steps import Steps
from lamina.speed.prefetch import DEPTH, prefetched
from lamina.types import Batch

WAYS = {"plain": Steps().batches, "prefetched": prefetched}
both = pytest.mark.parametrize("way", WAYS)


def batch(key: str) -> Batch:
    return Batch(inputs={"pixel_values": noise((1, 3), key)}, labels_b=torch.zeros(1, dtype=torch.int64))


@both
def test_batches_come_in_order_and_are_made_shortly_before(way: str):
    made: list[int] = []

    def make(number: int) -> Batch:
        made.append(number)
        return batch(str(number))

    for number, got in enumerate(WAYS[way](lambda n=n: make(n) for n in range(6))):
        assert torch.equal(got.inputs["pixel_values"], batch(str(number)).inputs["pixel_values"])
        assert len(made) <= number + 1 + (DEPTH if way == "prefetched" else 0)
    assert made == list(range(6))


@both
def test_what_a_maker_raises_is_raised_where_its_batch_would_have_come(way: str):
    def make(number: int) -> Batch:
        if number == 2:
            raise ValueError("damaged")
        return batch(str(number))

    batches = WAYS[way](lambda n=n: make(n) for n in range(6))
    assert [len(next(batches)), len(next(batches))] == [1, 1]
    with pytest.raises(ValueError, match="damaged"):
        next(batches)


def test_the_thread_ends_with_the_batches_or_when_nobody_wants_more():
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("lamina-prefetch")]

    assert len(list(prefetched(lambda n=n: batch(str(n)) for n in range(5)))) == 5
    assert threads() == []
    batches = prefetched(lambda n=n: batch(str(n)) for n in range(100))
    next(batches)
    assert len(threads()) == 1
    batches.close()
    assert threads() == []
