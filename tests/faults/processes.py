"""Real `lamina` processes, stopped at chosen moments of their work.

A moment is chosen by looking at what the process has on disk. To be sure of it, the process is halted (SIGSTOP), looked
at again, and only then killed: what is asserted about a kill is what was true when it happened.

The processes are forked from a server that has imported PyTorch and transformers, and has computed nothing.
"""

import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.engine import checkpoint

PRELOADED = [
    "lamina.runs",
    "lamina.cli",
    "transformers.models.vit.modeling_vit",
    "transformers.models.llama.modeling_llama",
    "sklearn.datasets",
]
SMALL = {
    "data.source": "digits",
    "data.per_class": 12,
    "data.test_fraction": 0.1,
    "backbone.image_size": 32,
    "stream.tasks": 3,
    "training.epochs": 2,
    "training.batch_size": 8,
    "evaluation.batch_size": 8,
    "precision": "fp32",
    "threads": 1,
}
"""A real run of a few seconds: three tasks of 4, 3 and 3 classes, with 12, 10 and 10 steps."""
LEARNT = ("learner.safetensors", "memory.safetensors", "predictions.safetensors", "state.json")
"""The files of a checkpoint that hold what was learnt and measured; clock.json holds seconds."""
PHASES = ("begin", "train", "end", "evaluate")
ORDER = (*PHASES, "done")
SAVED_FILES = 7
"""Files of a checkpoint, the manifest included."""


class Output:
    """What a process says, read while it is at work."""

    def __init__(self, process: "Lamina", path: Path) -> None:
        self._process, self._path, self._read = process, path, 0

    def readline(self) -> str:
        """The next line, waited for; nothing where the process has ended without one."""
        while True:
            ended = self._process.poll() is not None
            line = self._path.read_text()[self._read :].partition("\n")
            if line[1] or ended:
                self._read += len(line[0] + line[1])
                return line[0] + line[1]
            time.sleep(0.01)


class Lamina:
    """A `lamina` process at work."""

    def __init__(self, arguments: list[str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.folder = Path(tempfile.mkdtemp(prefix="lamina-process-"))
        for name in ("out", "err"):  # a process may be killed before it has said anything
            (self.folder / name).touch()
        self._process = context.Process(target=_main, args=(arguments, self.folder, dict(os.environ)))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid
        self.stderr = Output(self, self.folder / "err")

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it is at work."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def is_halted(self) -> bool:
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        except FileNotFoundError:
            return False

    def finish(self, seconds: float) -> tuple[int, str, str]:
        """Wait for its end: exit code, standard output, standard error."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"still at work after {seconds} s"
        said = [(self.folder / name).read_text() for name in ("out", "err")]
        shutil.rmtree(self.folder)
        return self._process.exitcode, said[0], said[1]


def _main(arguments: list[str], folder: Path, environment: Mapping[str, str]) -> None:
    """What the process does."""
    from lamina import cli

    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv = ["lamina", *arguments]
    cli.main()


_started: list[Lamina] = []


def start(*arguments: object) -> Lamina:
    """A `lamina` process at work. `kill_all` ends it where a test fails before it does."""
    process = Lamina([*map(str, arguments)])
    _started.append(process)
    return process


def kill_all() -> None:
    """End every process that a test left at work."""
    while _started:
        process = _started.pop()
        if process.poll() is None:
            process.kill()
            process.finish(60)


def finish(process: Lamina, seconds: float = 600) -> tuple[int, str, str]:
    """Wait for its end: exit code, standard output, standard error."""
    return process.finish(seconds)


def lamina(*arguments: object) -> tuple[int, str, str]:
    """One command from start to end."""
    return finish(start(*arguments))


def small_run(out: Path, method: str, **settings: object) -> list[str]:
    """The arguments of a small run."""
    given = SMALL | {"method": method} | settings
    return ["run", *(f"--set={key}={value}" for key, value in given.items()), f"--out={out}"]


@dataclass(frozen=True)
class Sight:
    """Where a run is, by what is on disk: its newest checkpoint, and the one being written, if any."""

    number: int
    """Of the newest checkpoint, 0 where there is none yet."""
    task: int
    phase: str
    step: int
    saving: int | None
    """How many files the checkpoint being written has so far."""


def look(out: Path) -> Sight | None:
    """None where the run has not got as far as its settings, or where the disk changed while it was read."""
    folder = out / "checkpoints"
    if not (out / "config.json").exists():
        return None
    if not folder.exists():
        return Sight(0, 0, "begin", 0, None)
    try:
        names = os.listdir(folder)
        number = max((int(name) for name in names if re.fullmatch(r"\d{6}", name)), default=0)
        saving = next((len(os.listdir(folder / name)) for name in names if name.endswith(".tmp")), None)
        if not number:
            return Sight(0, 0, "begin", 0, saving)
        position = _position(folder / f"{number:06d}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Sight(number, position["task"], position["phase"], position["step"], saving)


@functools.lru_cache(maxsize=8)
def _position(directory: Path) -> dict[str, Any]:
    """A checkpoint that has its name never changes."""
    position: dict[str, Any] = json.loads((directory / "state.json").read_text())["position"]
    return position


@dataclass(frozen=True)
class Moment:
    """When to strike: in a phase of a task, from a step on, or while the checkpoint made there has so many files."""

    task: int
    phase: str
    step: int = 0
    files: int | None = None
    delay: float = 0.0
    """Seconds of work after that."""

    def has_come(self, sight: Sight) -> bool:
        here = (sight.task, sight.phase) == (self.task, self.phase) and sight.step >= self.step
        return here and sight.saving == self.files

    def is_over(self, sight: Sight) -> bool:
        return (sight.task, ORDER.index(sight.phase)) > (self.task, ORDER.index(self.phase))


def halt_at(process: Lamina, out: Path, moment: Moment, seconds: float = 300) -> Sight | None:
    """Halt the process at a moment, and say where it is. None where it went past it, and goes on."""
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        assert time.monotonic() < deadline, f"{out} never came to {moment}: {look(out)}"
        sight = look(out)
        if sight is not None and moment.is_over(sight):
            return None
        if sight is None or not moment.has_come(sight):
            time.sleep(0.001 if moment.files is None else 0.0002)
            continue
        process.send_signal(signal.SIGSTOP)
        while not process.is_halted():
            if process.poll() is not None:
                return None
        sight = look(out)
        if sight is not None and moment.has_come(sight):
            return sight
        process.send_signal(signal.SIGCONT)
    return None


def kill_at(process: Lamina, out: Path, moment: Moment) -> Sight | None:
    """Kill the process at a moment, and say where it was. None where it went past it, and goes on or is at its end."""
    if halt_at(process, out, moment) is None:
        return None
    if moment.delay:
        process.send_signal(signal.SIGCONT)
        time.sleep(moment.delay)
    process.kill()
    code, _, err = finish(process)
    if code == 0:
        return None
    assert code == -signal.SIGKILL, (code, err)
    sight = look(out)
    assert sight is not None, "what a killed run left can be read"
    return sight


def kill_and_resume(out: Path, arguments: list[str], moments: list[Moment]) -> list[Sight]:
    """A run that is killed at each of the moments it is met at, and resumed each time, until it is finished. Where it
    was each time."""
    kills: list[Sight] = []
    process = start(*arguments)
    for moment in moments:
        sight = kill_at(process, out, moment)
        if sight is None:
            continue
        kills.append(sight)
        loaded = checkpoint.load_newest(out / "checkpoints")
        assert (loaded.number if loaded else 0) == sight.number, "a checkpoint that has its name is whole"
        assert not (out / "results.json").exists()
        process = start("resume", out)
    code, _, err = finish(process)
    assert code == 0, (code, err)
    return kills


def newest(out: Path) -> Path:
    return max(path for path in (out / "checkpoints").iterdir() if path.name.isdigit())


def assert_same_bits(out: Path, reference: Path) -> None:
    """The last checkpoints of two finished runs hold the same bytes, and the records the same numbers."""
    for name in LEARNT:
        assert (newest(out) / name).read_bytes() == (newest(reference) / name).read_bytes(), f"{name} differs"
    record, expected = (json.loads((path / "results.json").read_text()) for path in (out, reference))
    for key in ("matrix", "task_aware", "metrics", "losses", "classes", "task_inference_accuracy"):
        assert record[key] == expected[key]
    assert (out / "report.html").is_file()


def copy_unfinished(reference: Path, out: Path) -> Path:
    """A finished run as it was just before its record was written."""
    shutil.copytree(reference, out)
    (out / "results.json").unlink()
    return out
