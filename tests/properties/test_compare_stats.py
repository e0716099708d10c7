"""The statistics of a comparison, against what they must be whatever the figures, against scipy, and by simulation."""

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from lamina.compare.stats import (
    DRAWS,
    LEAST_UNITS,
    Spread,
    coverage,
    holm,
    interval,
    mean_and_spread,
    paired,
    permutation_p,
    spread_by_source,
    subset_means,
    units_for,
)

often = settings(deadline=None, max_examples=40, derandomize=True)
shares = st.floats(-1, 1, allow_nan=False).map(lambda x: round(x, 6))
some = st.lists(shares, min_size=2, max_size=8)


# ---------------------------------------------------------------------------------------------- intervals


@often
@given(some, st.floats(-1, 1), st.floats(0.1, 10))
def test_an_interval_moves_with_the_differences(differences: list[float], shift: float, scale: float):
    low, high = interval(differences)
    assert min(differences) - 1e-12 <= low <= high <= max(differences) + 1e-12
    moved = interval([scale * d + shift for d in differences])
    assert moved == pytest.approx((scale * low + shift, scale * high + shift), abs=1e-9)
    flipped = interval([-d for d in differences])
    assert flipped == pytest.approx((-high, -low), abs=1e-9)


@often
@given(st.lists(shares, min_size=1, max_size=6))
def test_few_units_have_every_subset(differences: list[float]):
    n = len(differences)
    every = [statistics.fmean(part) for size in range(1, n + 1) for part in itertools.combinations(differences, size)]
    assert subset_means(np.array(differences)).tolist() == pytest.approx(sorted(every), abs=1e-12)
    if 2 <= n < LEAST_UNITS:
        assert interval(differences) == pytest.approx((min(differences), max(differences)), abs=1e-12)


def test_many_units_are_drawn_the_same_every_time():
    differences = np.random.default_rng(3).normal(0.1, 0.05, 20)
    assert len(subset_means(differences)) <= DRAWS
    assert interval(differences.tolist()) == interval(differences.tolist())
    low, high = interval(differences.tolist())
    student = scipy_stats.t.ppf(0.975, 19) * differences.std(ddof=1) / math.sqrt(20)
    assert (low, high) == pytest.approx(
        (differences.mean() - student, differences.mean() + student), abs=0.15 * student
    )


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 8, 12, 13])
def test_an_interval_covers_what_is_said_whatever_the_distribution(n: int):
    """By simulation, with light and with heavy tails. Where subsets are drawn, coverage is a little more than said."""
    rng = np.random.default_rng(n)
    for draw in (rng.standard_normal, lambda size: rng.standard_t(2, size)):
        runs = draw((800, n))
        covered = statistics.fmean(low <= 0 <= high for low, high in map(interval, runs.tolist()))
        assert covered == pytest.approx(coverage(n), abs=0.035)


def test_a_percentile_bootstrap_covers_less_than_it_says():
    """Why it is not what is used: scipy's own, with six pairs."""
    runs = np.random.default_rng(0).standard_normal((2000, 6))
    found = scipy_stats.bootstrap(
        (runs,), np.mean, axis=1, method="percentile", n_resamples=999, vectorized=True, rng=np.random.default_rng(1)
    ).confidence_interval
    covered = float(((found.low <= 0) & (found.high >= 0)).mean())
    assert covered < 0.89 < 0.95 < coverage(6)


# ---------------------------------------------------------------------------------------------- the test


@often
@given(some)
def test_the_permutation_test_is_scipys(differences: list[float]):
    n = len(differences)
    expected = scipy_stats.permutation_test(
        (np.array(differences),), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=True, axis=0
    ).pvalue
    found = permutation_p(differences)
    assert 2.0 ** (1 - n) <= found <= 1
    if (
        np.abs(subset_means(np.array(differences))).min() > 1e-6
    ):  # scipy doubles one tail, and counts ties at zero twice
        assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n", [6, 9, 14])
def test_false_positives_are_no_more_than_said(n: int):
    runs = np.random.default_rng(n).standard_normal((2000, n))
    p = np.array([permutation_p(run) for run in runs.tolist()])
    for level in (0.05, 0.1, 0.2):
        assert (p <= level).mean() <= level + 0.02
    assert (p <= 0.2).mean() > 0.14, "it rejects at all"


@often
@given(st.lists(shares, min_size=LEAST_UNITS, max_size=9))
def test_test_and_interval_agree(differences: list[float]):
    """The interval of level 1 - 2k/2^n leaves out zero exactly where the p-value is at most that of its k-th subset."""
    low, high = interval(differences)
    least = min(abs(low), abs(high))
    if least < 1e-6:
        return
    outside = low > 0 or high < 0
    assert outside == (permutation_p(differences) <= 1 - coverage(len(differences)) + 1e-12)


@often
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_against_its_definition(p_values: list[float]):
    m = len(p_values)
    ranked = sorted(p_values)
    for p, corrected in zip(p_values, holm(p_values), strict=True):
        place = ranked.index(p)
        expected = max(min(1.0, (m - j) * ranked[j]) for j in range(place + 1))
        assert corrected == pytest.approx(expected)
        assert p <= corrected <= 1


@pytest.mark.parametrize(("rows", "units"), [(1, 6), (2, 7), (5, 8), (10, 9), (16, 10)])
def test_how_many_units_a_corrected_p_value_needs(rows: int, units: int):
    assert units_for(rows) == units
    assert rows * 2.0 ** (1 - units) <= 0.05 < rows * 2.0 ** (2 - units)


def test_holm_keeps_any_false_positive_rare():
    """Ten rows without an effect: in at most 5 % of tables is any of them found."""
    rng = np.random.default_rng(5)
    tables = rng.standard_normal((300, 10, 10))
    any_found = [min(holm([permutation_p(row) for row in table.tolist()])) <= 0.05 for table in tables]
    assert statistics.fmean(any_found) <= 0.05 + 0.03


# ---------------------------------------------------------------------------------------------- pairs, seeds, orders


def test_one_difference_has_no_interval():
    assert interval([0.3]) is None
    assert permutation_p([0.3]) is None
    only = paired({(0, None): 0.5}, {(0, None): 0.25})
    assert (only.mean, only.low, only.high, only.pairs, only.units, only.p) == (0.25, None, None, 1, 1, None)


keys = st.tuples(st.integers(0, 4), st.sampled_from([None, 1, 2]))


@often
@given(st.dictionaries(keys, shares), st.dictionaries(keys, shares))
def test_only_shared_runs_are_paired(
    ours: dict[tuple[int, int | None], float], theirs: dict[tuple[int, int | None], float]
):
    found, shared = paired(ours, theirs), ours.keys() & theirs.keys()
    if not shared:
        assert found is None
        return
    orders = {order for _, order in shared}
    means = [statistics.fmean(ours[k] - theirs[k] for k in shared if k[1] == order) for order in orders]
    assert found.pairs == len(shared)
    assert found.units == (len(orders) if len(orders) > 1 else len(shared))
    assert found.mean == pytest.approx(statistics.fmean(means))
    back = paired(theirs, ours)
    assert back.mean == pytest.approx(-found.mean)


def test_a_lucky_class_order_is_no_evidence():
    """Ten seeds of two class orders, in one of which a method is better: they are two pieces of evidence, not twenty."""
    gains = {(seed, order): 0.05 * (order == 1) + 0.001 * seed for seed in range(10) for order in (1, 2)}
    found = paired(gains, dict.fromkeys(gains, 0.0))
    assert (found.pairs, found.units, found.p) == (20, 2, 0.5)
    assert (found.low, found.high) == pytest.approx((0.0045, 0.0545))
    one_order = paired({k: v for k, v in gains.items() if k[1] == 1}, dict.fromkeys(gains, 0.0))
    assert one_order.p < 0.01


@often
@given(st.lists(shares, min_size=1, max_size=9))
def test_mean_and_spread(values: list[float]):
    mean, spread = mean_and_spread(values)
    assert mean == pytest.approx(np.mean(values))
    assert spread == (pytest.approx(np.std(values, ddof=1)) if len(values) > 1 else None)


def test_the_spread_has_two_sources():
    rng = np.random.default_rng(0)
    seeds, orders = 0.01, 0.03
    drawn = rng.normal(0, orders, 400)
    values = {(seed, order): drawn[order] + rng.normal(0, seeds) for order in range(400) for seed in range(3)}
    found = spread_by_source(values)
    assert (found.seeds, found.orders) == pytest.approx((seeds, orders), rel=0.1)
    assert spread_by_source({(0, None): 0.5}) == Spread(None, None)
    assert spread_by_source({(0, None): 0.5, (1, None): 0.7}).orders is None
    assert spread_by_source({(0, 1): 0.5, (0, 2): 0.7}) == Spread(None, None), (
        "one seed each: they cannot be taken apart"
    )
