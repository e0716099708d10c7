"""Counter-based randomness: every draw is a hash of its keys, so no generator state has to be saved to repeat it.

The mixer is SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), applied once per key and vectorised over samples. It gives the same
bits on every machine and for any number of workers.
"""

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lamina.types import Ints

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = state + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def bits(samples_n: Ints, *keys: int) -> NDArray[np.uint64]:
    """Returns 64 random bits per sample, (n,), a function of (keys, sample) only."""
    with np.errstate(over="ignore"):
        return _mix(_state(*keys) ^ np.asarray(samples_n).astype(np.uint64))


@lru_cache(maxsize=256)
def _state(*keys: int) -> NDArray[np.uint64]:
    """Returns the state after mixing the keys, (1,). Cached: the batches of an epoch draw with the same keys."""
    state = _mix(np.zeros(1, np.uint64))
    for key in keys:
        state = _mix(state ^ np.uint64(key & 0xFFFFFFFFFFFFFFFF))
    return state


def uniform(samples_n: Ints, *keys: int) -> NDArray[np.float64]:
    """Returns uniform draws in [0, 1), one per sample, (n,), a function of (keys, sample) only."""
    return (bits(samples_n, *keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(n: int, *keys: int) -> Ints:
    """Returns a permutation of 0..n-1, (n,), a function of (n, keys) only."""
    return np.argsort(bits(np.arange(n), *keys), kind="stable").astype(np.int64)


def seed_of(*parts: int | str) -> int:
    """Returns a 63-bit seed for a generator, a function of the parts only (text and numbers may be mixed)."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
