"""Finds the images below a folder, and notes what is there besides: hidden and system files, broken links and others."""

import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from lamina.data.records import LeftOut
from lamina.errors import DataError

IMAGE_SUFFIXES = frozenset(
    {
        *(".avif", ".bmp", ".gif", ".ico", ".jfif", ".jp2", ".jpeg", ".jpg"),
        *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
    }
)
_SYSTEM = frozenset(
    {
        "#recycle",
        "$recycle.bin",
        "@eadir",
        "@recycle",
        "__macosx",
        "__pycache__",
        "desktop.ini",
        "ehthumbs.db",
        "icon\r",
        "lost+found",
        "system volume information",
        "thumbs.db",
    }
)
"""Names, in lower case, that systems give to files and folders of their own."""
_OURS = (("config.json", "environment.json"), ("meta.json", "pixels.bin", "sizes.npy"))
"""A folder that holds all of these files is a run of lamina, or decoded images."""
_OURS_REASON = "runs and caches of lamina"
_DEEPEST = 32
_EXAMPLES = 3


@dataclass(frozen=True)
class ImageFile:
    """One image: its path below the root, its bytes, and when it changed, in nanoseconds."""

    path: str
    size: int
    changed: int


@dataclass(frozen=True, eq=False)
class Folder:
    """A folder, the images in it and the folders in it, sorted by name."""

    at: Path
    path: str
    """Below the root, with / between names."""
    images: tuple[ImageFile, ...]
    folders: tuple["Folder", ...]

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @cached_property
    def nested(self) -> int:
        """Images in its folders."""
        return sum(folder.holds for folder in self.folders)

    @property
    def holds(self) -> int:
        """Images in it, at any depth."""
        return len(self.images) + self.nested

    def all_images(self) -> Iterator[ImageFile]:
        yield from self.images
        for folder in self.folders:
            yield from folder.all_images()


@dataclass
class Leftovers:
    """Collects what is no data, by reason."""

    paths: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, path: str) -> None:
        self.paths.setdefault(reason, []).append(os.fsencode(path).decode("utf-8", "backslashreplace"))

    def found(self) -> tuple[LeftOut, ...]:
        return tuple(
            LeftOut(reason, len(paths), tuple(sorted(paths)[:_EXAMPLES]))
            for reason, paths in sorted(self.paths.items())
        )


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name belongs to a system or an editor, and is no data."""
    return name.startswith(".") or name.lower() in _SYSTEM


def scan(
    root: Path,
    suffixes: Collection[str] = IMAGE_SUFFIXES,
    others: str = "files without the suffix of an image",
) -> tuple[Folder, Leftovers]:
    """Everything below `root`. Linked folders are followed, each once, unless they lead into `root` or above it.

    suffixes: those of the files to find, in lower case. others: what to call other files.

    Raises DataError for a folder that cannot be listed.
    """
    left = Leftovers()
    return _Scan(root.resolve(), left, suffixes, others).folder(root, "", 0), left


@dataclass
class _Scan:
    root: Path
    left: Leftovers
    suffixes: Collection[str]
    others: str
    followed: set[tuple[int, int]] = field(default_factory=set)
    """Device and number of every folder that was reached through a link."""

    def folder(self, at: Path, path: str, depth: int, *, linked: bool = False) -> Folder:
        try:
            with os.scandir(at) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(
                f"folder {at} cannot be listed ({error.strerror}). Make it readable, or remove it"
            ) from error
        images, folders = [], []
        for entry in entries:
            below = f"{path}/{entry.name}" if path else entry.name
            state = self._state(entry, below)
            if state is None:
                continue
            if stat.S_ISDIR(state.st_mode):
                inner = self._inner(entry, below, depth, state, linked=linked)
                if inner is not None:
                    folders.append(inner)
            elif not stat.S_ISREG(state.st_mode):
                self.left.add("pipes, sockets and devices", below)
            elif os.path.splitext(entry.name)[1].lower() in self.suffixes:
                images.append(ImageFile(below, state.st_size, state.st_mtime_ns))
            else:
                self.left.add(self.others, below)
        return Folder(at, path, tuple(images), tuple(folders))

    def _state(self, entry: os.DirEntry[str], below: str) -> os.stat_result | None:
        """What the entry is, with links followed; None, and noted, if it is hidden or a broken link."""
        if is_hidden(entry.name):
            self.left.add("hidden and system files and folders", below)
            return None
        try:
            return entry.stat()
        except OSError:
            self.left.add("broken links and files that cannot be reached", below)
            return None

    def _inner(
        self, entry: os.DirEntry[str], below: str, depth: int, state: os.stat_result, *, linked: bool
    ) -> Folder | None:
        at, identity = Path(entry.path), (state.st_dev, state.st_ino)
        known = linked and identity in self.followed
        if entry.is_symlink():
            linked, real = True, at.resolve()
            known = identity in self.followed or real.is_relative_to(self.root) or self.root.is_relative_to(real)
        if known:
            self.left.add("links to folders that are read already", below)
            return None
        if linked:
            self.followed.add(identity)
        if depth >= _DEEPEST:
            self.left.add(f"folders more than {_DEEPEST} deep", below)
            return None
        if any(all((at / name).is_file() for name in names) for names in _OURS):
            self.left.add(_OURS_REASON, below)
            return None
        before = len(self.left.paths.get(_OURS_REASON, ()))
        folder = self.folder(at, below, depth + 1, linked=linked)
        # `runs/` is where the runs go unless another folder is named.
        only_ours = not folder.holds and len(self.left.paths.get(_OURS_REASON, ())) > before
        return None if only_ours else folder
