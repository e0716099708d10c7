"""What can be predicted: paths, folders, bytes, arrays and images; what cannot be read comes through as an error."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lamina.data.inputs import image_files, payloads, read_file
from lamina.errors import DataError

PIXELS = np.full((5, 6, 3), 7, np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("a.png", "b/c.JPG", ".hidden/d.png", "e.txt"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def test_one_input_and_several(folder: Path) -> None:
    image = Image.fromarray(PIXELS)
    assert list(payloads(folder / "a.png", "image")) == [b"a.png"]
    assert list(payloads(str(folder), "image")) == [b"a.png", b"b/c.JPG"]
    assert list(payloads([folder / "a.png", b"raw"], "image")) == [b"a.png", b"raw"]
    assert np.array_equal(next(payloads(PIXELS, "image")), PIXELS)
    assert np.array_equal(next(payloads(image, "image")), PIXELS)
    assert list(payloads("a text", "text")) == ["a text"]
    assert list(payloads(["one", "two"], "text")) == ["one", "two"]


def test_an_image_lies_as_its_file_would(tmp_path: Path) -> None:
    turned = Image.fromarray(PIXELS)
    exif = turned.getexif()
    exif[0x0112] = 6
    assert next(payloads(turned, "image")).shape == (6, 5, 3)
    assert next(payloads(turned.convert("CMYK"), "image")).shape[2] == 3
    assert isinstance(next(payloads(tmp_path, "text")), DataError)


def test_what_cannot_be_read(folder: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        image_files(folder / "gone.png")
    (folder / "b" / "c.JPG").unlink()
    with pytest.raises(DataError, match="holds no image"):
        image_files(folder / "b")
    with pytest.raises(DataError, match="no regular file"):
        read_file(Path("/dev/null"))
    assert isinstance(next(payloads(Path("/dev/null"), "image")), DataError)
