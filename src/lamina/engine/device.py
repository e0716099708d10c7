"""Where the learner lives and computes: the processor, or one NVIDIA card.

Data, random draws, and the statistics and classifiers of `consolidation` are the processor's in any case, so the same
numbers are drawn on every device.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from lamina.errors import ConfigError

Device = Literal["cpu", "cuda"]


def resolve(wanted: Literal["auto", "cpu", "cuda"]) -> Device:
    """`auto` becomes cuda where PyTorch finds a card. Raises ConfigError for cuda where it finds none."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        built = f"PyTorch {torch.__version__} is built for CUDA {torch.version.cuda}" if torch.version.cuda else None
        raise ConfigError(
            f"device = 'cuda': PyTorch finds no CUDA device here ({built or 'its build has no CUDA'}). Allowed are auto, cpu "
            f"and, where there is a card, cuda. A new run takes what there is with device=auto; one that began on a card "
            f"goes on on a card."
        )
    return wanted


def prepare(device: Device) -> None:
    """Before anything is computed: float32 means float32. By default PyTorch would round what convolutions read to 10 bits
    on a card, though not what matrix products read."""
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = False


@contextmanager
def keeping_memory() -> Iterator[None]:
    """While open, memory that is freed is kept for what comes next, and goes back to the system at the end. glibc would return
    it after every training step and get it back page by page, each filled with zeros first. With another C library nothing
    happens. (What glibc decides by itself about sizes it does not any more in this process.)"""
    mallopt, trim = _of_libc("mallopt"), _of_libc("malloc_trim")
    if mallopt is None or trim is None:
        yield
        return
    mallopt(_M_TRIM_THRESHOLD, _MOST)
    if not mallopt(_M_MMAP_THRESHOLD, _MOST):
        mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most that older ones take
    try:
        yield
    finally:
        mallopt(_M_TRIM_THRESHOLD, _USUAL_TRIM)
        trim(0)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""As in glibc's malloc.h, for malloc and posix_memalign, which PyTorch calls."""
_MOST, _USUAL_TRIM = 2**31 - 1, 2**26
"""The largest int; and what glibc comes to by itself where large tensors are made and freed."""


def _of_libc(name: str) -> Any:
    """A function of the C library this process runs on; None where it has none of this name, or is not to be found."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # TypeError: on Windows
        return None


def card(device: Device) -> str | None:
    """The card's name; None on the processor."""
    return torch.cuda.get_device_name() if device == "cuda" else None


def peak_memory_mb(device: Device) -> float | None:
    """The most this process has held on the card at a time; None on the processor."""
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
