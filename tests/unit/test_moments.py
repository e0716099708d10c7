"""Recording of inputs: while it is open and no longer. The sums themselves: tests/oracles/test_prototype_oracle.py."""

import pytest
import torch
from tests.tiny import noise
from torch import nn

from lamina.moments import SecondMoment, product, recording


def test_inputs_are_recorded_while_open_and_hooks_are_gone_afterwards():
    linear, x_btd = nn.Linear(4, 3), noise((2, 5, 4), "x")
    linear(x_btd)
    with recording({"a": linear}) as record, record.batch():
        y = linear(x_btd)
        assert not y.requires_grad
    assert record.moments["a"].count == 10
    linear(x_btd)
    assert record.moments["a"].count == 10
    with pytest.raises(RuntimeError, match="inside"), recording({"a": linear}) as record, record.batch():
        raise RuntimeError("inside")
    linear(x_btd)
    assert record.moments["a"].count == 0
    assert linear(x_btd).requires_grad


def test_the_sum_is_kept_in_double_precision_whatever_comes_in():
    """A million additions of a bfloat16 one would stop at 256 in its own precision, and drift in float32."""
    moment = SecondMoment()
    for _ in range(300):
        moment.add(*product(torch.ones(1, 1, 2, dtype=torch.bfloat16)))
    assert moment.sum_dd.dtype == torch.float64
    assert moment.sum_dd.tolist() == [[300.0, 300.0], [300.0, 300.0]]
    assert moment.mean_dd.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_inputs_without_a_token_axis_count_as_one_token_each():
    moment, x_bd = SecondMoment(), noise((6, 3), "flat")
    moment.add(*product(x_bd))
    assert moment.count == 6
    torch.testing.assert_close(moment.sum_dd, (x_bd.T @ x_bd).double())


def test_what_is_seen_of_a_batch_in_two_pieces_adds_up_in_either_order():
    linear, x_btd = nn.Linear(4, 3), noise((7, 5, 4), "x")
    found = []
    for pieces in ([x_btd], x_btd.split([3, 4]), x_btd.split([3, 4])[::-1]):
        with recording({"a": linear, "unused": nn.Linear(2, 2)}) as record:
            for _ in range(2):
                with record.batch():
                    for piece in pieces:
                        linear(piece)
        found.append(record.moments["a"])
    assert [moment.count for moment in found] == [70, 70, 70]
    torch.testing.assert_close(found[1].mean_dd, found[0].mean_dd)
    assert torch.equal(found[2].mean_dd, found[1].mean_dd)
