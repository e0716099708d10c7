"""The order of batches is a function of (seed, task, epoch, step)."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.engine.order import in_order, positions_of_step, set_torch_seed, steps_per_epoch

often = settings(deadline=None, max_examples=40, derandomize=True)


@often
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_shows_every_example_once(examples: int, size: int, seed: int, task: int, epoch: int):
    steps = steps_per_epoch(examples, size)
    assert (steps - 1) * size < examples <= steps * size
    batches = [
        positions_of_step(examples, size, epoch * steps + step, seed=seed, task=str(task)) for step in range(steps)
    ]
    assert sorted(np.concatenate(batches).tolist()) == list(range(examples))
    assert all(len(batch) == size for batch in batches[:-1])


def test_every_seed_task_and_epoch_has_an_order_of_its_own_whatever_was_asked_before():
    def order(seed: int, task: int, epoch: int) -> tuple[int, ...]:
        batches = [positions_of_step(40, 10, 4 * epoch + s, seed=seed, task=f"task {task}") for s in range(4)]
        return tuple(int(i) for batch in batches for i in batch)

    keys = [(seed, task, epoch) for seed in range(3) for task in range(3) for epoch in range(3)]
    forwards = {key: order(*key) for key in keys}
    assert len(set(forwards.values())) == len(keys)
    assert {key: order(*key) for key in reversed(keys)} == forwards


@often
@given(st.integers(0, 50), st.integers(1, 20))
def test_a_plain_pass_is_in_the_order_of_the_data(examples: int, size: int):
    batches = [batch.tolist() for batch in in_order(examples, size)]
    assert [i for batch in batches for i in batch] == list(range(examples))
    assert all(0 < len(batch) <= size for batch in batches)


def test_a_piece_of_work_has_a_seed_of_its_own():
    def draw(*parts: int | str) -> float:
        set_torch_seed(*parts)
        return float(torch.rand(1))

    assert draw(0, "begin", 1) == draw(0, "begin", 1)
    assert len({draw(0, "begin", 1), draw(0, "begin", 2), draw(1, "begin", 1), draw(0, "end", 1)}) == 4


def test_a_seed_is_that_of_torch():
    set_torch_seed(3, "step", 4)
    seed, got = torch.initial_seed(), torch.rand(5)
    torch.manual_seed(seed)
    assert torch.equal(got, torch.rand(5))
