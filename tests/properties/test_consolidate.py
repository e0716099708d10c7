"""Average, shift and tail: what holds for any rows, orders and sizes, the degenerate ones above all.

Shape letters: n examples, d width, j rows, o outputs, i inputs.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.properties.test_linalg import SEEDS, close, random
from torch import Tensor

from lamina.maths import classifiers, drift, linalg, merging
from lamina.maths.class_statistics import Shrinkage, Statistics, concatenated, covariance, gaussians, moved, of_features

often = settings(deadline=None, max_examples=40, derandomize=True)
SHRINKAGES: st.SearchStrategy[Shrinkage] = st.sampled_from(["oas", 0.0, 0.1, 1.0])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed % 2**31)


@st.composite
def labelled(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Features (n, d), their rows (n,) and how many rows: down to one example each, one row, one dimension; and features
    that are constant over all examples, over those of a row, or in some dimensions, small, large or zero."""
    seed, d, rows = draw(SEEDS), draw(st.integers(1, 7)), draw(st.integers(1, 5))
    output_n = torch.arange(rows).repeat_interleave(torch.tensor([draw(st.integers(1, 6)) for _ in range(rows)]))
    output_n = output_n[torch.randperm(len(output_n), generator=seeded(seed))]
    features_nd = random(seed, rows, d)[output_n]
    match draw(st.sampled_from(["spread", "spread", "one dimension", "constant in rows", "constant", "zero"])):
        case "spread":
            features_nd = features_nd + random(seed + 1, len(output_n), d)
        case "one dimension":
            features_nd = features_nd + random(seed + 1, len(output_n), 1) * torch.eye(d, dtype=torch.float64)[0]
        case "constant":
            features_nd = features_nd[:1].expand(len(output_n), d)
        case "zero":
            features_nd = torch.zeros_like(features_nd)
    return (draw(st.sampled_from([1e-4, 1.0, 1e4])) * features_nd).float(), output_n, rows


def every_head(
    statistics: Statistics, shrinkage: Shrinkage, real: tuple[Tensor, Tensor] | None
) -> dict[str, classifiers.Classifier]:
    linear = classifiers.lda(statistics, shrinkage)
    ridge = classifiers.ridge(statistics, seeded(0), real, width=12, draws=6, shrinkage=shrinkage)
    return {
        "ncm": classifiers.ncm(statistics),
        "lda": linear,
        "lda with priors": classifiers.lda(statistics, shrinkage, "counts"),
        "ridge": ridge,
        "aligned": classifiers.aligned(statistics, seeded(0), steps=3, draws=4, shrinkage=shrinkage),
        "mixed": classifiers.mixed(linear, ridge, statistics, seeded(0), draws=3, shrinkage=shrinkage),
    }


@often
@given(labelled(), SHRINKAGES, st.integers(0, 4), st.booleans())
def test_every_head_of_any_statistics_gives_finite_scores_for_every_row(
    data: tuple[Tensor, Tensor, int], shrinkage: Shrinkage, class_covariance_rank: int, with_real: bool
):
    features_nd, output_n, rows = data
    statistics = of_features(*data, class_covariance_rank)
    assert statistics.class_factors_jdr.shape == (rows, features_nd.shape[1], class_covariance_rank)
    for name, head in every_head(statistics, shrinkage, (features_nd, output_n) if with_real else None).items():
        scores_nj = head.scores(features_nd)
        assert scores_nj.shape == (len(features_nd), rows), name
        assert scores_nj.dtype == torch.float64, name
        assert scores_nj.isfinite().all(), name
        assert all(part.isfinite().all() and part.is_contiguous() for part in head.tensors().values()), name


@often
@given(labelled(), SHRINKAGES)
def test_the_covariance_is_positive_and_whitened_to_the_identity(
    data: tuple[Tensor, Tensor, int], shrinkage: Shrinkage
):
    statistics = of_features(*data)
    cov_dd = covariance(statistics, shrinkage)
    assert torch.equal(cov_dd, cov_dd.T)
    values_d = torch.linalg.eigvalsh(cov_dd)
    assert values_d.max() > 0
    assert values_d.min() > -1e-13 * values_d.max()
    white = gaussians(statistics, shrinkage)
    found_dd = white.whiten_dd @ cov_dd @ white.whiten_dd
    torch.testing.assert_close(found_dd, torch.eye(len(cov_dd), dtype=torch.float64), atol=1e-2, rtol=0)
    white_jd = (statistics.means_jd - white.centre_d) @ white.whiten_dd
    close(
        white.features(white_jd) / (1 + statistics.means_jd.abs().max()),
        statistics.means_jd / (1 + statistics.means_jd.abs().max()),
    )


@often
@given(labelled(), SHRINKAGES, SEEDS)
def test_rows_in_another_order_give_their_scores_in_that_order(
    data: tuple[Tensor, Tensor, int], shrinkage: Shrinkage, seed: int
):
    """For heads that draw, where every row has examples: the drawing is in the order of the rows."""
    features_nd, output_n, rows = data
    order = torch.randperm(rows, generator=seeded(seed))
    place = order.argsort()
    first = every_head(of_features(features_nd, output_n, rows), shrinkage, (features_nd, output_n))
    second = every_head(of_features(features_nd, place[output_n], rows), shrinkage, (features_nd, place[output_n]))
    for name in ("ncm", "lda", "lda with priors", "ridge"):
        expected = first[name].scores(features_nd)[:, order]
        size = float(expected.abs().max()) + 1e-300
        torch.testing.assert_close(second[name].scores(features_nd) / size, expected / size, atol=1e-6, rtol=1e-6)


@often
@given(labelled(), st.integers(0, 3))
def test_tasks_one_after_another_are_all_examples_at_once(data: tuple[Tensor, Tensor, int], class_covariance_rank: int):
    features_nd, output_n, rows = data
    parts = [
        of_features(features_nd[output_n == j], output_n[output_n == j] - j, 1, class_covariance_rank)
        for j in range(rows)
    ]
    found = parts[0]
    for part in parts[1:]:
        found = concatenated(found, part)
    whole = of_features(*data, class_covariance_rank)
    assert torch.equal(found.counts_j, whole.counts_j)
    close(relative(found.means_jd, whole.means_jd), relative(whole.means_jd, whole.means_jd))
    close(relative(found.scatter_dd, whole.scatter_dd), relative(whole.scatter_dd, whole.scatter_dd))
    ours_jdd, whole_jdd = (part.class_factors_jdr @ part.class_factors_jdr.transpose(1, 2) for part in (found, whole))
    torch.testing.assert_close(relative(ours_jdd, whole_jdd), relative(whole_jdd, whole_jdd), atol=1e-5, rtol=1e-5)


def relative(found: Tensor, to: Tensor) -> Tensor:
    """In units of the largest entry of the other."""
    return found / (to.abs().max() + 1e-30)


def test_where_nothing_varies_within_rows_lda_is_the_nearest_mean():
    features_nd, others_nd = random(0, 5, 8).float(), random(1, 200, 8)
    statistics = of_features(features_nd, torch.arange(5), 5)
    assert torch.equal(
        classifiers.lda(statistics).scores(others_nd).argmax(1), classifiers.ncm(statistics).scores(others_nd).argmax(1)
    )


def test_what_rounding_leaves_of_constant_features_is_no_covariance():
    """Around 1000, float32 is right to 3e-5. An error of that size in one dimension does not make the others decisive."""
    output_n = torch.arange(3).repeat(10)
    features_nd = 1000 + random(0, 3, 4)[output_n]
    features_nd[:, 0] += 3e-5 * random(1, 30)
    statistics, others_nd = of_features(features_nd, output_n, 3), 1000 + random(2, 200, 4)
    lda, ncm = (
        head.scores(others_nd).argmax(1) for head in (classifiers.lda(statistics, 0.0), classifiers.ncm(statistics))
    )
    assert (lda == ncm).double().mean() > 0.97


@pytest.mark.parametrize("n", [1, 3])
def test_fewer_examples_than_dimensions_still_tell_rows_apart(n: int):
    output_n = torch.arange(4).repeat_interleave(n)
    places_jd = 10 * random(0, 4, 50)
    statistics = of_features(places_jd[output_n] + random(1, 4 * n, 50), output_n, 4, class_covariance_rank=2)
    others_nd, others_n = places_jd.repeat(20, 1) + random(2, 80, 50), torch.arange(4).repeat(20)
    for name, head in every_head(statistics, "oas", None).items():
        assert torch.equal(head.scores(others_nd).argmax(1), others_n), name


@often
@given(labelled(), st.integers(0, 9), st.sampled_from(["none", "linear", "linear+local", "random"]), SEEDS)
def test_any_shift_of_any_statistics_is_finite_and_keeps_counts(
    data: tuple[Tensor, Tensor, int], n: int, kind: drift.Kind, seed: int
):
    old = of_features(*data, class_covariance_rank=1)
    d = data[0].shape[1]
    before_nd = random(seed, max(n, 1), d)
    for after_nd in (before_nd, 0 * before_nd, random(seed + 1, *before_nd.shape), before_nd[:1].expand_as(before_nd)):
        for pair in ((before_nd, after_nd), (after_nd, before_nd)):
            new, map_dd = drift.compensated(old, *pair, kind, seeded(seed))
            assert all(part.isfinite().all() for part in new.tensors().values())
            assert torch.equal(new.counts_j, old.counts_j)
            found = drift.drift(map_dd, *pair)
            assert found.size >= 0
            assert -1.0001 < found.cosine < 1.0001


@often
@given(labelled(), SEEDS)
def test_features_that_stay_leave_old_rows_where_they_are(data: tuple[Tensor, Tensor, int], seed: int):
    old, same_nd = of_features(*data, class_covariance_rank=1), random(seed, 4, data[0].shape[1])
    for kind in ("linear", "linear+local"):
        new, map_dd = drift.compensated(old, same_nd, same_nd, kind)
        close(map_dd, torch.eye(len(map_dd), dtype=torch.float64))
        close(new.means_jd, old.means_jd)
        close(new.scatter_dd, old.scatter_dd)


@often
@given(labelled(), SEEDS)
def test_two_moves_are_one_by_the_product(data: tuple[Tensor, Tensor, int], seed: int):
    statistics, d = of_features(*data), data[0].shape[1]
    first_dd, second_dd = random(seed, d, d), random(seed + 1, d, d)
    twice, once = moved(moved(statistics, first_dd), second_dd), moved(statistics, second_dd @ first_dd)
    close(relative(twice.means_jd, once.means_jd), relative(once.means_jd, once.means_jd))
    close(relative(twice.scatter_dd, once.scatter_dd), relative(once.scatter_dd, once.scatter_dd))


@often
@given(
    st.integers(1, 6),
    st.integers(0, 8),
    st.integers(0, 8),
    st.floats(0.1, 10),
    st.sampled_from([None, 0.3, 1.0]),
    SEEDS,
)
def test_the_gate_of_any_moments_lies_between_nothing_and_its_cap(
    d: int, old: int, new: int, gamma: float, cap: float | None, seed: int
):
    """Also of moments of rank 0; so no output on an old or a new input ends outside the two it is between, in that measure."""
    inputs_old, inputs_new = random(seed, old, d), random(seed + 1, new, d)
    old_ii, new_ii = inputs_old.T @ inputs_old, inputs_new.T @ inputs_new
    for epsilon in (0.0, 1e-3):
        gate_ii = merging.gate(old_ii, new_ii, gamma, cap, epsilon)
        values_i = torch.linalg.eigvals(gate_ii)
        assert values_i.real.min() > -1e-4
        assert values_i.real.max() < (cap or 1) + 1e-4
        merged_oi, trained_oi = random(seed + 2, 3, d), random(seed + 3, 3, d)
        found = merging.weighted(merged_oi, trained_oi, old_ii, new_ii, gamma, cap, epsilon)
        assert found.shape == (3, d)
        close(found, merged_oi + (trained_oi - merged_oi) @ gate_ii)


@often
@given(st.integers(0, 200), st.floats(0.01, 10), st.floats(0, 1))
def test_shares_fall_from_one_to_the_least(t: int, gamma: float, least: float):
    now, later = merging.share(t, gamma, least), merging.share(t + 1, gamma, least)
    assert least <= later <= now <= 1
    assert merging.share(0, gamma, least) == 1


@often
@given(st.integers(1, 8), st.integers(0, 8), SEEDS)
def test_roots_multiply_back_to_the_matrix_and_to_the_projector_on_its_span(d: int, k: int, seed: int):
    half_dk = random(seed, d, min(k, d))
    positive_dd = half_dk @ half_dk.T
    root_dd, inverse_dd = linalg.roots_of(positive_dd)
    close(root_dd @ root_dd, positive_dd)
    close(root_dd, root_dd.T)
    projector_dd = root_dd @ inverse_dd
    torch.testing.assert_close(projector_dd @ half_dk, half_dk, atol=1e-6, rtol=1e-6)
    assert abs(float(projector_dd.trace()) - min(k, d)) < 1e-5
