"""What is predicted: files, folders, encoded bytes, arrays, images and texts, without labels."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lamina.data.records import Payload
from lamina.data.tree import IMAGE_SUFFIXES, scan
from lamina.errors import DataError

Input = Path | str | bytes | NDArray[np.uint8] | Image.Image
Item = Payload | DataError
"""An encoded or decoded image, a text, or why it could not be read."""


def payloads(inputs: Input | Iterable[Input], kind: str) -> Iterator[Item]:
    """Yields the contents of files, and what is wrong with those that cannot be read. A folder stands for all images below it.
    For texts, a string is the text. Raises DataError for a file that does not exist."""
    several = [inputs] if isinstance(inputs, Path | str | bytes | np.ndarray | Image.Image) else inputs
    for item in several:
        if kind != "image":
            yield item if isinstance(item, str) else DataError(f"{type(item).__name__}, where the model takes texts")
        elif isinstance(item, Path | str):
            for file in image_files(Path(item)):
                try:
                    yield read_file(file)
                except DataError as error:
                    yield error
        elif isinstance(item, Image.Image):
            try:
                yield np.asarray(ImageOps.exif_transpose(item).convert("RGB"))
            except (OSError, ValueError) as error:
                yield DataError(f"the image cannot be read ({error})")
        else:
            yield item


def image_files(path: Path) -> list[Path]:
    """Returns a file, or all images below a folder in the order of their names. Raises DataError where there is none."""
    path = path.expanduser()
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"{path} does not exist. Give image files, or a folder of them.")
        return [path]
    found = [path / name for name in sorted(image.path for image in scan(path)[0].all_images())]
    if not found:
        raise DataError(f"{path} holds no image. Images end in {', '.join(sorted(IMAGE_SUFFIXES))}.")
    return found


def read_file(file: Path) -> bytes:
    """Returns the content of a file. Raises DataError for what is no regular file, or cannot be read."""
    if not file.is_file():
        raise DataError(f"{file} is no regular file.")
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from error
