"""The machine of a run, and what was decided for it."""

import os
import platform
import resource
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from lamina import __version__
from lamina.config import RunConfig
from lamina.engine import device
from lamina.speed import precision


def environment_of(config: RunConfig, where: device.Device, width: int) -> dict[str, Any]:
    """What this machine is, and what was decided for it. A resumed run keeps these decisions, wherever it resumes."""
    if config.threads:
        torch.set_num_threads(config.threads)
    elif config.jobs > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // config.jobs))
    return {
        "device": where,
        "gpu": device.gpu_name(where),
        "precision": precision.resolve(config.precision, width, where),
        "threads": torch.get_num_threads(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lamina": __version__,
        "commit": _commit(),
        "started": now(),
    }


def peak_memory_mb() -> float:
    """Of this process alone: getrusage would count what the process that started it had in use."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 1024)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """The commit of the checkout this code runs from, None where it is installed without one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return None
    found = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return found.stdout.strip() or None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
