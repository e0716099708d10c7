"""The move of old statistics against loops in numpy, and against moves that are known.

Shape letters: n examples, d width, j old rows.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lamina.maths.class_statistics import Statistics, moved, of_features
from lamina.maths.drift import compensated, drift, linear_map, local_moves, random_map

D, J = 5, 3


def random(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def old_rows(seed: int = 9) -> Statistics:
    return of_features(random(seed, 30, D), torch.arange(30) % J, J, class_covariance_rank=2)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_a_linear_drift_is_found_exactly_with_the_map_acting_on_columns():
    true_dd, before_nd = random(0, D, D), random(1, 40, D)
    after_nd = torch.stack([true_dd @ feature_d for feature_d in before_nd])
    close(linear_map(before_nd, after_nd), true_dd, 1e-8)


@pytest.mark.parametrize(("n", "d"), [(150, 100), (1500, 768)])
def test_a_linear_drift_of_many_features_is_undone_to_a_millionth(n: int, d: int):
    """As wide as features of four blocks, in the precision of features, with few examples, and none of the old outputs."""
    before_nd, old_nd = random(1, n, d).float(), random(9, 30, d)
    true_dd = torch.eye(d, dtype=torch.float64) + 0.3 * random(0, d, d) / d**0.5
    after_nd = (before_nd.double() @ true_dd.T).float()
    old = of_features(old_nd, torch.arange(30) % J, J)
    found, _ = compensated(old, before_nd, after_nd)
    expected = of_features(old_nd @ true_dd.T, torch.arange(30) % J, J)
    for value, wanted, start in zip(found[:3:2], expected[:3:2], old[:3:2], strict=True):
        assert (value - wanted).norm() < 1e-6 * (start - wanted).norm()


def test_it_moves_old_statistics_to_where_a_linear_drift_took_them():
    """Nothing of the old rows is seen after the drift, and all of their statistics are right."""
    true_dd, old_nd, before_nd = random(0, D, D), random(9, 30, D), random(1, 4000, D)
    found, _ = compensated(old_rows(), before_nd, before_nd @ true_dd.T)
    expected = of_features(old_nd @ true_dd.T, torch.arange(30) % J, J, class_covariance_rank=2)
    close(found.means_jd, expected.means_jd, 1e-8)
    close(found.scatter_dd, expected.scatter_dd, 1e-8)
    assert torch.equal(found.counts_j, expected.counts_j)


def loops(before: np.ndarray, after: np.ndarray, ridge: float) -> np.ndarray:
    gram = sum(np.outer(f, f) for f in before)
    cross = sum(np.outer(g - f, f) for f, g in zip(before, after, strict=True))
    return np.eye(D) + cross @ np.linalg.inv(gram + ridge * np.diag((before**2).sum(0)))


@pytest.mark.parametrize("n", [2, 5, 60])
@pytest.mark.parametrize("ridge", [1e-6, 0.03, 1.0])
def test_the_map_is_the_stated_one(n: int, ridge: float):
    before, after = random(0, n, D).numpy(), random(1, n, D).numpy()
    found = linear_map(torch.from_numpy(before), torch.from_numpy(after), (ridge,))
    np.testing.assert_allclose(found.numpy(), loops(before, after, ridge), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0, 10.0])
def test_the_ridge_is_that_of_the_smallest_error_of_maps_fitted_without_one_input(noise: float):
    true_dd, before = random(0, D, D), random(1, 12, D).numpy()
    after = before @ (torch.eye(D) + 0.1 * true_dd).numpy().T + noise * random(2, 12, D).numpy()
    scale = (before**2).mean(0) ** 0.5
    grid = (1e-8, 1e-3, 0.1, 1.0, 10.0)
    errors = []
    for ridge in grid:
        total = 0.0
        for i in range(len(before)):
            rest, moved_rest = np.delete(before, i, 0), np.delete(after, i, 0)
            cross = (moved_rest - rest).T @ rest
            # The penalty is that of all inputs.
            step = cross @ np.linalg.inv(rest.T @ rest + ridge * np.diag((before**2).sum(0)))
            total += ((((np.eye(D) + step) @ before[i] - after[i]) / scale) ** 2).sum()
        errors.append(total)
    best = grid[int(np.argmin(errors))]
    pairs = torch.from_numpy(before), torch.from_numpy(after)
    assert torch.equal(linear_map(*pairs, grid), linear_map(*pairs, (best,)))


def test_more_noise_gives_more_ridge_and_no_drift_gives_the_identity():
    before_nd = random(0, 30, D)
    assert torch.equal(linear_map(before_nd, before_nd), torch.eye(D, dtype=torch.float64))
    step_dd = linear_map(before_nd, before_nd + random(5, 30, D)) - torch.eye(D)
    assert step_dd.norm() < (linear_map(before_nd, before_nd + random(5, 30, D), (1e-8,)) - torch.eye(D)).norm()


def test_no_unit_of_a_feature_matters():
    before_nd, after_nd, old = random(0, 20, D), random(1, 20, D), old_rows()
    unit_d = torch.tensor([1.0, 100.0, 1e-3, 7.0, 1.0], dtype=torch.float64)
    here, _ = compensated(old, before_nd, after_nd)
    there, _ = compensated(moved(old, unit_d.diag()), before_nd * unit_d, after_nd * unit_d)
    close(there.means_jd / unit_d, here.means_jd, 1e-8)
    close(there.scatter_dd / unit_d / unit_d[:, None], here.scatter_dd, 1e-8)


def test_without_an_input_nothing_moves():
    empty_nd = torch.zeros(0, D)
    assert torch.equal(linear_map(empty_nd, empty_nd), torch.eye(D, dtype=torch.float64))


def test_local_moves_are_the_loop_they_stand_for():
    before, after, map_dd, means = random(0, 8, D), random(1, 8, D), random(2, D, D), random(3, J, D)
    expected = np.zeros((J, D))
    for j in range(J):
        cosines = [float(means[j] @ f / means[j].norm() / f.norm()) for f in before]
        weights = [math.exp(c / 0.07) for c in cosines]
        for f, g, weight in zip(before, after, weights, strict=True):
            expected[j] += max(0, *cosines) * weight / sum(weights) * (g - map_dd @ f).numpy()
    np.testing.assert_allclose(local_moves(means, before, after, map_dd).numpy(), expected, rtol=1e-9, atol=1e-12)


def test_local_moves_follow_the_neighbours_and_ignore_the_opposite():
    """All that is near the first mean moves by one step, which no linear map of two far places tells; the second mean
    looks the other way from every example."""
    eye_dd = torch.eye(2, dtype=torch.float64)
    before_nd = torch.tensor([[10.0, 0.1], [10, -0.1], [0, 10]])
    after_nd = before_nd + torch.tensor([[0.0, 3], [0, 3], [5, 0]])
    found = local_moves(torch.tensor([[9.0, 0], [-1, -1]]), before_nd, after_nd, eye_dd)
    close(found, torch.tensor([[0.0, 3], [0, 0]], dtype=torch.float64), 1e-3)


def test_the_four_kinds():
    old, before_nd, after_nd = old_rows(), random(0, 30, D), random(1, 30, D)
    same, identity = compensated(old, before_nd, after_nd, "none")
    assert same is old
    assert torch.equal(identity, torch.eye(D, dtype=torch.float64))
    linear, map_dd = compensated(old, before_nd, after_nd)
    close(linear.means_jd, old.means_jd @ map_dd.T)
    local, _ = compensated(old, before_nd, after_nd, "linear+local")
    close(local.means_jd - linear.means_jd, local_moves(old.means_jd, before_nd, after_nd, map_dd))
    assert torch.equal(local.scatter_dd, linear.scatter_dd)
    noisy, noise_dd = compensated(old, before_nd, after_nd, "random", torch.Generator().manual_seed(0))
    close(noisy.means_jd, old.means_jd @ noise_dd.T)
    assert not torch.allclose(noise_dd, map_dd)


def test_the_random_map_is_as_long_as_the_true_one_and_repeatable():
    map_dd = random(0, D, D)
    first, again = (random_map(map_dd, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    close((first - torch.eye(D)).norm(), (map_dd - torch.eye(D)).norm())
    assert not torch.equal(first, random_map(map_dd, torch.Generator().manual_seed(4)))


def test_the_reported_numbers():
    before_nd, after_nd = random(0, 7, D), random(1, 7, D)
    map_dd = random(2, D, D)
    found = drift(map_dd, before_nd, after_nd)
    cosines = [
        float((map_dd @ f) @ g / (map_dd @ f).norm() / g.norm()) for f, g in zip(before_nd, after_nd, strict=True)
    ]
    assert found.cosine == pytest.approx(np.mean(cosines))
    assert found.size == pytest.approx(float(np.sqrt(((map_dd.numpy() - np.eye(D)) ** 2).sum() / D)))
    assert drift(3 * torch.eye(D, dtype=torch.float64), before_nd, before_nd) == pytest.approx((2.0, 1.0))


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"shapes \(4, 5\) and \(3, 5\)"):
        linear_map(random(0, 4, D), random(0, 3, D))
    with pytest.raises(ValueError, match="give a generator"):
        compensated(old_rows(), random(0, 4, D), random(1, 4, D), "random")
