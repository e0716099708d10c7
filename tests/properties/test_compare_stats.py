"""The statistics of a comparison, against what they must be whatever the figures."""

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.compare.stats import (
    DRAWS,
    EXACT,
    bootstrap_interval,
    coverage_bound,
    mean_and_spread,
    paired,
    resampled_means,
)

often = settings(deadline=None, max_examples=40, derandomize=True)
shares = st.floats(-1, 1, allow_nan=False).map(lambda x: round(x, 6))
some = st.lists(shares, min_size=2, max_size=8)


@often
@given(some)
def test_an_interval_lies_within_the_differences_and_holds_their_median_resample(differences: list[float]):
    low, high = bootstrap_interval(differences)
    assert min(differences) - 1e-12 <= low <= high <= max(differences) + 1e-12
    means_k = resampled_means(np.array(differences))
    assert low <= np.median(means_k) + 1e-12
    assert high >= np.median(means_k) - 1e-12
    assert np.mean((means_k >= low) & (means_k <= high)) >= 0.95


@often
@given(some, st.floats(-1, 1), st.floats(0.1, 10))
def test_an_interval_moves_with_the_differences(differences: list[float], shift: float, scale: float):
    low, high = bootstrap_interval(differences)
    moved = bootstrap_interval([scale * d + shift for d in differences])
    assert moved == pytest.approx((scale * low + shift, scale * high + shift), abs=1e-9)
    flipped = bootstrap_interval([-d for d in differences])
    assert flipped == pytest.approx((-high, -low), abs=1e-9)


@often
@given(st.lists(shares, min_size=1, max_size=EXACT))
def test_few_pairs_are_resampled_in_every_way(differences: list[float]):
    n = len(differences)
    every = sorted(statistics.fmean(drawn) for drawn in itertools.product(differences, repeat=n))
    assert np.sort(resampled_means(np.array(differences))).tolist() == pytest.approx(every, abs=1e-12)
    if n in (2, 3):
        assert bootstrap_interval(differences) == pytest.approx((min(differences), max(differences)), abs=1e-12)


def test_many_pairs_are_drawn_the_same_every_time():
    differences = np.random.default_rng(3).normal(0.1, 0.05, 20)
    assert len(resampled_means(differences)) == DRAWS
    assert bootstrap_interval(differences.tolist()) == bootstrap_interval(differences.tolist())
    low, high = bootstrap_interval(differences.tolist())
    normal = 1.96 * differences.std() / math.sqrt(20)
    assert (low, high) == pytest.approx((differences.mean() - normal, differences.mean() + normal), abs=0.1 * normal)


def test_one_difference_has_no_interval():
    assert bootstrap_interval([0.3]) is None
    only = paired({(0, None): 0.5}, {(0, None): 0.25})
    assert (only.mean, only.low, only.high, only.pairs) == (0.25, None, None, 1)


@often
@given(st.dictionaries(st.integers(0, 9), shares), st.dictionaries(st.integers(0, 9), shares))
def test_only_shared_runs_are_paired(ours: dict[int, float], theirs: dict[int, float]):
    found, shared = paired(ours, theirs), ours.keys() & theirs.keys()
    if not shared:
        assert found is None
        return
    assert found.pairs == len(shared)
    assert found.mean == pytest.approx(statistics.fmean(ours[k] - theirs[k] for k in shared))
    back = paired(theirs, ours)
    assert back.mean == pytest.approx(-found.mean)


@often
@given(st.lists(shares, min_size=1, max_size=9))
def test_mean_and_spread(values: list[float]):
    mean, spread = mean_and_spread(values)
    assert mean == pytest.approx(np.mean(values))
    assert spread == (pytest.approx(np.std(values, ddof=1)) if len(values) > 1 else None)


def test_what_is_said_of_coverage_is_true():
    """The range of n draws from a symmetric distribution, by simulation."""
    draws = np.random.default_rng(0).standard_normal((20_000, 4))
    for n in (2, 3, 4):
        covered = (draws[:, :n].min(1) <= 0) & (draws[:, :n].max(1) >= 0)
        assert covered.mean() == pytest.approx(coverage_bound(n), abs=0.02)
