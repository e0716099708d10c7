"""Decoding one image: which formats are opened, how deep images are scaled, and what counts as damage."""

import io
import struct
import subprocess
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from lamina.data import audit, decoding, from_arrays, render
from lamina.data.decoding import DAMAGE, FORMATS, decode, header_size

RAMP = np.tile(np.linspace(0, 1, 64), (8, 1))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{ } loop\n%%EOF\n"


def encoded(pixels: np.ndarray[Any, Any], form: str = "TIFF", **tags: float) -> bytes:
    file = io.BytesIO()
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for number, value in tags.items():
        info[int(number.removeprefix("tag"))] = value
    Image.fromarray(pixels).save(file, form, **({"tiffinfo": info} if tags else {}))
    return file.getvalue()


def test_no_format_starts_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*command: object, **_: object) -> None:
        raise AssertionError(f"started {command}")

    monkeypatch.setattr(subprocess, "Popen", started)
    for work in (decode, lambda payload: header_size(payload, 8)):
        with pytest.raises(
            DAMAGE, match=r"cannot identify image file: it is of the format EPS; allowed are AVIF.*Convert"
        ):
            work(EPS)
    assert not {"EPS", "WMF", "FPX", "MIC", "HDF5", "GRIB", "BUFR"} & set(FORMATS)


@pytest.mark.parametrize("form", ["PSD", "FITS", "WMF"])
def test_other_formats_are_refused_by_name(form: str) -> None:
    starts = {"PSD": b"8BPS", "FITS": b"SIMPLE", "WMF": b"\xd7\xcd\xc6\x9a\0\0"}
    with pytest.raises(DAMAGE, match=f"it is of the format {form}; allowed"):
        decode(starts[form] + b"\0" * 100)


@pytest.mark.parametrize(("bad", "told"), [(b"", "the file is empty"), (b"<html></html>", "it is none of AVIF, BMP")])
def test_what_is_no_image_is_told(bad: bytes, told: str) -> None:
    with pytest.raises(DAMAGE, match=told):
        decode(bad)


@pytest.mark.parametrize("form", ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "TIFF", "WEBP"])
def test_the_formats_of_photographs_are_opened(form: str) -> None:
    if form not in Image.OPEN:
        Image.init()
    if form not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {form}")
    assert abs(int(decode(encoded(np.full((8, 8, 3), 200, np.uint8), form)).mean()) - 200) < 4


@pytest.mark.parametrize(
    ("pixels", "form", "tags"),
    [
        (RAMP.astype(np.float32), "TIFF", {}),
        ((255 * RAMP).astype(np.float32), "TIFF", {"tag341": 255.0}),
        ((65535 * RAMP).astype(np.uint16), "TIFF", {}),
        ((65535 * RAMP).astype(np.uint16), "PNG", {}),
        ((4095 * RAMP).astype(np.uint16), "TIFF", {"tag341": 4095}),
        ((1000 * RAMP).astype(np.int32), "TIFF", {"tag341": 1000}),
    ],
)
def test_deep_images_are_scaled_by_the_range_of_their_type(
    pixels: np.ndarray[Any, Any], form: str, tags: dict[str, float]
) -> None:
    ours = decode(encoded(pixels, form, **tags)).astype(int)
    assert np.abs(ours - np.round(255 * RAMP)[..., None]).max() <= 1


@pytest.mark.parametrize("form", ["TIFF", "JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright_by_their_exif_tag(form: str, orientation: int) -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    # The left half is black, the right half white.
    pixels = np.repeat(np.array([[0] * 40 + [255] * 40], np.uint8), 40, axis=0)
    Image.fromarray(pixels).save(file, form, exif=exif)
    size = (80, 40) if orientation > 4 else (40, 80)
    payload = file.getvalue()
    upright = decode(payload)[..., 0] > 127
    assert upright.shape == size
    assert header_size(payload, 20) == decode(payload, 20).shape[:2] == (size[0] // 2, size[1] // 2)
    # Where the white half must be seen, by the orientation (EXIF 2.32, tag 274).
    along = upright.any(axis=1) if orientation > 4 else upright.any(axis=0)
    assert along[-1] == (orientation in (1, 4, 5, 6))


@pytest.mark.parametrize("pixels", [RAMP.astype(np.float32), (65535 * RAMP).astype(np.uint16)])
@pytest.mark.parametrize("turned", [1, 6])
def test_where_zero_is_white_the_values_are_inverted(pixels: np.ndarray[Any, Any], turned: int) -> None:
    black, white = (decode(encoded(pixels, tag262=zero, tag274=turned)).astype(int) for zero in (1, 0))
    assert np.abs(black + white - 255).max() <= 1
    assert np.ptp(white) == 255


def test_the_transparent_value_of_a_deep_png_is_white() -> None:
    file = io.BytesIO()
    pixels = np.array([[0, 1000, 30000, 65535]], np.uint16)
    Image.fromarray(pixels).save(file, "PNG")
    plain = file.getvalue()
    body = b"tRNS" + struct.pack(">H", 1000)
    chunk = struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))
    at = plain.index(b"IDAT") - 4
    assert decode(plain)[0, :, 0].tolist() == [0, 4, 117, 255]
    assert decode(plain[:at] + chunk + plain[at:])[0, :, 0].tolist() == [0, 255, 117, 255]


def test_twelve_bits_that_the_file_declares() -> None:
    # Two samples of 12 bits in three bytes: white, black.
    data = bytes([0xFF, 0xF0, 0x00]) * (64 // 2 * 8)
    tags = {256: 64, 257: 8, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: 8, 279: len(data)}
    directory = b"".join(struct.pack("<HHII", number, 4, 1, value) for number, value in sorted(tags.items()))
    file = b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + struct.pack("<I", 0) + data
    assert decode(file)[0, :4, 0].tolist() == [255, 0, 255, 0]


@pytest.mark.parametrize(
    ("pixels", "told"),
    [
        ((255 * RAMP).astype(np.float32), "values from 0 to 255; allowed are 0 to 1 for its type. Convert"),
        ((RAMP - 0.5).astype(np.float32), "values from -0.5 to 0.5; allowed are 0 to 1"),
        (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "no numbers .NaN or infinite."),
        (np.where(RAMP > 0.5, np.inf, RAMP).astype(np.float32), "no numbers .NaN or infinite."),
        ((255 * RAMP).astype(np.int32), "integers of 32 bits, or signed ones, .*Convert it to 8 or 16 bits"),
        ((65535 * RAMP).astype(np.int32), "does not say which value is white"),
    ],
)
def test_deep_images_of_no_known_range_are_damage(pixels: np.ndarray[Any, Any], told: str) -> None:
    with pytest.raises(DAMAGE, match=told):
        decode(encoded(pixels))
    (damaged,) = audit(from_arrays([encoded(pixels)] + [encoded(RAMP.astype(np.float32))] * 5, [0] * 6)).damaged
    assert damaged.startswith("arrays[0]: ")


@pytest.mark.parametrize("white", [0, -1, float("nan"), float("inf")])
def test_a_tag_that_cannot_be_is_damage(white: float) -> None:
    with pytest.raises(DAMAGE, match=r"SMaxSampleValue is .*must be above 0"):
        decode(encoded(RAMP.astype(np.float32), tag341=float(white)))


def test_twelve_bits_in_sixteen_are_reported() -> None:
    twelve, sixteen = (encoded((top * RAMP).astype(np.uint16), "PNG") for top in (4095, 65535))
    black = encoded(np.zeros((4, 4), np.uint8), "PNG")
    found = audit(from_arrays([twelve, sixteen, black] * 2, [0] * 6, splits=["train"] * 3 + ["test"] * 3, name="scans"))
    assert found.black == ("scans[0]", "scans[3]")
    assert any("2 images nearly black: numbers of 12 bits or fewer in 16?" in problem for problem in found.problems)


def test_what_pillow_raises_for_broken_headers_is_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    good = encoded(np.zeros((4, 4), np.uint8), "PNG")
    for error in (KeyError("x"), ZeroDivisionError("x"), TypeError("x"), RuntimeError("x"), OverflowError("x")):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(decoding.Image, "open", fail)
            with pytest.raises(ValueError, match=f"the image is damaged .{type(error).__name__}: "):
                decode(good)
            with pytest.raises(ValueError, match="the image is damaged"):
                header_size(good, 8)


def test_images_of_several_frames_are_counted() -> None:
    shades = [Image.new("RGB", (4, 4), (k, 0, 0)) for k in (10, 100, 200)]
    images = []
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        for more in (shades[1:], []):
            file = io.BytesIO()
            shades[0].save(file, form, save_all=bool(more), append_images=more)
            images.append(file.getvalue())
    file = io.BytesIO()
    shades[0].save(file, "MPO", save_all=True, append_images=shades[1:])
    found = audit(from_arrays([*images, file.getvalue()], [0] * 9, name="x"), min_per_class=1)
    assert found.more_frames == ("x[0]", "x[2]", "x[4]", "x[6]")
    assert "only the first frame is read: 4 images (x[0], x[2], x[4], ...)\n" in render(found)
    assert not any("frame" in problem for problem in found.problems)
    assert "only the first frame" not in render(audit(from_arrays(images[1::2], [0] * 4)))
