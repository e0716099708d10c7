"""The directory of a run: who holds it, and what its settings are.

DIR/
  config.json        every setting
  environment.json   decided or found at the start: device, precision, threads, machine, versions
  checkpoints/       see engine/checkpoint.py
  events.jsonl       a line per finished phase
  results.json       the record of the finished run
  report.html        the same for people
  parallel/          while tasks are trained side by side, see side_by_side.py
  lock               held by the process at work
"""

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lamina.config import RunConfig
from lamina.engine import checkpoint
from lamina.errors import CheckpointError, ConfigError, RunError
from lamina.runs.environment import now
from lamina.runs.setup import load_config

LEFTOVERS = frozenset({"lock", "environment.json", ".environment.json.tmp", ".config.json.tmp"})
"""What a run that was killed before it began may leave. A new run may start beside it."""


def refuse_used(out: Path) -> None:
    """Raises RunError where something is in the way of a new run."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file. Choose a directory with --out.")
    if out.is_dir() and any(path.name not in LEFTOVERS for path in out.iterdir()):
        remedy = "`lamina resume` goes on with it" if (out / "config.json").exists() else "it is not a run"
        raise RunError(f"{out} is not empty ({remedy}). Choose another directory with --out, or remove it.")


def refuse_other(out: Path) -> None:
    """Raises RunError for what is not the directory of a run."""
    if not (out / "config.json").is_file():
        lacks = "it has no config.json" if out.is_dir() else "there is no such directory"
        raise RunError(f"{out} is not a run: {lacks}. `lamina run --out {out}` starts one.")


def saved(out: Path) -> tuple[RunConfig, dict[str, Any]]:
    refuse_other(out)
    try:
        content = checkpoint.read_json(out / "config.json")
        return load_config(None, list(content.items())), checkpoint.read_json(out / "environment.json")
    except (CheckpointError, ConfigError) as error:
        raise RunError(f"{out}: its settings cannot be read: {error}") from error


def with_whole_paths(config: RunConfig) -> RunConfig:
    """Paths as seen from anywhere, so that a run can be resumed from another working directory."""

    def whole(name: str) -> str:
        return str(Path(name).expanduser().resolve()) if name != "nano" and Path(name).expanduser().exists() else name

    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"source": whole(config.data.source)}),
            "backbone": config.backbone.model_copy(update={"name": whole(config.backbone.name)}),
        }
    )


@contextmanager
def locked(out: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the run directory. The system frees the lock when the process ends, however it ends. Where another process
    holds it: wait for that, or raise RunError naming it."""
    with (out / "lock").open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            lock.seek(0)
            raise RunError(
                f"{out} is in use by {lock.read().strip() or 'another process'}. Wait for it, or stop it first."
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()} since {now()}\n")
        lock.flush()
        yield
