"""A lease on a cell, for processes on machines that share its folder.

A lock of the operating system ends with its process, but not every shared file system passes it on to other machines. So the
process that runs a cell also keeps a file there and touches it every few seconds. Others may take the cell over once the file
is old, or at once where its process was on this machine and is gone. Ages are taken from the clock of the file system.
"""

import json
import os
import socket
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

FILE = "lease.json"
BEAT = 2.0
"""Seconds between two touches."""
FRESH = 60.0
"""A lease that was not touched for so many seconds has lost its holder."""


class Lease:
    """A lease that this process holds."""

    def __init__(self, folder: Path, token: str) -> None:
        self.folder, self.token = folder, token
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def keep(self, should_stop: Callable[[], bool], stop: Callable[[], None]) -> None:
        """Touch it from now on, in a thread. Calls `stop` once where should_stop says so, or another process took the cell."""

        def beat() -> None:
            asked = False
            while not self._ended.wait(BEAT):
                found, there = _read(self.folder / FILE), (self.folder / FILE).exists()
                taken = (found is not None and found["token"] != self.token) or not there
                if not taken:
                    with suppress(OSError):
                        os.utime(self.folder / FILE)
                if not asked and (
                    taken or should_stop()
                ):  # a file that cannot be read may be one of a server that is busy
                    asked = True
                    stop()

        self._thread = threading.Thread(target=beat, daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        found = _read(self.folder / FILE)
        if found is not None and found["token"] == self.token:
            (self.folder / FILE).unlink(missing_ok=True)


def claim(folder: Path, who: str) -> Lease | None:
    """Returns a lease on a cell, taking over one whose holder is lost; None where another process holds it."""
    file, token = folder / FILE, uuid.uuid4().hex
    if file.exists():
        judged = _read(file)
        if holder(folder) is not None:
            return None
        lost = folder / f".{FILE}.{token}"
        try:
            os.rename(file, lost)
        except FileNotFoundError:  # another process was faster
            return None
        if _read(lost) != judged:  # another process had taken it over meanwhile: give it back
            with suppress(FileExistsError):
                os.link(lost, file)
            lost.unlink(missing_ok=True)
            return None
        lost.unlink(missing_ok=True)
    try:
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None
    with os.fdopen(opened, "w", encoding="utf-8") as out:
        json.dump({"token": token, "who": who, **_here(), "pid": os.getpid()}, out)
    return Lease(folder, token)


def holder(folder: Path) -> str | None:
    """Returns who holds a cell, in words; None where no process does."""
    file = folder / FILE
    try:
        touched = file.stat().st_mtime
    except FileNotFoundError:
        return None
    found = _read(file) or {}
    who = f"{found.get('who', 'a process')} on {found.get('host', 'another machine')}"
    here = _here()
    if {key: found.get(key) for key in here} == here and not _alive(int(found.get("pid", 0))):
        return None
    return who if _now(folder) - touched < FRESH else None


def _read(file: Path) -> dict[str, Any] | None:
    """Returns the content of a lease; None where there is none, or it is only just being written."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "token" in content else None


def _here() -> dict[str, Any]:
    """Returns what tells this machine, and its list of processes, from others."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text(encoding="utf-8").strip() if boot.exists() else "",
        "processes": space.stat().st_ino if space.exists() else 0,
    }


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _now(folder: Path) -> float:
    """Returns the time by the clock of the file system."""
    probe = folder / f".clock.{uuid.uuid4().hex}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
