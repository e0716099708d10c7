"""Checkpoints: directories of safetensors and JSON that are whole or absent, whenever the machine stops.

    folder/
      000042/              the highest number is the newest: the rename below is what makes it so
        NAME.json          plain data
        NAME.safetensors   one file per group of tensors
        manifest.json      sha256 and size of every other file

Saving: write under a temporary name, fsync every file, then the manifest, then the directory; rename; fsync the folder.
The two newest are kept. Loading verifies every file; if the newest is damaged it is named and the one before is used.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from lamina.errors import CheckpointError
from lamina.files import fsync

KEEP = 2
MANIFEST = "manifest.json"
_NUMBERED = re.compile(r"\d{6}")


class Loaded(NamedTuple):
    number: int
    documents: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    damaged: dict[Path, str]
    """Newer checkpoints that were skipped, and what is wrong with each."""


def save(
    folder: Path,
    documents: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    on_step: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write the next checkpoint. Returns its directory.

    documents: JSON by name; tensors: groups of tensors by name. on_step is called between the steps, for tests of faults.
    Raises CheckpointError where it cannot be written, for example because the disk is full. Older checkpoints stay then.
    """
    number = max(_numbers(folder), default=0) + 1
    try:
        final = _write(folder / f"{number:06d}", documents, tensors, on_step)
        for old in sorted(_numbers(folder))[:-KEEP]:
            shutil.rmtree(folder / f"{old:06d}")
        return final
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint {number} cannot be written to {folder}: {error}. The checkpoint before it is intact. Make room or "
            f"correct the rights, then give the command again (for a run, `lamina resume`)."
        ) from error


def write(
    final: Path,
    documents: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    on_step: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write a directory of documents and tensors that `load` reads; it is whole or absent. Returns it. Raises CheckpointError
    where it cannot be written, for example because the disk is full."""
    try:
        return _write(final, documents, tensors, on_step)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{final} cannot be written: {error}") from error


def _write(
    final: Path,
    documents: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    on_step: Callable[[str], None],
) -> Path:
    folder = final.parent
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    on_step("made the temporary directory")
    for name, content in documents.items():
        write_json(temporary / f"{name}.json", content)
    for name, group in tensors.items():
        save_file({key: value.cpu().contiguous() for key, value in group.items()}, temporary / f"{name}.safetensors")
        on_step(f"wrote {name}")
    files = sorted(path.name for path in temporary.iterdir())
    for name in files:
        fsync(temporary / name)
    manifest = {
        name: {"sha256": sha256(temporary / name), "bytes": (temporary / name).stat().st_size} for name in files
    }
    write_json(temporary / MANIFEST, manifest)
    fsync(temporary / MANIFEST)
    fsync(temporary)
    on_step("wrote the manifest")
    os.rename(temporary, final)
    fsync(folder)
    on_step("renamed")
    return final


def load_newest(folder: Path) -> Loaded | None:
    """Returns the newest whole checkpoint, or None where none was ever written. Leftovers of interrupted saves are ignored.

    Raises CheckpointError where every checkpoint is damaged, naming what is wrong with each.
    """
    damaged: dict[Path, str] = {}
    for number in sorted(_numbers(folder), reverse=True):
        directory = folder / f"{number:06d}"
        try:
            return Loaded(number, *load(directory), damaged)
        except CheckpointError as error:
            damaged[directory] = str(error)
    if damaged:
        raise CheckpointError("no checkpoint is whole:\n  " + "\n  ".join(damaged.values()))
    return None


def set_aside(directory: Path) -> None:
    """Rename a damaged checkpoint, so that it is never kept in place of a whole one."""
    shutil.rmtree(directory.with_name(f"damaged-{directory.name}"), ignore_errors=True)
    directory.rename(directory.with_name(f"damaged-{directory.name}"))


def load(directory: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Returns the documents and tensors of one checkpoint, verified against its manifest.

    Raises CheckpointError naming the file that is missing, does not fit, or cannot be read.
    """
    try:
        return _load(directory)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error}") from error


def _load(directory: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    manifest = read_json(directory / MANIFEST)
    if not isinstance(manifest, dict) or not all(
        isinstance(entry, dict) and entry.keys() == {"sha256", "bytes"} for entry in manifest.values()
    ):
        raise CheckpointError(f"{directory / MANIFEST} is damaged: it must give sha256 and bytes of every file")
    for name, expected in manifest.items():
        path = directory / name
        if Path(name).name != name:
            raise CheckpointError(f"{directory / MANIFEST} names {name!r}, which is not a file in its own directory")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {MANIFEST} lists it")
        if sha256(path) != expected["sha256"] or path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path} is damaged: its sha256 or size is not the one in {MANIFEST}")
    documents, tensors = {}, {}
    for name in manifest:
        if name.endswith(".json"):
            documents[name.removesuffix(".json")] = read_json(directory / name)
        elif name.endswith(".safetensors"):
            tensors[name.removesuffix(".safetensors")] = read_tensors(directory / name)
    return documents, tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file. Raises CheckpointError naming the file where it cannot be read."""
    try:
        found: dict[str, Tensor] = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return found


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Returns the content of a file of JSON. Raises CheckpointError naming the file where it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON on one line, which takes a tenth of the time.

    Keys keep their order: in an outline it is the order in which branches were finished, and are folded again.
    """
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _numbers(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return [int(path.name) for path in folder.iterdir() if path.is_dir() and _NUMBERED.fullmatch(path.name)]
