"""Averages along a chain against their unrolled form, and the weighted one against its objective.

TIES and DARE entry by entry. Shape letters: o outputs, i inputs.
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamina.maths.merging import agreeing, dropped, exponential, gate, share, trimmed, weighted

OUT, IN = 3, 5


def random(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def moment(seed: int, samples: int = 20) -> Tensor:
    inputs_ni = random(seed, samples, IN)
    return inputs_ni.T @ inputs_ni


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("a", [0.15, 0.3, 1.0])
@pytest.mark.parametrize("n", [0, 1, 6])
def test_the_exponential_average_unrolls_as_stated(a: float, n: int):
    """The first task's weights are taken whole: M_0 = w_0; from there on a is constant."""
    chain = [random(s, OUT, IN) for s in range(n + 1)]
    merged = chain[0]
    for trained in chain[1:]:
        merged = exponential(merged, trained, a)
    expected = chain[0].numpy().copy()
    for s in range(1, n + 1):
        expected += (1 - (1 - a) ** (n - s + 1)) * (chain[s] - chain[s - 1]).numpy()
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_gamma_one_without_a_least_is_the_running_mean():
    chain = [random(s, OUT, IN) for s in range(7)]
    merged = torch.zeros(OUT, IN)
    for t, trained in enumerate(chain):
        merged = exponential(merged, trained, share(t, gamma=1, least=0))
    np.testing.assert_allclose(merged.numpy(), np.mean([w.numpy() for w in chain], 0), rtol=1e-12)


def test_shares_are_whole_in_the_first_task_and_never_below_the_least():
    assert [share(t, gamma=2, least=0.3) for t in range(6)] == [1, 2 / 3, 0.5, 0.4, 2 / 6, 0.3]


def test_float32_is_averaged_in_float64():
    assert exponential(torch.ones(1, 1), torch.full((1, 1), 1 + 2**-20), 2**-10).item() == 1 + 2**-30


@pytest.mark.parametrize("samples", [20, 3])
@pytest.mark.parametrize(("gamma", "epsilon"), [(1.0, 1e-3), (3.0, 0.1), (2.0, 0.0)])
def test_the_weighted_average_minimises_its_objective(samples: int, gamma: float, epsilon: float):
    merged, trained, old, new = random(0, OUT, IN), random(1, OUT, IN), moment(2, samples), moment(3, samples)
    ridge = epsilon * (old + gamma * new).trace() / IN * torch.eye(IN, dtype=torch.float64)
    found = weighted(merged, trained, old, new, gamma, epsilon=epsilon).requires_grad_()
    from_old, from_new = found - merged, found - trained
    objective = (from_old @ (old + ridge) @ from_old.T).trace() + gamma * (from_new @ new @ from_new.T).trace()
    (slope,) = torch.autograd.grad(objective, found)
    assert slope.abs().max() < 1e-9 * float((old + gamma * new).norm())


def test_the_weighted_average_is_the_stated_inverse():
    merged, trained, old, new = random(0, OUT, IN), random(1, OUT, IN), moment(2), moment(3)
    total = (old + 2 * new).numpy()
    total = total + 1e-3 * np.trace(total) / IN * np.eye(IN)
    expected = merged.numpy() + (trained - merged).numpy() @ (2 * new.numpy()) @ np.linalg.inv(total)
    np.testing.assert_allclose(weighted(merged, trained, old, new, 2.0).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize(("gamma", "ratio"), [(1.0, 1.0), (2.0, 3.0), (0.5, 0.1)])
def test_proportional_moments_make_it_exponential(gamma: float, ratio: float):
    merged, trained, new = random(0, OUT, IN), random(1, OUT, IN), moment(3)
    found = weighted(merged, trained, ratio * new, new, gamma, epsilon=0)
    close(found, exponential(merged, trained, gamma / (ratio + gamma)))


def test_what_only_the_new_task_uses_is_taken_whole_and_what_none_uses_stays():
    old, new = torch.diag(torch.tensor([1.0, 1, 0, 0, 0])), torch.diag(torch.tensor([0.0, 1, 1, 0, 0]))
    close(gate(old, new, epsilon=0), torch.diag(torch.tensor([0, 0.5, 1, 0, 0], dtype=torch.float64)))


def test_a_cap_bounds_the_eigenvalues_and_leaves_those_below_it():
    old, new = moment(2), moment(3)
    free, capped = (torch.linalg.eigvals(gate(old, new, cap=cap)).real.sort().values for cap in (None, 0.5))
    assert free[-1] > 0.55, "or the cap has nothing to do"
    assert free[0] < 0.45
    close(capped, free.clamp_max(0.5))
    close(gate(old, new, cap=1.0), gate(old, new))


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="gamma is 0"):
        share(3, gamma=0)
    with pytest.raises(ValueError, match="cap 2, but"):
        gate(moment(0), moment(1), cap=2)


Matrix = NDArray[np.float64]


def ties_by_hand(updates: Sequence[Matrix], density: float) -> Matrix:
    """Trims, elects a sign, and takes the mean of those that have it, entry by entry."""
    trimmed_updates = []
    for update in updates:
        sizes = sorted((abs(value) for value in update.ravel()), reverse=True)
        least = sizes[max(1, round(density * len(sizes))) - 1]
        trimmed_updates.append([[v if abs(v) >= least else 0.0 for v in line] for line in update.tolist()])
    merged = np.zeros_like(updates[0])
    for o, i in np.ndindex(*merged.shape):
        values = [update[o][i] for update in trimmed_updates]
        total = sum(values)
        agree = [value for value in values if value * total > 0]
        merged[o, i] = sum(agree) / len(agree) if agree else 0.0
    return merged


def dare_by_hand(update: Matrix, draws: NDArray[np.float32], density: float) -> Matrix:
    """Keeps an entry where the draw is below the density, and divides it by the density."""
    kept = np.zeros_like(update)
    for place in np.ndindex(*update.shape):
        if draws[place] < density:
            kept[place] = update[place] / density
    return kept


@pytest.mark.parametrize("density", [0.01, 0.2, 0.55, 1.0])
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_ties_trims_elects_and_averages_as_by_hand(tasks: int, density: float):
    updates = [random(seed, OUT, IN) for seed in range(tasks)]
    found = agreeing([trimmed(update, density) for update in updates])
    np.testing.assert_allclose(found.numpy(), ties_by_hand([u.numpy() for u in updates], density), rtol=1e-12)
    if tasks == 1 and density == 1.0:
        assert torch.equal(found, updates[0])


def test_conflicting_entries_have_the_sign_of_their_sum_and_none_where_they_cancel():
    updates = [torch.tensor([[3.0, 1.0, 0.0, 2.0]]), torch.tensor([[-1.0, -1.0, 0.0, 4.0]])]
    assert agreeing(updates).tolist() == [[3.0, 0.0, 0.0, 3.0]]


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_dare_keeps_a_share_of_the_entries_and_the_mean_of_all(density: float):
    update, draws = random(0, 60, 50), torch.rand(60, 50, generator=torch.Generator().manual_seed(3))
    found = dropped(update, density, torch.Generator().manual_seed(3))
    np.testing.assert_allclose(found.numpy(), dare_by_hand(update.numpy(), draws.numpy(), density), rtol=1e-12)
    assert float((found != 0).double().mean()) == pytest.approx(density, abs=0.04)
    ones = torch.ones(200, 200, dtype=torch.float64)
    assert float(dropped(ones, density, torch.Generator().manual_seed(1)).mean()) == pytest.approx(1, abs=0.05)
