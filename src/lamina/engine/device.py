"""The device of a run: the CPU, or one NVIDIA GPU.

Data, random draws, and the statistics and classifiers of `consolidation` stay on the CPU, so the same numbers are drawn on
every device.
"""

from typing import Literal

import torch

from lamina.errors import ConfigError

Device = Literal["cpu", "cuda"]


def resolve(wanted: Literal["auto", "cpu", "cuda"]) -> Device:
    """Returns cuda for `auto` where PyTorch finds a GPU. Raises ConfigError for cuda where it finds none."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        built = f"PyTorch {torch.__version__} is built for CUDA {torch.version.cuda}" if torch.version.cuda else None
        raise ConfigError(
            f"device = 'cuda': PyTorch finds no CUDA device here ({built or 'its build has no CUDA'}). Allowed are auto and "
            f"cpu, and cuda where there is a GPU. Use device=auto for a new run; a run begun on a GPU resumes on a GPU only."
        )
    return wanted


def prepare(device: Device) -> None:
    """Make float32 mean float32: by default PyTorch rounds the inputs of convolutions to 10 bits on a GPU."""
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = False


def gpu_name(device: Device) -> str | None:
    """Returns the GPU's name; None on the CPU."""
    return torch.cuda.get_device_name() if device == "cuda" else None


def peak_memory_mb(device: Device) -> float | None:
    """Returns the most memory this process has held on the GPU; None on the CPU."""
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
