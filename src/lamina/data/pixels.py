"""Decodes every image once, into one memory-mapped array of bytes that a killed decode never leaves half written.

Shape letters: n images, h w the pixels of one image, H W those of the largest, c = 3 channels.
"""

import hashlib
import io
import json
import os
import shutil
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from lamina.data.records import Payload, Source
from lamina.errors import DataError
from lamina.types import Ints

Progress = Callable[[int, int], None]
T = TypeVar("T")

# What Pillow's decoders raise for files that are not what they claim to be.
DAMAGE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    struct.error,
    zlib.error,
)
_FORMAT = 1
_ROTATED = frozenset({5, 6, 7, 8})
_ORIENTATION = 0x0112
_STALE_SECONDS = 24 * 3600
_HANDFUL = 32


@dataclass(frozen=True, eq=False)
class PixelStore:
    """Decoded images. Image k is pixels[k, :sizes[k, 0], :sizes[k, 1]]; the rest of its box is zero."""

    pixels: NDArray[np.uint8]
    """(n, H, W, 3), memory-mapped and read-only."""
    sizes_n2: Ints
    """Height and width of every image."""
    skipped: tuple[str, ...] = ()
    """The damaged images left out: where each one was, and what is wrong with it."""

    def __len__(self) -> int:
        return len(self.sizes_n2)


@dataclass(frozen=True)
class Damage:
    """Why an image could not be decoded."""

    reason: str


def default_cache() -> Path:
    """Where decoded images go unless a folder is named: $XDG_CACHE_HOME/lamina, else ~/.cache/lamina."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lamina"


def stored_size(height: int, width: int, store_px: int) -> tuple[int, int]:
    """Height and width at which an image is kept: at most 2 : 1, the short side at most `store_px`, never enlarged."""
    short = min(height, width)
    scale = min(1.0, store_px / short)
    box_h, box_w = min(height, 2 * short), min(width, 2 * short)
    return max(1, round(box_h * scale)), max(1, round(box_w * scale))


def decode(payload: Payload, store_px: int | None = None) -> NDArray[np.uint8]:
    """One image as RGB (h, w, 3): upright by its EXIF tag, transparency over white, reduced to `stored_size`.

    Without store_px, at its own size and shape. Raises one of DAMAGE if it cannot be decoded.
    """
    with _opened(payload) as image:
        height, width = _upright_size(image)
        target = (height, width) if store_px is None else stored_size(height, width, store_px)
        if store_px is not None and image.format == "JPEG":
            # JPEG can be decoded at 1/2, 1/4 or 1/8 for a fraction of the time; twice the target keeps it antialiased.
            enough = 2 * max(target)
            image.draft("RGB", (enough, enough))
        image.load()
        upright = _rgb(_upright(image))
    if target == (upright.height, upright.width):
        return np.asarray(upright)
    # Centred, at most 2 : 1.
    short = min(upright.height, upright.width)
    box_h, box_w = min(upright.height, 2 * short), min(upright.width, 2 * short)
    left, top = (upright.width - box_w) / 2, (upright.height - box_h) / 2
    box = (left, top, left + box_w, top + box_h)
    return np.asarray(upright.resize((target[1], target[0]), Image.Resampling.BILINEAR, box=box))


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
            raise DataError(
                f"decoded images cannot be kept in {cache} ({error.strerror}). Name a folder that can be written with"
                " --set data.cache=FOLDER"
            ) from error
        try:
            _write(source, store_px, partial, on_damaged, progress)
            _publish(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        skipped = {int(row): str(reason) for row, reason in meta["skipped"]}
        pixels = np.load(folder / "pixels.npy", mmap_mode="r", allow_pickle=False)
        sizes_n2 = np.load(folder / "sizes.npy", allow_pickle=False)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"the decoded images in {folder} are damaged ({error}). Remove that folder; they will be decoded again"
        ) from error
    if skipped and on_damaged == "error":
        row = min(skipped)
        raise _damaged(source, row, skipped[row])
    keep = np.array([row for row in range(len(source)) if row not in skipped], np.int64)
    told = tuple(f"{source.where(row)}: {reason}" for row, reason in sorted(skipped.items()))
    # A plain view: indexing a numpy.memmap costs more than copying a small image.
    return PixelStore(np.asarray(pixels)[: len(sizes_n2)], sizes_n2, told), keep


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
    # The first pass reads headers only, so that no more than a chunk of images is ever in memory.
    largest = np.zeros(2, np.int64)
    for row, size in enumerate(each(source, lambda payload: _header_size(payload, store_px))):
        if not isinstance(size, Damage):
            largest = np.maximum(largest, size)
        elif on_damaged == "error":
            raise _damaged(source, row, size.reason)
    height, width = (int(side) for side in largest)
    needed, free = n * height * width * 3, shutil.disk_usage(folder).free
    if needed > free:
        # A full disk would otherwise kill the process: writes to a memory map have no error to return.
        raise DataError(
            f"the decoded images of {source.name} need {needed / 2**30:.1f} GiB and {folder.parent} has"
            f" {free / 2**30:.1f} GiB free. Free some, name another with --set data.cache=FOLDER, or choose a"
            f" smaller backbone.image_size (images are kept at up to {store_px} px)"
        )
    if height == 0:
        raise DataError(f"none of the {n} images of {source.name} can be decoded; the first is {source.where(0)}")
    pixels = open_memmap(folder / "pixels.npy", mode="w+", dtype=np.uint8, shape=(n, height, width, 3))
    sizes: list[tuple[int, int]] = []
    skipped: list[tuple[int, str]] = []
    for row, image in enumerate(each(source, lambda payload: decode(payload, store_px), progress)):
        if isinstance(image, Damage):
            if on_damaged == "error":
                raise _damaged(source, row, image.reason)
            skipped.append((row, image.reason))
            continue
        h, w, _ = image.shape
        pixels[len(sizes), :h, :w] = image
        sizes.append((h, w))
    if not sizes:
        raise DataError(f"none of the {n} images of {source.name} can be decoded; the first is {source.where(0)}")
    pixels.flush()
    del pixels
    np.save(folder / "sizes.npy", np.array(sizes, np.int64), allow_pickle=False)
    meta = {"format": _FORMAT, "name": source.name, "n": len(sizes), "store_px": store_px, "skipped": skipped}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", "utf-8")
    for name in ("pixels.npy", "sizes.npy", "meta.json"):
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


def _damaged(source: Source, row: int, reason: str) -> DataError:
    return DataError(
        f"{source.where(row)} cannot be decoded ({reason}). `lamina data check SOURCE` lists all damaged images;"
        " replace them, or leave them out with --set data.on_damaged=skip"
    )


def _opened(payload: Payload) -> Image.Image:
    if isinstance(payload, bytes):
        return Image.open(io.BytesIO(payload))
    if isinstance(payload, str):
        raise TypeError("a text cannot be decoded as an image")
    return Image.fromarray(payload)


def _upright(image: Image.Image) -> Image.Image:
    # Without a tag Pillow would copy the image.
    return ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else image


def _upright_size(image: Image.Image) -> tuple[int, int]:
    turned = image.getexif().get(_ORIENTATION) in _ROTATED
    return image.size if turned else (image.height, image.width)


def _header_size(payload: Payload, store_px: int) -> tuple[int, int]:
    if isinstance(payload, np.ndarray):
        return stored_size(payload.shape[0], payload.shape[1], store_px)
    with _opened(payload) as image:
        height, width = _upright_size(image)
    return stored_size(height, width, store_px)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits of grey: Pillow's own conversion would clip all but the darkest 1/256 to white.
        grey = np.clip(np.asarray(image, np.float32) / 257, 0, 255)
        return Image.fromarray(np.round(grey).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
