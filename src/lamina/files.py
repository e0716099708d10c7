"""Small files of a run: replaced as a whole, and JSON that carries a checksum of its own content."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from lamina.errors import RunError

CHECKSUM = "sha256"
"""Key of the checksum."""


def replace_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Replace a small file. A reader, or a crash, finds the old text or the new one. shared: other processes may replace it at
    the same time."""
    temporary = path.with_name(f".{path.name}.{f'{uuid4().hex}.' if shared else ''}tmp")
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Waits until no other process is within this context for the same file. On file systems without locks nobody waits."""
    with lock.open("a") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fsync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_checked(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file of JSON by this content and its checksum."""
    replace_text(path, json.dumps({CHECKSUM: _checksum(content), **content}, indent=1) + "\n")


def read_checked(path: Path) -> dict[str, Any]:
    """Returns the content that `write_checked` wrote, without its checksum. Raises what `read_json` and `check` raise."""
    content = read_json(path)
    check(path, content)
    return {key: value for key, value in content.items() if key != CHECKSUM}


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a file of JSON. Raises RunError naming the file if it is missing or holds no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing.") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: it is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged: it must hold keys and values, and holds a {type(content).__name__}.")
    return content


def check(path: Path, content: Mapping[str, Any]) -> None:
    """Raises RunError naming the file if its content does not fit its checksum, or has none."""
    noted = content.get(CHECKSUM)
    if noted is None:
        raise RunError(f"{path} has no {CHECKSUM}: an older lamina wrote it, or it was edited.")
    if noted != _checksum({key: value for key, value in content.items() if key != CHECKSUM}):
        raise RunError(f"{path} is damaged: its content does not fit its {CHECKSUM}.")


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
