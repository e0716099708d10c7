"""Statistics of the rows of a head against loops in numpy, and their move by a map against moving every example.

Shape letters: n examples, d width, j rows, r rank.
"""

import numpy as np
import pytest
import torch

from lamina.maths.class_statistics import (
    Statistics,
    concatenated,
    covariance,
    gaussians,
    moved,
    oas,
    of_features,
)

ROWS, WIDTH = 4, 6


def features(seed: int = 0, n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Correlated features around a place per row; rows of unequal size, every one with some."""
    random = np.random.default_rng(seed)
    output_n = np.concatenate([np.arange(ROWS), random.choice(ROWS, n - ROWS, p=[0.1, 0.2, 0.3, 0.4])])
    places_jd = 3 * random.normal(size=(ROWS, WIDTH)) + 5
    return places_jd[output_n] + random.normal(size=(n, WIDTH)) @ random.normal(size=(WIDTH, WIDTH)), output_n


def ours(features_nd: np.ndarray, output_n: np.ndarray, class_covariance_rank: int = 0) -> Statistics:
    return of_features(torch.from_numpy(features_nd), torch.from_numpy(output_n), ROWS, class_covariance_rank)


def loops(features_nd: np.ndarray, output_n: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    means_jd, counts_j, scatter_dd = np.zeros((ROWS, WIDTH)), np.zeros(ROWS), np.zeros((WIDTH, WIDTH))
    for j in range(ROWS):
        members = [feature_d for feature_d, row in zip(features_nd, output_n, strict=True) if row == j]
        counts_j[j] = len(members)
        for feature_d in members:
            means_jd[j] += feature_d / len(members)
        for feature_d in members:
            scatter_dd += np.outer(feature_d - means_jd[j], feature_d - means_jd[j])
    return means_jd, counts_j, scatter_dd


def same(found: torch.Tensor, expected: np.ndarray, rtol: float = 1e-9) -> None:
    np.testing.assert_allclose(
        found.double().numpy(), expected, rtol=rtol, atol=rtol * max(1.0, np.abs(expected).max())
    )


def test_means_counts_and_scatter_are_those_of_a_loop():
    statistics, (means_jd, counts_j, scatter_dd) = ours(*features()), loops(*features())
    same(statistics.means_jd, means_jd)
    same(statistics.counts_j, counts_j)
    same(statistics.scatter_dd, scatter_dd)
    assert statistics.class_factors_jdr.shape == (ROWS, WIDTH, 0)


def test_own_parts_are_the_leading_part_of_each_rows_covariance():
    features_nd, output_n = features()
    statistics = ours(features_nd, output_n, 3)
    for j in range(ROWS):
        values_d, vectors_dd = np.linalg.eigh(np.cov(features_nd[output_n == j].T))
        leading_dd = vectors_dd[:, -3:] @ np.diag(values_d[-3:]) @ vectors_dd[:, -3:].T
        same(statistics.class_factors_jdr[j] @ statistics.class_factors_jdr[j].T, leading_dd, 1e-5)


def test_a_row_of_two_examples_has_an_own_part_of_rank_one():
    statistics = of_features(
        torch.tensor([[0.0, 0, 0], [2, 0, 0]]), torch.zeros(2, dtype=torch.int64), 1, class_covariance_rank=3
    )
    expected = torch.zeros(3, 3)
    expected[0, 0] = 2**0.5
    torch.testing.assert_close(statistics.class_factors_jdr[0].abs(), expected)


def test_a_linear_map_moves_them_to_those_of_the_moved_examples():
    """Means, scatter, own parts, and what ridge regression is made of: Gram and cross matrix of all the examples."""
    features_nd, output_n = features()
    map_dd = np.random.default_rng(1).normal(size=(WIDTH, WIDTH))
    after_nd = np.stack([map_dd @ feature_d for feature_d in features_nd])
    found = moved(ours(features_nd, output_n, WIDTH), torch.from_numpy(map_dd))
    means_jd, _, scatter_dd = loops(after_nd, output_n)
    same(found.means_jd, means_jd)
    same(found.scatter_dd, scatter_dd)
    for j in range(ROWS):
        same(found.class_factors_jdr[j] @ found.class_factors_jdr[j].T, np.cov(after_nd[output_n == j].T), 1e-5)
    indicators_nj = np.eye(ROWS)[output_n]
    counted_dj = (found.means_jd * found.counts_j[:, None]).T
    same(found.scatter_dd + counted_dj @ found.means_jd, after_nd.T @ after_nd)
    same(counted_dj, after_nd.T @ indicators_nj)


def test_joining_is_the_statistics_of_all_examples():
    features_nd, output_n = features()
    first = output_n < 2
    old = of_features(torch.from_numpy(features_nd[first]), torch.from_numpy(output_n[first]), 2, 2)
    new = of_features(torch.from_numpy(features_nd[~first]), torch.from_numpy(output_n[~first]) - 2, 2, 2)
    whole = ours(features_nd, output_n, 2).tensors()
    for name, found in concatenated(old, new).tensors().items():
        same(found, whole[name].numpy())


@pytest.mark.parametrize("d", [2, 5, 30])
def test_oas_is_equation_23(d: int):
    random = np.random.default_rng(d)
    n = 12
    cov = np.cov(random.normal(size=(d, n)) * np.linspace(1, 5, d)[:, None])
    tr2, trace = np.trace(cov @ cov), np.trace(cov)
    expected = ((1 - 2 / d) * tr2 + trace**2) / ((n + 1 - 2 / d) * (tr2 - trace**2 / d))
    assert oas(torch.from_numpy(cov), n) == pytest.approx(min(1, expected), rel=1e-9)
    assert 0 < oas(torch.from_numpy(cov), n) < oas(torch.from_numpy(cov), 3) <= 1


def test_oas_is_scikit_learns_but_for_a_term_that_vanishes_with_the_width():
    from sklearn.covariance import OAS

    features_nd = np.random.default_rng(0).normal(size=(30, 200)) * np.linspace(1, 3, 200)
    theirs = OAS(assume_centered=True).fit(features_nd)
    cov = torch.from_numpy(features_nd.T @ features_nd / 30)
    assert oas(cov, 30) == pytest.approx(theirs.shrinkage_, rel=0.01)


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_the_covariance_is_shrunk_by_the_number_given(rho: float):
    statistics, (_, counts_j, scatter_dd) = ours(*features()), loops(*features())
    cov = scatter_dd / (counts_j.sum() - ROWS)
    expected = (1 - rho) * cov + rho * np.trace(cov) / WIDTH * np.eye(WIDTH)
    same(covariance(statistics, rho), expected)
    by_oas = oas(torch.from_numpy(cov), int(counts_j.sum()) - ROWS)
    same(covariance(statistics, "oas"), covariance(statistics, by_oas).numpy())


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_features_of_several_blocks_are_shrunk_towards_the_variance_of_their_block(rho: float):
    features_nd, output_n = features()
    wide_nd = np.hstack([features_nd, 50 * features_nd[:, ::-1] + features_nd**2])
    statistics = of_features(torch.from_numpy(wide_nd), torch.from_numpy(output_n), ROWS, blocks=2)
    cov = statistics.scatter_dd.numpy() / (len(output_n) - ROWS)
    target = np.diag(np.repeat([np.trace(cov[:WIDTH, :WIDTH]), np.trace(cov[WIDTH:, WIDTH:])], WIDTH)) / WIDTH
    same(covariance(statistics, rho), (1 - rho) * cov + rho * target)
    scale = np.sqrt(target.diagonal())
    by_oas = oas(torch.from_numpy(cov / scale / scale[:, None]), len(output_n) - ROWS)
    same(covariance(statistics, "oas"), covariance(statistics, by_oas).numpy())


def test_draws_have_the_means_and_covariances_that_are_said():
    statistics = ours(*features(), class_covariance_rank=2)
    white = gaussians(statistics, 0.1)
    share, n = 0.4, 40_000
    drawn = white.features(white.draws(torch.tensor([2, 0]), n, torch.Generator().manual_seed(0), share)).numpy()
    for found_nd, j in zip(drawn, (2, 0), strict=True):
        own_dr = statistics.class_factors_jdr[j].double()
        expected = ((1 - share) * covariance(statistics, 0.1) + share * own_dr @ own_dr.T).numpy()
        assert (
            np.abs(found_nd.mean(0) - statistics.means_jd[j].numpy()).max() < 5 * (expected.diagonal() / n).max() ** 0.5
        )
        assert np.abs(np.cov(found_nd.T) - expected).max() < 0.05 * expected.diagonal().max()


def test_without_own_parts_the_share_counts_for_nothing():
    white = gaussians(ours(*features()))
    with_share, without = (white.draws(torch.arange(4), 3, torch.Generator().manual_seed(1), s) for s in (0.9, 0.0))
    assert torch.equal(with_share, without)


def test_bytes_are_those_of_the_tensors_saved():
    statistics = ours(*features(), class_covariance_rank=2)
    saved = sum(t.numel() * t.element_size() for t in statistics.tensors().values())
    assert saved == 8 * (ROWS * WIDTH + ROWS + WIDTH**2) + 4 * ROWS * WIDTH * 2


def test_errors_say_what_is_wrong():
    rows = torch.tensor([0, 0, 2])
    with pytest.raises(ValueError, match="output 1 has no example"):
        of_features(torch.zeros(3, 2), rows, 3)
    with pytest.raises(ValueError, match="from 0 to 2 are named, but they go from 0 to 1"):
        of_features(torch.zeros(3, 2), rows, 2)
    with pytest.raises(ValueError, match=r"\(4, 2\) with outputs of shape \(3,\)"):
        of_features(torch.zeros(4, 2), rows, 3)
    with pytest.raises(ValueError, match="cannot be concatenated"):
        concatenated(ours(*features()), ours(*features(), class_covariance_rank=1))
    with pytest.raises(ValueError, match=r"shrinkage is 1\.5"):
        covariance(ours(*features()), 1.5)
