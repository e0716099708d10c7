"""Decoding: what Pillow's formats come to, and that a decoded copy is whole or not there."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lamina.data import from_arrays, open_source, pixels
from lamina.data.decoding import decode, stored_size
from lamina.data.pixels import decode_once, default_cache
from lamina.errors import DataError


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def gradient(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], 2).astype(np.uint8))


GOOD = encoded(gradient(6, 6))
TRUNCATED = encoded(gradient(60, 60))[:-600]
JUNK = b"this is no image"


@pytest.mark.parametrize(
    ("size", "store_px", "stored"),
    [
        ((32, 32), 64, (32, 32)),
        ((128, 96), 64, (85, 64)),
        ((100, 1000), 64, (64, 128)),
        ((1000, 100), 200, (200, 100)),
        ((1, 9), 8, (1, 2)),
    ],
)
def test_stored_size(size: tuple[int, int], store_px: int, stored: tuple[int, int]) -> None:
    assert stored_size(*size, store_px) == stored
    assert decode(np.zeros(size, np.uint8), store_px).shape == (*stored, 3)


def test_reduction_is_pillows() -> None:
    image = gradient(90, 120)
    expected = np.asarray(image.resize((40, 30), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(decode(encoded(image), 30), expected)


def test_wide_images_keep_their_middle() -> None:
    wide = np.zeros((10, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    np.testing.assert_array_equal(decode(wide, 10), np.full((10, 20, 3), 200, np.uint8))


def test_large_jpeg_close_to_a_full_decode() -> None:
    image = gradient(512, 640)
    jpeg = encoded(image, "JPEG", quality=95)
    full = Image.open(io.BytesIO(jpeg)).resize((80, 64), Image.Resampling.BILINEAR)
    difference = np.abs(decode(jpeg, 64).astype(int) - np.asarray(full).astype(int))
    assert difference.mean() < 3


def test_upright_by_exif() -> None:
    image = gradient(4, 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(image, "PNG", exif=exif)
    expected = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(decode(turned), expected)
    assert decode(turned, 2).shape == (4, 2, 3)


def test_modes() -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert (decode(encoded(clear)) == 255).all(), "transparency lies over white"
    half = decode(encoded(Image.new("LA", (1, 1), (0, 128))))
    assert abs(int(half[0, 0, 0]) - 127) <= 1
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30])
    assert decode(encoded(palette))[0, 0].tolist() == [10, 20, 30]
    assert decode(encoded(palette, transparency=0))[0, 0].tolist() == [255, 255, 255]
    assert decode(encoded(Image.new("1", (2, 2), 1)))[0, 0].tolist() == [255, 255, 255]
    deep = Image.fromarray(np.full((2, 2), 32768, np.uint16))
    assert decode(encoded(deep))[0, 0].tolist() == [128, 128, 128]
    assert decode(encoded(Image.new("CMYK", (2, 2)), "JPEG"))[0, 0].tolist() == [255, 255, 255]


def test_every_image_is_kept_with_its_size(tmp_path: Path) -> None:
    images = [gradient(6, 9), gradient(12, 4), gradient(8, 8)]
    source = from_arrays([encoded(image) for image in images], [0, 1, 0])
    calls: list[tuple[int, int]] = []
    store, keep = decode_once(source, store_px=8, cache=tmp_path, progress=lambda *call: calls.append(call))
    assert calls == [(3, 3)]
    assert keep.tolist() == [0, 1, 2]
    assert store.sizes_n2.tolist() == [[6, 9], [8, 4], [8, 8]]
    assert store.box == (8, 9)
    for k, image in enumerate(images):
        np.testing.assert_array_equal(store.image(k), decode(encoded(image), 8))
        assert not store.image(k).flags.writeable
    assert store.pixels.nbytes == 3 * (6 * 9 + 8 * 4 + 8 * 8)


def test_one_large_image_takes_its_own_bytes_only(tmp_path: Path) -> None:
    images = [np.full((4, 4, 3), k, np.uint8) for k in range(60)] + [np.full((100, 200, 3), 60, np.uint8)]
    store, _ = decode_once(from_arrays(images, [0] * 61), store_px=64, cache=tmp_path)
    assert store.pixels.nbytes == 3 * (60 * 4 * 4 + 64 * 128)
    assert [int(store.image(k).max()) for k in range(61)] == list(range(61))


def test_many_images_keep_their_order(tmp_path: Path) -> None:
    images_n = np.arange(200, dtype=np.uint8)[:, None, None].repeat(3, 1).repeat(3, 2)
    store, _ = decode_once(from_arrays(images_n, [0, 1] * 100), store_px=8, cache=tmp_path)
    assert [int(store.image(k).max()) for k in range(200)] == list(range(200))


def test_a_second_call_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = from_arrays([GOOD] * 4, [0, 1] * 2)
    first, _ = decode_once(source, store_px=8, cache=tmp_path)

    def fail(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(pixels, "decode", fail)
    second, _ = decode_once(source, store_px=8, cache=tmp_path)
    np.testing.assert_array_equal(first.pixels, second.pixels)
    with pytest.raises(AssertionError, match="decoded again"):
        decode_once(source, store_px=4, cache=tmp_path)


def test_a_changed_file_is_decoded_again(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for k in range(2):
        Image.new("RGB", (4, 4)).save(folder / f"{k}.bmp")
    decode_once(open_source(tmp_path / "images"), store_px=8, cache=tmp_path / "cache")
    Image.new("RGB", (4, 4), "white").save(folder / "0.bmp")
    store, _ = decode_once(open_source(tmp_path / "images"), store_px=8, cache=tmp_path / "cache")
    assert store.image(0).min() == 255


def test_an_interrupted_decode_leaves_nothing(tmp_path: Path) -> None:
    source = from_arrays([GOOD] * 4, [0, 1] * 2)

    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode_once(source, store_px=8, cache=tmp_path, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    # What a killed process leaves is under another name, and is not taken for a copy.
    (tmp_path / ".half").mkdir()
    store, _ = decode_once(source, store_px=8, cache=tmp_path)
    assert len(store) == 4


@pytest.mark.parametrize("bad", [JUNK, TRUNCATED, b""])
def test_a_damaged_image_is_named(tmp_path: Path, bad: bytes) -> None:
    source = from_arrays([GOOD, GOOD, bad, GOOD], [0, 1] * 2, name="mine")
    with pytest.raises(DataError, match=r"mine\[2\] cannot be decoded \(.*`lamina data check SOURCE`.*on_damaged=skip"):
        decode_once(source, store_px=64, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_damaged_images_are_left_out_and_recorded(tmp_path: Path) -> None:
    source = from_arrays([JUNK, GOOD, TRUNCATED, GOOD], [0, 1] * 2, name="mine")
    for _ in range(2):
        store, keep = decode_once(source, store_px=64, cache=tmp_path, on_damaged="skip")
        assert keep.tolist() == [1, 3]
        assert len(store) == 2
        assert [told.partition(":")[0] for told in store.skipped] == ["mine[0]", "mine[2]"]
        np.testing.assert_array_equal(store.image(1), decode(GOOD))
    with pytest.raises(DataError, match=r"mine\[0\] cannot be decoded"):
        decode_once(source, store_px=64, cache=tmp_path, on_damaged="error")


def test_all_damaged(tmp_path: Path) -> None:
    for bad in (JUNK, TRUNCATED):
        with pytest.raises(DataError, match="none of the 2 images of mine can be decoded"):
            decode_once(from_arrays([bad] * 2, [0, 1], name="mine"), store_px=8, cache=tmp_path, on_damaged="skip")


def test_a_missing_file_is_damage(tmp_path: Path) -> None:
    for k in range(3):
        (tmp_path / "images" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "a" / f"{k}.png").write_bytes(GOOD)
    source = open_source(tmp_path / "images")
    (tmp_path / "images" / "a" / "1.png").unlink()
    with pytest.raises(DataError, match=r"1.png cannot be decoded \(.*No such file"):
        decode_once(source, store_px=8, cache=tmp_path / "cache")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be kept in .*file.*--set data.cache=FOLDER"):
        decode_once(from_arrays([GOOD] * 2, [0, 1]), store_px=8, cache=tmp_path / "file")


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        free = 10

    monkeypatch.setattr(pixels.shutil, "disk_usage", lambda _: Full)
    with pytest.raises(DataError, match=r"need 0.0 GiB .* 0.0 GiB free.*smaller backbone.image_size .* 8 px"):
        decode_once(from_arrays([GOOD] * 2, [0, 1]), store_px=8, cache=tmp_path)


def test_a_copy_that_was_tampered_with(tmp_path: Path) -> None:
    source = from_arrays([GOOD] * 2, [0, 1])
    decode_once(source, store_px=8, cache=tmp_path)
    (copy,) = tmp_path.iterdir()
    assert json.loads((copy / "meta.json").read_text())["n"] == 2
    whole = (copy / "pixels.bin").read_bytes()
    (copy / "pixels.bin").write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"decoded images in .* are damaged .*Remove that folder"):
        decode_once(source, store_px=8, cache=tmp_path)
    (copy / "meta.json").unlink()
    with pytest.raises(DataError, match="something else is there"):
        decode_once(source, store_px=8, cache=tmp_path)


@pytest.mark.parametrize("name", ["meta.json", "sizes.npy", "pixels.bin"])
@pytest.mark.parametrize("content", [b"", b"[]", b"junk" * 9, b"PK\x05\x06" + b"\0" * 18])
def test_a_copy_that_is_no_copy(tmp_path: Path, name: str, content: bytes) -> None:
    source = from_arrays([GOOD] * 2, [0, 1])
    decode_once(source, store_px=8, cache=tmp_path)
    (copy,) = tmp_path.iterdir()
    (copy / name).write_bytes(content)
    with pytest.raises(DataError, match=r"decoded images in .* are damaged .*Remove that folder"):
        decode_once(source, store_px=8, cache=tmp_path)


def test_a_disk_that_fills_up_while_images_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pixels.np, "ascontiguousarray", full)
    with pytest.raises(DataError, match=r"cannot be kept in .* .No space left on device.*data.cache=FOLDER"):
        decode_once(from_arrays([GOOD] * 2, [0, 1]), store_px=8, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "lamina"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "lamina"
