"""Statistics of few runs: mean, standard deviation, and the paired difference of two methods.

Runs of two methods with the same seed and class order are a pair. The interval of the mean difference is a percentile
bootstrap over pairs (Efron, 1979): resample the pairs with replacement, take the means, and cut off 2.5 % at both ends. With
up to five pairs all n^n resamples are taken; beyond that, 10,000 draws from a fixed seed.

With n pairs of a symmetric distribution the range of the differences covers its centre with probability 1 - 2^(1-n),
whatever its shape: 50 % for two pairs, 75 % for three, 88 % for four. No interval within that range covers more, and with up
to three pairs this one is the range. The table shows `coverage_bound`.

Shape letters: n pairs, k resamples.
"""

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from lamina.maths.metrics import Floats

K = TypeVar("K", bound=Hashable)
LEVEL = 0.95
EXACT = 5
"""Up to this many pairs, every resample is taken."""
DRAWS = 10_000


@dataclass(frozen=True)
class Difference:
    """Mean difference of two methods over paired runs."""

    mean: float
    low: float | None
    """Lower end of the interval; None for a single pair."""
    high: float | None
    pairs: int


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns mean and sample standard deviation (n - 1); None for the deviation of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def resampled_means(differences_n: Floats) -> Floats:
    """Returns the means of resamples with replacement, (k,): all n^n of them, or DRAWS with a fixed seed."""
    n = len(differences_n)
    if n <= EXACT:
        picks_kn = np.stack(np.meshgrid(*[np.arange(n)] * n, indexing="ij"), -1).reshape(-1, n)
    else:
        picks_kn = np.random.default_rng(0).integers(0, n, (DRAWS, n))
    means_k: Floats = differences_n[picks_kn].mean(1)
    return means_k


def bootstrap_interval(differences: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Returns the percentile interval of the mean; None for fewer than two differences."""
    if len(differences) < 2:
        return None
    tail = (1 - level) / 2
    # The values themselves, not between them: with few pairs the distribution is a handful of steps.
    means_k = np.sort(resampled_means(np.asarray(differences, np.float64)))
    cut = math.floor(tail * len(means_k))
    return float(means_k[cut]), float(means_k[len(means_k) - 1 - cut])


def paired(ours: Mapping[K, float], theirs: Mapping[K, float]) -> Difference | None:
    """Returns ours minus theirs over the keys (seed, class order) that both have; None where they share none."""
    gains = [ours[key] - theirs[key] for key in ours if key in theirs]
    if not gains:
        return None
    low, high = bootstrap_interval(gains) or (None, None)
    return Difference(statistics.fmean(gains), low, high, len(gains))


def coverage_bound(pairs: int) -> float:
    """Returns the highest probability with which an interval within the range of n differences covers the centre of a symmetric
    distribution."""
    return 1 - 2.0 ** (1 - pairs)
