"""Statistics of few runs: mean, standard deviation, and the paired difference of two methods.

Runs of two methods with the same seed and class order are a pair. Where a comparison has several class orders, its unit is the
class order, with the mean over its seeds: a method may be lucky in an order, and more seeds of that order do not tell. With
one class order the unit is the seed.

The interval of the mean difference comes from the means of all subsets of the n units (Hartigan, *Using subsample values as
typical values*, JASA 1969). Where differences are independent and symmetric about a centre, whatever their shape, the centre
lies between two neighbours of the 2^n - 1 sorted means with probability 2^-n each. The interval from the k-th smallest to the
k-th largest therefore covers it with probability 1 - k 2^(1-n), exactly: 75 % for the range of three differences, 94 % of five.
A percentile bootstrap covers less than it says with so few (86 % in place of 95 % with six).

The permutation test flips the signs of the differences in all 2^n ways (Fisher, 1935). Its p-value is the share of them whose
mean is as far from zero as the one found, so it is at least 2^(1-n). Test and interval agree: the interval leaves out zero
where p is small enough. Beyond `EXACT` units, both draw from a fixed seed.

Holm's step-down procedure (1979) corrects the p-values of a table for their number.

Shape letters: n units, k subsets or sign vectors.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lamina.maths.metrics import Floats

LEVEL = 0.95
EXACT = 12
"""Up to this many units, every subset and every vector of signs is taken."""
DRAWS = 10_000
LEAST_UNITS = 6
"""With fewer, no difference has a p-value of 5 % or less, even if it is the only one."""

Key = tuple[int, int | None]
"""Seed and class order of a run."""


@dataclass(frozen=True)
class Difference:
    """Mean difference of two methods over paired runs."""

    mean: float
    low: float | None
    """Lower end of the interval; None for a single unit."""
    high: float | None
    pairs: int
    units: int
    """Class orders, or seeds of the one class order."""
    by_order: bool = False
    """Whether more class orders give more units. Where every seed has an order of its own, more seeds do."""
    p: float | None = None
    """Two-sided, of the permutation test; None for a single unit."""


@dataclass(frozen=True)
class Spread:
    """Standard deviations (n - 1) of one figure by source; None where there are not two runs to compare."""

    seeds: float | None
    """Within a class order."""
    orders: float | None
    """Between class orders: of the means over their seeds, without what those owe to the seeds."""


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns mean and sample standard deviation (n - 1); None for the deviation of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def spread_by_source(values: Mapping[Key, float]) -> Spread:
    """Returns the standard deviations over seeds and over class orders (one-way analysis of variance)."""
    groups = list(_by_order(values).values())
    repeated = [group for group in groups if len(group) > 1]
    free = sum(len(group) - 1 for group in repeated)
    within = sum(statistics.variance(group) * (len(group) - 1) for group in repeated) / free if free else None
    if len(groups) < 2:
        return Spread(None if within is None else math.sqrt(within), None)
    if within is None:  # one seed for each class order: the two cannot be taken apart
        return Spread(None, None)
    between = statistics.variance([statistics.fmean(group) for group in groups])
    between -= within * statistics.fmean([1 / len(group) for group in groups])
    return Spread(math.sqrt(within), math.sqrt(max(0.0, between)))


def subset_means(differences_n: Floats) -> Floats:
    """Returns the means of all subsets but the empty one, (k,) sorted, or of DRAWS subsets from a fixed seed."""
    members_kn = _bits(len(differences_n))
    members_kn = members_kn[members_kn.any(1)]
    means_k: Floats = np.sort(members_kn @ differences_n / members_kn.sum(1))
    return means_k


def interval(differences: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Returns the interval of the centre of the differences, the range where no interval covers as much as `level`; None for
    fewer than two differences."""
    if len(differences) < 2:
        return None
    means_k = subset_means(np.asarray(differences, np.float64))
    cut = max(1, math.floor((1 - level) / 2 * (len(means_k) + 1)))
    return float(means_k[cut - 1]), float(means_k[len(means_k) - cut])


def permutation_p(differences: Sequence[float]) -> float | None:
    """Returns the two-sided p-value of the permutation test; None for fewer than two differences."""
    n = len(differences)
    if n < 2:
        return None
    differences_n = np.asarray(differences, np.float64)
    means_k = np.abs((1.0 - 2.0 * _bits(n)) @ differences_n / n)
    found = abs(differences_n.mean())
    as_far = int((means_k >= found - 1e-9 * max(found, 1e-9)).sum())
    return as_far / len(means_k) if n <= EXACT else (as_far + 1) / (len(means_k) + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns Holm's corrected p-values: each is at most the probability that any true null hypothesis has one so small."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = worst
    return corrected


def units_for(rows: int, level: float = LEVEL) -> int:
    """Returns how many units are needed for a corrected p-value of 1 - level, if so many rows are tested."""
    return math.ceil(1 + math.log2(max(1, rows) / (1 - level)) - 1e-9)


def paired(ours: Mapping[Key, float], theirs: Mapping[Key, float]) -> Difference | None:
    """Returns ours minus theirs over the runs that both have; None where they share none."""
    gains = {key: ours[key] - theirs[key] for key in ours if key in theirs}
    if not gains:
        return None
    parts = units(gains)
    low, high = interval(parts) or (None, None)
    seeds, orders = ({key[k] for key in gains} for k in (0, 1))
    by_order = len(orders) > 1 and not len(seeds) == len(orders) == len(gains)
    return Difference(statistics.fmean(parts), low, high, len(gains), len(parts), by_order, permutation_p(parts))


def units(values: Mapping[Key, float]) -> list[float]:
    """Returns the mean of every class order, or, where there is only one, the value of every seed."""
    groups = list(_by_order(values).values())
    return [statistics.fmean(group) for group in groups] if len(groups) > 1 else [v for group in groups for v in group]


def coverage(n: int, level: float = LEVEL) -> float:
    """Returns the probability with which the interval of n units covers the centre of a symmetric distribution."""
    k = 2.0**n
    return level if n > EXACT else 1 - 2 * max(1, math.floor((1 - level) / 2 * k)) / k


def _by_order(values: Mapping[Key, float]) -> dict[int | None, list[float]]:
    groups: dict[int | None, list[float]] = {}
    for (_, order), value in values.items():
        groups.setdefault(order, []).append(value)
    return groups


def _bits(n: int) -> NDArray[np.float64]:
    """Returns all vectors of zeros and ones, (k, n), or DRAWS of them from a fixed seed."""
    if n > EXACT:
        return np.random.default_rng(0).integers(0, 2, (DRAWS, n)).astype(np.float64)
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(np.float64)
