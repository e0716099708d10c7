"""Decodes one image to RGB. Only formats whose decoders run inside this process are opened, whatever a file is called."""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from lamina.data.records import Payload, Row

FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "SGI", "TIFF", "WEBP")
"""What is opened. Pillow knows more; of those, EPS starts Ghostscript, and others hand the file to further programs."""

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
"""What `decode` raises for files that are not what they claim to be."""
BOMB = Image.DecompressionBombError
"""The one of them that says that an image has more pixels than are allowed."""
_BROKEN = (LookupError, ArithmeticError, TypeError, AttributeError, RuntimeError, MemoryError)
"""What Pillow raises besides, for headers and tags that do not fit together."""
_ROTATED = frozenset({5, 6, 7, 8})
_ORIENTATION = 0x0112
_WIDTH, _HEIGHT, _BITS_PER_SAMPLE, _PHOTOMETRIC, _LARGEST_SAMPLE = 256, 257, 258, 262, 341
_HEAD = 16
_NEARLY_BLACK = 16


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
    try:
        return _decoded(payload, store_px)
    except _BROKEN as error:
        raise ValueError(f"the image is damaged ({type(error).__name__}: {error})") from error


def header_size(payload: Payload, store_px: int) -> tuple[int, int]:
    """Height and width at which an image is kept, from its header. Raises one of DAMAGE if that cannot be read."""
    if isinstance(payload, np.ndarray):
        return stored_size(payload.shape[0], payload.shape[1], store_px)
    try:
        with _opened(payload) as image:
            return stored_size(*_upright_size(image), store_px)
    except _BROKEN as error:
        raise ValueError(f"the image is damaged ({type(error).__name__}: {error})") from error


def full_size(payload: bytes) -> tuple[int, int]:
    """Height and width of an encoded image as stored, from its header. Raises one of DAMAGE if that cannot be read."""
    try:
        with _opened(payload) as image:
            return image.height, image.width
    except _BROKEN as error:
        raise ValueError(f"the image is damaged ({type(error).__name__}: {error})") from error


@contextmanager
def at_most(pixels: int) -> Iterator[None]:
    """Within it, Pillow itself refuses an image of more pixels, also one that lies inside another, and gives no warnings. It
    holds for all threads of the process."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max(1, pixels // 2)  # Pillow refuses twice as many
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def nearly_black(payload: Payload, pixels: NDArray[np.uint8]) -> bool:
    """Whether an image of more than 8 bits has decoded to pixels that are almost all black.

    Its numbers are probably of 12 bits or fewer, in a file that says 16.
    """
    if not isinstance(payload, bytes) or pixels.max() > _NEARLY_BLACK:
        return False
    with _opened(payload) as image:
        if not isinstance(image, ImageFile.ImageFile):
            return False
        codes = [tile.args if isinstance(tile.args, str) else str(tile.args[0]) for tile in image.tile if tile.args]
        return image.mode.startswith("I") or any(";16" in code for code in codes)


def has_more_frames(payload: Payload) -> bool:
    """Whether an image that can be decoded has frames or pages after the first, which `decode` does not read."""
    if not isinstance(payload, bytes):
        return False
    try:
        with _opened(payload) as image:
            # The further frames of an MPO are previews of the photograph.
            return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except (*DAMAGE, *_BROKEN):
        # The first frame is whole; a damaged frame after it is one more that is not read.
        return True


def _decoded(payload: Payload, store_px: int | None) -> NDArray[np.uint8]:
    with _opened(payload) as image:
        height, width = _upright_size(image)
        target = (height, width) if store_px is None else stored_size(height, width, store_px)
        if store_px is not None and image.format == "JPEG":
            # JPEG can be decoded at 1/2, 1/4 or 1/8 for a fraction of the time; twice the target keeps it antialiased.
            enough = 2 * max(target)
            image.draft("RGB", (enough, enough))
        image.load()
        white = _white(image)
        upright = _upright(image)
        if white is not None:
            upright = _eight_bits(upright, white, white_is_zero=_white_is_zero(image))
        upright = _rgb(upright)
    if target == (upright.height, upright.width):
        return np.asarray(upright)
    # Centred, at most 2 : 1.
    short = min(upright.height, upright.width)
    box_h, box_w = min(upright.height, 2 * short), min(upright.width, 2 * short)
    left, top = (upright.width - box_w) / 2, (upright.height - box_h) / 2
    box = (left, top, left + box_w, top + box_h)
    return np.asarray(upright.resize((target[1], target[0]), Image.Resampling.BILINEAR, box=box))


def _opened(payload: Payload) -> Image.Image:
    if isinstance(payload, bytes):
        try:
            return Image.open(io.BytesIO(payload), formats=_formats())
        except UnidentifiedImageError as error:
            raise UnidentifiedImageError(f"cannot identify image file: {_named(payload)}") from error
    if isinstance(payload, str | Row):
        raise TypeError("a text cannot be decoded as an image")
    return Image.fromarray(payload)


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """The formats that the installed Pillow has, of those we open."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _named(payload: bytes) -> str:
    """What a file that was not opened is, from its first bytes."""
    if not payload:
        return "the file is empty"
    for name, (_, accept) in Image.OPEN.items():
        # Some answer with a sentence, where support for the format is missing.
        if accept is not None and accept(payload[:_HEAD]) is True and name not in FORMATS:
            return f"it is of the format {name}; allowed are {', '.join(FORMATS)}. Convert it to PNG"
    return f"it is none of {', '.join(FORMATS)}, or a variant that is not supported"


def _upright(image: Image.Image) -> Image.Image:
    # Without a tag Pillow would copy the image.
    return ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else image


def _upright_size(image: Image.Image) -> tuple[int, int]:
    # Some versions of Pillow turn the size of a TIFF when they open it; its tags tell the size as stored.
    tags = getattr(image, "tag_v2", {})
    width, height = int(tags.get(_WIDTH, image.width)), int(tags.get(_HEIGHT, image.height))
    return (width, height) if image.getexif().get(_ORIENTATION) in _ROTATED else (height, width)


def _white(image: Image.Image) -> float | None:
    """The value of white in grey of more than 8 bits, None for other images. Raises ValueError where it is not known."""
    if not image.mode.startswith(("I", "F")):
        return None
    tags = getattr(image, "tag_v2", {})
    told = tags.get(_LARGEST_SAMPLE)
    if told is not None:
        white = float(np.max(np.asarray(told, np.float64)))
        if not np.isfinite(white) or white <= 0:
            raise ValueError(f"its TIFF tag SMaxSampleValue is {white:g}; it must be above 0. Correct it")
        return white
    if image.mode == "F":
        return 1.0
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ValueError(
            "it has integers of 32 bits, or signed ones, and does not say which value is white. Convert it to 8 or 16 bits,"
            " or write the TIFF tag SMaxSampleValue (341)"
        )
    bits = max(np.atleast_1d(tags.get(_BITS_PER_SAMPLE, 16)).tolist())
    return float(2 ** min(int(bits), 16) - 1)


def _white_is_zero(image: Image.Image) -> bool:
    """Whether black and white change places in deep grey. Pillow heeds the tag for 8 bits and fewer only."""
    return getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0


def _eight_bits(image: Image.Image, white: float, *, white_is_zero: bool) -> Image.Image:
    """Deep grey scaled to 8 bits, with the value that a PNG calls transparent as white.

    Raises ValueError for values outside 0 to white.
    """
    values_hw = np.asarray(image, np.float32)
    low, high = float(values_hw.min()), float(values_hw.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("it holds values that are no numbers (NaN or infinite). Replace them")
    if low < 0 or high > white:
        raise ValueError(
            f"it has values from {low:g} to {high:g}; allowed are 0 to {white:g} for its type. Convert it to 8 or 16 bits"
        )
    if white_is_zero:
        values_hw = np.float32(white) - values_hw
    clear = image.info.get("transparency")
    if clear is not None:
        values_hw = np.where(values_hw == np.float32(clear), np.float32(white), values_hw)
    return Image.fromarray(np.round(np.clip(values_hw / np.float32(white / 255), 0, 255)).astype(np.uint8))


def _rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
