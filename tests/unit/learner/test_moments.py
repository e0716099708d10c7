"""Recording of inputs: while it is open and no longer. The sums themselves: tests/oracles/test_prototype_oracle.py."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.tiny import noise
from torch import nn

from lamina.learner.moments import SecondMoment, recording


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
        moment.add(torch.ones(1, 1, 2, dtype=torch.bfloat16), None)
    assert moment.sum_dd.dtype == torch.float64
    assert moment.sum_dd.tolist() == [[300.0, 300.0], [300.0, 300.0]]
    assert moment.mean_dd.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_inputs_without_a_token_axis_count_as_one_token_each():
    moment, x_bd = SecondMoment(), noise((6, 3), "flat")
    moment.add(x_bd, None)
    assert moment.count == 6
    torch.testing.assert_close(moment.sum_dd, (x_bd.T @ x_bd).double())


def test_what_two_threads_see_of_a_batch_adds_up_in_whatever_order():
    """Of a map that is used twice, too. The second inputs are so much larger that float64 rounds the sum of both."""
    linear, x_btd = nn.Linear(4, 3), noise((7, 5, 4), "x")
    pieces = x_btd.split([3, 4])
    found = []
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for turns in ([one, other, one, other], [other, one, one, other], [one, one, other, other]):
            with recording({"a": linear, "unused": nn.Linear(2, 2)}) as record:
                for _ in range(2):
                    with record.batch():
                        for turn, thread in enumerate(turns):
                            scale = 1e8 if thread in turns[:turn] else 1.0
                            thread.submit(linear, scale * pieces[thread is other]).result()
            found.append(record.moments["a"])
    assert [moment.count for moment in found] == [140, 140, 140]
    x_nd = x_btd.reshape(-1, 4).double()
    torch.testing.assert_close(found[0].mean_dd, (1 + 1e16) * x_nd.T @ x_nd / 70, rtol=1e-4, atol=1e9)
    assert torch.equal(found[1].mean_dd, found[0].mean_dd)
    assert torch.equal(found[2].mean_dd, found[0].mean_dd)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_lose_nothing_and_leave_no_setting_behind(dtype: torch.dtype):
    """Float32 numbers are never read as bf16 ones, and those that are bf16 already may be."""
    inputs_btd = torch.randn(40, 17, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows_nd = inputs_btd.reshape(-1, 24).double()
    moment = SecondMoment()
    moment.add(inputs_btd, None)
    torch.testing.assert_close(moment.mean_dd, rows_nd.T @ rows_nd / len(rows_nd), rtol=1e-5, atol=1e-6)
    assert torch.get_float32_matmul_precision() == "highest"
