"""Freed memory is kept while a run computes, and returned to the system at its end."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""As in glibc's malloc.h, for malloc and posix_memalign, which PyTorch calls."""
_MOST, _USUAL_TRIM = 2**31 - 1, 2**26
"""The largest int; and the threshold that glibc reaches by itself where large tensors are made and freed."""


@contextmanager
def keeping_memory() -> Iterator[None]:
    """Within the context freed memory stays with the process.

    glibc would return it after every training step and get it back page by page, each filled with zeros first. With
    another C library nothing happens. glibc no longer adapts its thresholds by itself in this process afterwards.
    """
    mallopt, trim = _of_libc("mallopt"), _of_libc("malloc_trim")
    if mallopt is None or trim is None:
        yield
        return
    mallopt(_M_TRIM_THRESHOLD, _MOST)
    if not mallopt(_M_MMAP_THRESHOLD, _MOST):
        mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most that older versions accept
    try:
        yield
    finally:
        mallopt(_M_TRIM_THRESHOLD, _USUAL_TRIM)
        trim(0)


def return_large_blocks(size: int = 2**23) -> None:
    """From now on, blocks of at least `size` bytes return to the system when they are freed, as those of a decoded image.

    glibc would raise its threshold by itself, and keep what a few large images took. With another C library nothing happens.
    """
    mallopt = _of_libc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, size)


def _of_libc(name: str) -> Any:
    """Returns a function of the C library, or None where it has none of this name or cannot be found."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # TypeError: on Windows
        return None
