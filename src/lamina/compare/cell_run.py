"""The run of one cell, the same on this machine, under SLURM and on a Ray cluster: `lamina run-cell CELL`.

It holds the cell's lock and lease, begins or resumes the run, and writes how it ended. Whoever starts it, and wherever, the
checkpoints and the result are in the folder of the cell.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from lamina.compare import lease
from lamina.compare.cells import ATTEMPT, Place
from lamina.files import replace_text

HELD, OTHER_CODE = 75, 76
"""Exit codes where another process holds the cell, and where the code of lamina has changed since the cell was submitted."""
ENDED, REFUSED = "ended.json", "refused.json"
"""How the last attempt ended that held the cell, and the last one that did not get it."""


def launch(
    folder: Path, *options: str, pass_fds: Sequence[int] = (), environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Starts the process that runs a cell on this machine."""
    arguments = ["run-cell", str(folder), *options]
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"{ATTEMPT}{datetime.now(UTC).isoformat(timespec='seconds')} lamina {' '.join(arguments)}\n")
        log.flush()
        return subprocess.Popen(
            [sys.executable, "-m", "lamina.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {}),
            pass_fds=pass_fds,
            start_new_session=True,  # Ctrl-C reaches the comparison alone, which then asks its runs to stop
        )


def run_there(folder: str, attempt: str) -> int:
    """Runs a cell from a process of SLURM or Ray, and returns its exit code. The run saves and stops when that process is gone,
    or is asked to stop."""
    child = launch(Path(folder), "--attempt", attempt, "--parent", str(os.getpid()))

    def asked(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with suppress(ValueError):  # not the main thread; then the run notices by itself that this process is gone
        signal.signal(signal.SIGTERM, asked)
    try:
        while (code := child.poll()) is None:
            time.sleep(0.5)  # not child.wait(), which an interrupt from another thread does not wake
        return code
    except BaseException:
        child.terminate()
        child.wait()
        raise


def run(folder: Path, command: Callable[[list[str]], int], *, held: bool, attempt: str, parent: int) -> int:
    """Runs a cell with this command of lamina, and returns its exit code, HELD or OTHER_CODE. held: the process that started
    this one holds the lock. parent: a process; the run stops when it is gone."""
    place = Place(folder)
    lock = None if held else place.lock()
    mine = None if lock is None and not held else lease.claim(folder, f"process {os.getpid()}")
    if mine is None:
        _note_end(folder, attempt, HELD, REFUSED)
        return HELD
    try:
        if place.state == "done":
            code = 0
        elif not place.has_this_code():
            code = OTHER_CODE
        else:
            mine.keep(lambda: parent > 0 and os.getppid() != parent, lambda: os.kill(os.getpid(), signal.SIGTERM))
            going_on = (place.run / "config.json").exists()
            code = command(
                ["resume", str(place.run)] if going_on else ["run", str(place.config), "--out", str(place.run)]
            )
    except Exception:  # it failed here, and was not lost with its machine
        _note_end(folder, attempt, 1)
        raise
    else:
        _note_end(folder, attempt, code)
        return code
    finally:
        mine.release()
        if lock is not None:
            lock.close()


def _note_end(folder: Path, attempt: str, code: int, name: str = ENDED) -> None:
    replace_text(folder / name, json.dumps({"attempt": attempt, "code": code}) + "\n")


def how_it_ended(folder: Path, attempt: str) -> int | None:
    """Returns the exit code of this attempt; None where it has not ended, or was lost."""
    for name in (ENDED, REFUSED):
        with suppress(OSError, ValueError):
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            if found.get("attempt") == attempt:
                return int(found["code"])
    return None
