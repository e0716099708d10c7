"""Recording of inputs: within the context and no longer. The sums themselves: tests/oracles/test_prototype_oracle.py."""

import pytest
import torch
from tests.tiny import noise
from torch import nn

from lamina.learner.moments import SecondMoment, Watcher, recording


def test_inputs_are_recorded_within_the_context_and_hooks_are_gone_afterwards():
    linear, x_btd = nn.Linear(4, 3), noise((2, 5, 4), "x")
    linear(x_btd)
    with recording({"a": linear}) as record:
        y = linear(x_btd)
        assert not y.requires_grad
    assert record.moments["a"].count == 10
    linear(x_btd)
    assert record.moments["a"].count == 10
    with pytest.raises(RuntimeError, match="inside"), recording({"a": linear}) as record:
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


def test_only_real_tokens_count():
    """The mask is that of the batch at hand; a layer that is used twice is counted twice."""
    linear, x_btd = nn.Linear(4, 3), noise((2, 3, 4), "x")
    with recording({"a": linear, "unused": nn.Linear(2, 2)}) as record:
        record.mask_bt = torch.tensor([[1, 1, 0], [1, 0, 0]])
        linear(x_btd)
        linear(x_btd)
        record.mask_bt = None
        linear(x_btd)
    real_nd = torch.stack([x_btd[0, 0], x_btd[0, 1], x_btd[1, 0]])
    tokens_nd = torch.cat([real_nd, real_nd, x_btd.reshape(-1, 4)])
    assert record.moments["a"].count == 12
    torch.testing.assert_close(record.moments["a"].mean_dd, (tokens_nd.T @ tokens_nd).double() / 12)
    with pytest.raises(ValueError, match="no input was seen"):
        _ = record.moments["unused"].mean_dd


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_lose_nothing_and_leave_no_setting_behind(dtype: torch.dtype):
    """Float32 numbers are never rounded to bf16."""
    inputs_btd = torch.randn(40, 17, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens_nd = inputs_btd.reshape(-1, 24).double()
    moment = SecondMoment()
    moment.add(inputs_btd, None)
    torch.testing.assert_close(moment.mean_dd, tokens_nd.T @ tokens_nd / len(tokens_nd), rtol=1e-5, atol=1e-6)
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_watcher_changes_nothing_and_sees_no_gradient():
    linear, x_bi, seen = nn.Linear(4, 3), noise((2, 4), "x").requires_grad_(), list[torch.Tensor]()
    before = linear(x_bi)
    linear.register_forward_pre_hook(Watcher(lambda x_bi: seen.append(2 * x_bi)))
    assert torch.equal(linear(x_bi), before)
    assert torch.equal(seen[0], 2 * x_bi)
    assert not seen[0].requires_grad
