"""Subspaces: what the functions promise, for any basis and any symmetric matrix.

Shape letters: d size of the space, k columns of a basis, r rank.
"""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lamina.maths import linalg

often = settings(deadline=None, max_examples=40, derandomize=True)
SIZES = st.integers(1, 9)
SEEDS = st.integers(0, 2**32 - 1)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def random(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def basis(seed: int, d: int, k: int) -> Tensor:
    return torch.linalg.qr(random(seed, d, d))[0][:, :k]


def with_rank(seed: int, d: int, k: int) -> Tensor:
    factors_dk = basis(seed, d, k) * (1 + torch.arange(k, dtype=torch.float64))
    return factors_dk @ factors_dk.T


@st.composite
def spaces(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    d = draw(SIZES)
    k = draw(st.integers(0, d))
    return basis(draw(SEEDS), d, k), d, k


@often
@given(spaces(), SEEDS)
def test_kept_and_removed_parts_add_up_and_are_orthogonal(space: tuple[Tensor, int, int], seed: int):
    basis_dk, d, _ = space
    matrix_do = random(seed, d, 3)
    kept, removed = linalg.keep_span(matrix_do, basis_dk), linalg.remove_span(matrix_do, basis_dk)
    close(kept + removed, matrix_do)
    close(linalg.keep_span(kept, basis_dk), kept)
    close(linalg.remove_span(removed, basis_dk), removed)
    close(kept.T @ removed, torch.zeros(3, 3, dtype=torch.float64))
    close(basis_dk.T @ removed, torch.zeros(basis_dk.shape[1], 3, dtype=torch.float64))


@often
@given(spaces())
def test_a_complement_completes_the_space(space: tuple[Tensor, int, int]):
    basis_dk, d, k = space
    rest = linalg.complement(basis_dk)
    assert rest.shape == (d, d - k)
    whole_dd = torch.cat([basis_dk, rest], 1)
    close(whole_dd.T @ whole_dd, torch.eye(d, dtype=torch.float64))
    close(linalg.keep_span(torch.eye(d, dtype=torch.float64), rest), torch.eye(d) - basis_dk @ basis_dk.T)


@often
@given(SIZES, SEEDS)
def test_eigenvalues_come_sorted_and_rebuild_the_matrix(d: int, seed: int):
    half_dd = random(seed, d, d)
    values_d, vectors_dd = linalg.sorted_eigh(half_dd @ half_dd.T)
    assert (values_d >= 0).all()
    assert (values_d.diff() <= 0).all()
    close(vectors_dd @ vectors_dd.T, torch.eye(d, dtype=torch.float64))
    close(vectors_dd * values_d @ vectors_dd.T, half_dd @ half_dd.T)


@often
@given(st.integers(2, 9), SEEDS, st.data())
def test_top_eigenvectors_hold_the_most_energy_and_are_zero_where_there_is_none(d: int, seed: int, data: st.DataObject):
    k, rank = data.draw(st.integers(1, d)), data.draw(st.integers(1, d + 2))
    matrix_dd = with_rank(seed, d, k)
    top_dr = linalg.top_eigenvectors(matrix_dd, rank)
    assert top_dr.shape == (d, rank)
    found = min(rank, k)
    close(top_dr[:, found:], torch.zeros(d, rank - found, dtype=torch.float64))
    close(top_dr[:, :found].T @ top_dr[:, :found], torch.eye(found, dtype=torch.float64))
    largest = torch.linalg.eigvalsh(matrix_dd).flip(0)[:found]
    close(torch.diag(top_dr[:, :found].T @ matrix_dd @ top_dr[:, :found]), largest)


def test_a_matrix_without_energy_has_no_directions():
    assert torch.count_nonzero(linalg.top_eigenvectors(torch.zeros(4, 4), 2)) == 0
    assert linalg.top_eigenvectors(torch.zeros(4, 4), 2).shape == (4, 2)


@often
@given(st.lists(st.integers(0, 20), max_size=8), st.integers(0, 40), st.integers(-5, 120))
def test_steps_to_reach_is_the_loop_it_stands_for(values: list[int], start: int, goal: int):
    reached, steps = start, 0
    while reached < goal and steps < len(values):
        reached += values[steps]
        steps += 1
    assert linalg.steps_to_reach(torch.tensor(values, dtype=torch.float64), start, goal) == steps


@st.composite
def clouds(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Points (n, d) around a few places, some of them equal; how many centres; a seed."""
    seed, d, places = draw(SEEDS), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    n = draw(st.integers(1, 40))
    points_nd = random(seed, places, d)[random(seed + 1, n).abs().mul(7).long() % places] * 3
    if draw(st.booleans()):
        points_nd = points_nd + 0.1 * random(seed + 2, n, d)
    return points_nd, draw(st.integers(1, 7)), seed % 2**31


def inertia(points_nd: Tensor, centres_kd: Tensor) -> float:
    return float((points_nd[:, None] - centres_kd).square().sum(2).amin(1).sum())


@often
@given(clouds())
def test_kmeans_stands_still_and_is_a_function_of_the_seed(cloud: tuple[Tensor, int, int]):
    points_nd, count, seed = cloud
    centres_kd = linalg.kmeans(points_nd, count, torch.Generator().manual_seed(seed))
    distinct = len(points_nd.unique(dim=0))
    assert centres_kd.shape == (min(count, distinct), points_nd.shape[1])
    assert torch.equal(centres_kd, linalg.kmeans(points_nd, count, torch.Generator().manual_seed(seed)))
    close(linalg.lloyd(points_nd, centres_kd, 1), centres_kd)
    starts_kd = linalg.spread_points(points_nd, count, torch.Generator().manual_seed(seed))
    assert len(starts_kd.unique(dim=0)) == len(starts_kd)
    assert inertia(points_nd, centres_kd) <= inertia(points_nd, starts_kd) + 1e-9
    if count >= distinct:
        assert inertia(points_nd, centres_kd) < 1e-18


@often
@given(st.integers(0, 2**31), st.integers(2, 5))
def test_lloyd_from_the_same_start_is_scikit_learns(seed: int, count: int):
    from sklearn.cluster import KMeans

    points_nd = random(seed, 60, 3)
    starts_kd = linalg.spread_points(points_nd, count, torch.Generator().manual_seed(seed))
    theirs = KMeans(count, init=starts_kd.numpy(), n_init=1, tol=0, max_iter=300).fit(points_nd.numpy())
    ours_kd = linalg.lloyd(points_nd, starts_kd)
    assert abs(inertia(points_nd, ours_kd) - theirs.inertia_) < 1e-6 * theirs.inertia_
    close(ours_kd, torch.from_numpy(theirs.cluster_centers_))


def test_kmeans_finds_what_scikit_learn_finds():
    """Well apart, and over many clouds of no shape not worse on the whole."""
    from sklearn.cluster import KMeans

    places_kd = 20 * random(0, 5, 8)
    points_nd = places_kd.repeat(30, 1) + random(1, 150, 8)
    centres_kd = linalg.kmeans(points_nd, 5, torch.Generator().manual_seed(0))
    order = torch.cdist(places_kd, centres_kd).argmin(1)
    assert (centres_kd[order] - places_kd).abs().max() < 1
    ours, theirs = 0.0, 0.0
    for seed in range(20):
        points_nd = random(seed, 80, 4)
        ours += inertia(points_nd, linalg.kmeans(points_nd, 5, torch.Generator().manual_seed(seed)))
        theirs += KMeans(5, random_state=seed, n_init=1).fit(points_nd.numpy()).inertia_
    assert ours < 1.03 * theirs


def test_a_centre_that_loses_all_its_points_gets_others():
    points_nd = torch.tensor([[10.0], [10.1], [15.0], [15.1]], dtype=torch.float64)
    starts_kd = torch.tensor([[10.05], [19.0], [-9.0]], dtype=torch.float64)  # nothing is nearest to the last
    assert inertia(points_nd, linalg.lloyd(points_nd, starts_kd)) < 0.006, "of two pairs 0.01, half with a third centre"


@often
@given(st.lists(st.floats(-4, 4), max_size=8), st.floats(0, 3))
def test_the_soft_threshold_is_the_best_trade_between_staying_and_shrinking(values: list[float], threshold: float):
    """It makes (z - x)² / 2 + ξ |z| smallest: no worse than any other z, 0 and x among them."""
    x = torch.tensor(values, dtype=torch.float64)

    def cost(z: Tensor) -> Tensor:
        return (z - x).square() / 2 + threshold * z.abs()

    found = linalg.soft_threshold(x, threshold)
    grid = torch.linspace(-5, 5, 101, dtype=torch.float64)[:, None].expand(-1, len(x))
    others = torch.cat([grid, x[None], 0.99 * found[None]])
    assert (cost(found) <= cost(others) + 1e-12).all()
    assert torch.count_nonzero(found[x.abs() <= threshold]) == 0
    close(found, torch.nn.functional.softshrink(x, threshold))


# ----------------------------------------------------------------------------------------------------- merged changes


@often
@given(SIZES, SIZES, st.integers(0, 9), SEEDS)
def test_factors_rebuild_the_matrix_with_its_rank(o: int, i: int, k: int, seed: int):
    matrix_oi = random(seed, o, k) @ random(seed + 1, k, i)
    up_or, down_ri = linalg.factors_of(matrix_oi)
    rank = int(torch.linalg.matrix_rank(matrix_oi)) if k else 0
    assert (up_or.shape, down_ri.shape) == ((o, max(1, rank)), (max(1, rank), i))
    torch.testing.assert_close(up_or @ down_ri, matrix_oi, atol=2e-6 * float(matrix_oi.norm()), rtol=0)
    close(up_or.norm(), down_ri.norm())
