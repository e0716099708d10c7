"""Where the learner lives and computes: the processor, or one NVIDIA card.

Data, random draws, and the statistics and classifiers of `consolidation` are the processor's in any case, so the same
numbers are drawn on every device.
"""

from typing import Literal

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


def card(device: Device) -> str | None:
    """The card's name; None on the processor."""
    return torch.cuda.get_device_name() if device == "cuda" else None


def peak_memory_mb(device: Device) -> float | None:
    """The most this process has held on the card at a time; None on the processor."""
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
