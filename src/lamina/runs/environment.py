"""Environment: the machine of a run, and what was decided for it."""

import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lamina import __version__
from lamina.config import RunConfig, explain
from lamina.engine import device
from lamina.engine.device import Device
from lamina.engine.state import now
from lamina.errors import RunError
from lamina.speed import precision
from lamina.speed.precision import Precision

DEFAULT_THREADS = torch.get_num_threads()
"""PyTorch's, before any run of this process sets another number."""


class Environment(BaseModel):
    """The machine a run began on, and the decisions made there. A resumed run keeps the decisions on any machine."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    device: Device
    gpu: str | None
    precision: Precision
    """Of the frozen weights."""
    threads: int = Field(ge=1, le=1024)
    """Of each process."""
    cpu: str
    cores: int
    memory_gb: float
    system: str
    python: str
    torch: str
    lamina: str
    commit: str | None
    """Of the checkout the code ran from; None where it was installed without one."""
    started: str
    """UTC."""

    @classmethod
    def decide(cls, config: RunConfig, where: Device, width: int) -> "Environment":
        """Returns the environment of a run that begins here. width: of the backbone."""
        threads = config.threads or max(1, DEFAULT_THREADS // config.jobs)
        torch.set_num_threads(threads)  # for the measurement that chooses the precision
        return cls(
            device=where,
            gpu=device.gpu_name(where),
            precision=precision.resolve(config.precision, width, where),
            threads=threads,
            cpu=_cpu(),
            cores=os.cpu_count() or 1,
            memory_gb=round(psutil.virtual_memory().total / 2**30, 1),
            system=platform.platform(),
            python=platform.python_version(),
            torch=torch.__version__,
            lamina=__version__,
            commit=checkout_commit(),
            started=now(),
        )

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return self.model_dump()

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: Path) -> "Environment":
        """The inverse of `to_json`. where: the file, for the message. Raises RunError for other content."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise RunError(f"{where} is damaged: {'; '.join(explain(error, cls))}.") from error


def peak_memory_mb() -> float:
    """Returns the most memory this process has held. getrusage alone would count the process that started it."""
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


def checkout_commit() -> str | None:
    """Returns the git description of the checkout that the code runs from; None where it was installed without one."""
    folder = Path(__file__).resolve().parents[3]
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return None
    found = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return found.stdout.strip() or None
