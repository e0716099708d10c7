"""Tasks trained in parallel, each by a process of its own that runs `begin` and `train` of this one task.

OUT/parallel/NUMBER/   NUMBER of the task, counted from 0
  checkpoints/         as those of a run; the last one holds the trained parameters of the task
  log.txt              output of its process
  lock                 held by it
"""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from lamina.engine.loop import Interrupted
from lamina.errors import LaminaError, RunError, TrainingError

COMMAND = (sys.executable, "-m", "lamina.cli", "train-task")
PAUSE = 0.2
"""Seconds between two checks of the processes."""


class Process(Protocol):
    """A process that was started, on this machine or elsewhere."""

    pid: int

    def poll(self) -> int | None:
        """Returns its exit code; None while it runs."""
        ...

    def terminate(self) -> None:
        """Ask it to save its state and stop."""
        ...

    def kill(self) -> None: ...

    def wait(self) -> int: ...


def place(out: Path, number: int) -> Path:
    """Returns the folder of a task."""
    return out / "parallel" / str(number)


def train(
    out: Path,
    names: Mapping[int, str],
    jobs: int,
    show: Callable[[int, str], None],
    should_stop: Callable[[], bool],
    command: Sequence[str] = COMMAND,
) -> None:
    """Train these tasks of a run, at most `jobs` at a time. show is told how many are done, and the state of the others.

    Raises TrainingError with the message of a process that failed, RunError for one that was killed, and Interrupted when
    asked to stop; in each case after the other processes have saved their state and ended.
    """
    waiting, at_work = deque(names), dict[int, Process]()
    try:
        while waiting or at_work:
            if should_stop():
                raise Interrupted
            for number, process in list(at_work.items()):
                code = process.poll()
                if code is not None:
                    del at_work[number]
                    if code:
                        raise _failure(out, number, names[number], code)
            while waiting and len(at_work) < jobs:
                number = waiting.popleft()
                at_work[number] = _start([*command, str(out), str(number), str(os.getpid())], place(out, number))
            said = [f"{names[number]} {_last_line(place(out, number))}" for number in at_work]
            show(len(names) - len(waiting) - len(at_work), ", ".join(said))
            time.sleep(PAUSE if at_work else 0)
    finally:
        stop([*at_work.values()])


def stop(processes: Sequence[Process]) -> None:
    """Let the processes save their state and end. A second interrupt kills them."""
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
        raise


def why(code: int) -> str:
    """Returns the meaning of an exit code, as the end of a sentence."""
    if code == 0:
        return "it ended without a record"
    if code < 0:
        return f"it was killed by {signal.Signals(-code).name}"
    return "another process asked it to stop" if code == 130 else f"exit code {code}"


def _start(arguments: Sequence[str], folder: Path) -> Process:
    folder.mkdir(parents=True, exist_ok=True)
    # A new file: a process that outlives a killed run may still write to the old one.
    (folder / "log.txt").unlink(missing_ok=True)
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the run only, which then asks its processes to stop
        )


def _log(folder: Path) -> str:
    return (folder / "log.txt").read_text(encoding="utf-8", errors="replace")


def _last_line(folder: Path) -> str:
    return (_log(folder).splitlines() or ["starts"])[-1]


def _failure(out: Path, number: int, task: str, code: int) -> LaminaError:
    folder = place(out, number)
    if code == 2:  # an error for the user, which ends the log
        return TrainingError(f"\n{_log(folder)}".rpartition("\nerror: ")[2].strip())
    return RunError(
        f"the process that trained task {task!r} ended early: {why(code)}. Its output is in {folder / 'log.txt'}. "
        f"`lamina resume {out}` continues; if memory ran out, use fewer --jobs."
    )
