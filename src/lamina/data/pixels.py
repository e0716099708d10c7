"""Decodes every image once, into one memory-mapped file that a killed decode never leaves half written.

Shape letters: n images, h w the pixels of one image, H W those of the largest, c = 3 channels.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lamina.data.decoding import DAMAGE, decode, header_size
from lamina.data.records import Payload, Source
from lamina.errors import DataError
from lamina.types import Ints

Progress = Callable[[int, int], None]
T = TypeVar("T")

_FORMAT = 3
_STALE_SECONDS = 24 * 3600
_HANDFUL = 32


@dataclass(frozen=True, eq=False)
class PixelStore:
    """Decoded images, one after another: each takes the bytes of its own pixels."""

    pixels: NDArray[np.uint8]
    """All pixels, memory-mapped and read-only: image 0 (h, w, 3), then image 1, and so on."""
    sizes_n2: Ints
    """Height and width of every image."""
    skipped: tuple[str, ...] = ()
    """The damaged images left out: where each one was, and what is wrong with it."""

    def __len__(self) -> int:
        return len(self.sizes_n2)

    @cached_property
    def box(self) -> tuple[int, int]:
        """H, W: the largest height and the largest width."""
        height, width = self.sizes_n2.max(0).tolist()
        return height, width

    @cached_property
    def alike_nhwc(self) -> NDArray[np.uint8] | None:
        """All images as one array (n, H, W, 3), None where their sizes differ."""
        return self.pixels.reshape(len(self), *self.box, 3) if (self.sizes_n2 == self.box).all() else None

    def image(self, k: int) -> NDArray[np.uint8]:
        """Image k, (h, w, 3), not copied."""
        return self._flat[self._starts_n[k] : self._starts_n[k + 1]].reshape(*self.sizes_n2[k], 3)

    @cached_property
    def _flat(self) -> NDArray[np.uint8]:
        return self.pixels.reshape(-1)

    @cached_property
    def _starts_n(self) -> Ints:
        return np.cumsum([0, *(3 * self.sizes_n2.prod(1))], dtype=np.int64)


@dataclass(frozen=True)
class Damage:
    """Why an image could not be decoded."""

    reason: str


def default_cache() -> Path:
    """Where decoded images go unless a folder is named: $XDG_CACHE_HOME/lamina, else ~/.cache/lamina."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lamina"


def decode_once(
    source: Source,
    *,
    store_px: int,
    cache: Path,
    on_damaged: Literal["error", "skip"] = "error",
    progress: Progress | None = None,
) -> tuple[PixelStore, Ints]:
    """The decoded images of a source, and which of its rows they are (all, unless damaged ones are skipped).

    They lie in `cache`/KEY, where KEY is a function of the source's fingerprint and `store_px`; if they are there
    already, nothing is decoded. progress: called with (images done, images in all), twice over where sizes differ.

    Raises DataError naming the first damaged image (unless on_damaged is skip), if all are damaged, and if the cache
    cannot be written or read.
    """
    key = hashlib.blake2b(
        repr((_FORMAT, source.fingerprint, source.stamp, store_px)).encode(), digest_size=16
    ).hexdigest()
    folder = cache / key
    if not (folder / "meta.json").is_file():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            _remove_stale(cache, key)
            partial = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=cache))
        except OSError as error:
            raise _no_room(cache, error) from error
        try:
            _write(source, store_px, partial, on_damaged, progress)
            _publish(partial, folder)
        except OSError as error:
            raise _no_room(cache, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        skipped = {int(row): str(reason) for row, reason in meta["skipped"]}
        sizes_n2 = np.load(folder / "sizes.npy", allow_pickle=False)
        pixels = np.memmap(folder / "pixels.bin", np.uint8, mode="r")
        if len(pixels) != 3 * int(sizes_n2.prod(1).sum()):
            raise ValueError(f"pixels.bin holds {len(pixels)} bytes, {3 * int(sizes_n2.prod(1).sum())} are needed")
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"the decoded images in {folder} are damaged ({error}). Remove that folder; they will be decoded again"
        ) from error
    if skipped and on_damaged == "error":
        row = min(skipped)
        raise _damaged(source, row, skipped[row])
    keep = np.array([row for row in range(len(source)) if row not in skipped], np.int64)
    told = tuple(f"{source.where(row)}: {reason}" for row, reason in sorted(skipped.items()))
    # A plain view: indexing a numpy.memmap costs more than copying a small image.
    return PixelStore(np.asarray(pixels), sizes_n2, told), keep


def each(source: Source, work: Callable[[Payload], T], progress: Progress | None = None) -> Iterator[T | Damage]:
    """work(payload) for every row in order, or why it failed. Runs on all processors; memory stays bounded."""
    Image.init()
    n = len(source)

    def one(row: int) -> T | Damage:
        try:
            return work(source.read(row))
        except DAMAGE as error:
            return Damage((str(error) or type(error).__name__).splitlines()[0])

    def some(rows: range) -> list[T | Damage]:
        return [one(row) for row in rows]

    workers = min(os.cpu_count() or 1, 8)
    with ThreadPoolExecutor(workers) as pool:
        # A handful of images per call: handing over single small ones costs more than decoding them.
        for start in range(0, n, workers * _HANDFUL):
            rows = range(start, min(start + workers * _HANDFUL, n))
            for results in pool.map(some, (rows[k : k + _HANDFUL] for k in range(0, len(rows), _HANDFUL))):
                yield from results
            if progress is not None:
                progress(rows.stop, n)


def _write(
    source: Source,
    store_px: int,
    folder: Path,
    on_damaged: Literal["error", "skip"],
    progress: Progress | None,
) -> None:
    n = len(source)
    # The first pass reads headers only, so that a disk that is too small is known before hours of decoding.
    needed = 0
    for row, size in enumerate(each(source, lambda payload: header_size(payload, store_px))):
        if not isinstance(size, Damage):
            needed += 3 * size[0] * size[1]
        elif on_damaged == "error":
            raise _damaged(source, row, size.reason)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"the decoded images of {source.name} need {needed / 2**30:.1f} GiB and {folder.parent} has"
            f" {free / 2**30:.1f} GiB free. Free some, name another with --set data.cache=FOLDER, or choose a"
            f" smaller backbone.image_size (images are kept at up to {store_px} px)"
        )
    sizes: list[tuple[int, int]] = []
    skipped: list[tuple[int, str]] = []
    with (folder / "pixels.bin").open("wb") as file:
        for row, image in enumerate(each(source, lambda payload: decode(payload, store_px), progress)):
            if isinstance(image, Damage):
                if on_damaged == "error":
                    raise _damaged(source, row, image.reason)
                skipped.append((row, image.reason))
                continue
            file.write(np.ascontiguousarray(image).data)
            sizes.append((image.shape[0], image.shape[1]))
    if not sizes:
        raise DataError(
            f"none of the {n} images of {source.name} can be decoded; the first is {source.where(0)} ({skipped[0][1]})"
        )
    np.save(folder / "sizes.npy", np.array(sizes, np.int64), allow_pickle=False)
    meta = {"format": _FORMAT, "name": source.name, "n": len(sizes), "store_px": store_px, "skipped": skipped}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
    for name in ("pixels.bin", "sizes.npy", "meta.json"):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())


def _publish(partial: Path, folder: Path) -> None:
    partial.chmod(0o755)
    try:
        partial.rename(folder)
    except OSError:
        # Another process was faster: its copy is as good. Anything else in that place is no copy of ours.
        if not (folder / "meta.json").is_file():
            raise DataError(
                f"decoded images cannot be moved to {folder}: something else is there. Remove it, or name another cache"
                " with --set data.cache=FOLDER"
            ) from None


def _remove_stale(cache: Path, key: str) -> None:
    """Removes what killed decodes of the same images left behind."""
    for left in cache.glob(f".{key}.*"):
        if time.time() - left.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _no_room(cache: Path, error: OSError) -> DataError:
    return DataError(
        f"decoded images cannot be kept in {cache} ({error.strerror}). Name a folder that can be written, and has room, with"
        " --set data.cache=FOLDER"
    )


def _damaged(source: Source, row: int, reason: str) -> DataError:
    return DataError(
        f"{source.where(row)} cannot be decoded ({reason}). `lamina data check SOURCE` lists all damaged images;"
        " replace them, or leave them out with --set data.on_damaged=skip"
    )
