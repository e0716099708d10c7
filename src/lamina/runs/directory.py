"""The directory of a run: who holds it, and what it was begun with.

DIR/
  config.json        every setting
  environment.json   found or decided at the start: device, precision, threads, machine, versions
  source.json        the classes and counts of the data, and the fingerprint of the stream
  checkpoints/       see engine/checkpoint.py
  events.jsonl       a line per finished phase
  results.json       the record of the finished run
  report.html        the same for people
  parallel/          while tasks are trained side by side, see side_by_side.py
  lock               held by the process at work

The three files of the start and the record carry checksums (lamina/files.py).
"""

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lamina import record
from lamina.config import RunConfig
from lamina.config.renamed import is_other_method, made_before
from lamina.engine.state import now
from lamina.errors import ConfigError, RunError
from lamina.files import CHECKSUM, check, read_checked, read_json, write_checked
from lamina.record import Record
from lamina.runs.environment import Environment
from lamina.runs.setup import Setup, load_config

CONFIG, ENVIRONMENT, SOURCE = "config.json", "environment.json", "source.json"
LEFTOVERS = {"lock", ENVIRONMENT, SOURCE, *(f".{name}.tmp" for name in (CONFIG, ENVIRONMENT, SOURCE))}
"""What a run that was killed before it began may leave. A new run may start beside it."""


class Begun(NamedTuple):
    """What a run was begun with."""

    config: RunConfig
    environment: Environment
    source: dict[str, Any]
    """`stream`, the fingerprint, and `data`, the summary of the source."""


def refuse_used(out: Path) -> None:
    """Raises RunError where something is in the way of a new run."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file. Choose a directory with --out.")
    if out.is_dir() and any(path.name not in LEFTOVERS for path in out.iterdir()):
        remedy = "is not empty and not a run"
        if (out / record.FILE).exists():
            remedy = f"holds a finished run, which `lamina report {out}` shows"
        elif (out / CONFIG).exists():
            remedy = f"holds an unfinished run, which `lamina resume {out}` continues"
        raise RunError(f"{out} {remedy}. Choose another directory with --out, or remove this one.")


def refuse_inside_data(out: Path, source: str) -> None:
    """Raises RunError for an output within the folder of the data, where it would be read as data."""
    data = Path(source).expanduser().resolve()
    if data.is_dir() and out.resolve().is_relative_to(data):
        raise RunError(
            f"{out} lies inside the data folder {data}, so later runs would read it as data. Choose a directory outside it "
            f"with --out."
        )


def refuse_other(out: Path) -> None:
    """Raises RunError for what is not the directory of a run. Names the runs within it, if there are any."""
    if (out / CONFIG).is_file():
        return
    within = runs_within(out)
    if within:
        names = ", ".join(str(path) for path in within[:20])
        raise RunError(f"{out} is not a run, but a folder of {len(within)}: {names}. Name one of them.")
    lacks = f"it has no {CONFIG}" if out.is_dir() else "there is no such directory"
    raise RunError(f"{out} is not a run: {lacks}. `lamina run --out {out}` starts one.")


def runs_within(folder: Path) -> list[Path]:
    """Returns the directories of runs in a folder, in the order of their names."""
    return sorted(path.parent for path in folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []


def begin(out: Path, setup: Setup) -> None:
    """Write down what a run is begun with. The settings come last: with them the directory is a run."""
    write_checked(out / SOURCE, {"stream": setup.stream.fingerprint, "data": setup.source})
    write_checked(out / ENVIRONMENT, setup.environment.to_json())
    write_config(out, setup.config)


def write_config(out: Path, config: RunConfig) -> None:
    write_checked(out / CONFIG, config.model_dump(mode="json"))


def begun(out: Path) -> Begun:
    """Returns what a run was begun with. Raises RunError for what is no run, is damaged, or is of an older lamina."""
    refuse_other(out)
    content = read_json(out / CONFIG)
    if isinstance(method := content.get("method"), dict) and is_other_method(method):
        raise RunError(f"{out} {made_before(method)} Use that version with it, or run its configuration anew.")
    try:
        config = load_config(None, [(key, value) for key, value in content.items() if key != CHECKSUM])
    except ConfigError as error:
        raise RunError(
            f"{out / CONFIG} is damaged, or an older lamina wrote it, whose runs this one cannot continue: {error}"
        ) from error
    check(out / CONFIG, content)
    environment = Environment.from_json(read_checked(out / ENVIRONMENT), out / ENVIRONMENT)
    return Begun(config, environment, read_checked(out / SOURCE))


def read_record(out: Path) -> Record:
    """Returns the record of a finished run. Raises RunError where it is absent or damaged, or of another format."""
    if not (out / record.FILE).exists():
        refuse_other(out)
        raise RunError(f"{out} is not finished. `lamina resume {out}` continues it.")
    return record.read(out)


def finished(out: Path) -> Record | None:
    """Returns the record of a finished run; None where there is none or a damaged one, which can be made anew."""
    if not (out / record.FILE).is_file():
        return None
    try:
        read_checked(out / record.FILE)
    except RunError:
        return None
    return record.read(out)


def with_whole_paths(config: RunConfig) -> RunConfig:
    """Returns the configuration with absolute paths, so that a run resumes from any working directory."""

    def absolute(name: str) -> str:
        return str(Path(name).expanduser().resolve()) if name != "nano" and Path(name).expanduser().exists() else name

    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"source": absolute(config.data.source)}),
            "backbone": config.backbone.model_copy(update={"name": absolute(config.backbone.name)}),
        }
    )


@contextmanager
def locked(out: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the run directory. The system frees the lock when the process ends, however it ends.

    Where another process holds it: waits if `wait`, else raises RunError naming the process.
    """
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
