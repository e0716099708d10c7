"""From a source to labelled data."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lamina.data import ImageTransform, from_arrays, load_images, load_texts, open_source
from lamina.errors import ConfigError, DataError
from lamina.types import Augment, Examples

TRANSFORM = ImageTransform(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), train="crop")
TEXTS = from_arrays(["a", "b"], [0, 1])
SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def test_digits_become_batches(tmp_path: Path) -> None:
    data = load_images(open_source("digits"), TRANSFORM, cache=tmp_path)
    assert (data.kind, data.name, len(data.labels_n), data.skipped) == ("image", "digits", 1797, ())
    rows = np.flatnonzero(data.splits_n == 0)
    batch = Examples(data.table, rows, data.labels_n[rows]).batch(np.arange(16), Augment(0, 0))
    assert batch.inputs["pixel_values"].shape == (16, 3, 8, 8)
    assert batch.labels_b.tolist() == data.labels_n[rows[:16]].tolist()
    assert load_images(open_source("digits"), TRANSFORM, cache=tmp_path).fingerprint == data.fingerprint


def test_rows_stay_with_their_labels_where_images_are_skipped(tmp_path: Path) -> None:
    images = [b"junk" if k in (1, 6) else png(10 * k) for k in range(10)]
    source = from_arrays(images, list("abcdefghij"), splits=["train"] * 8 + ["test"] * 2, domains=list("xy") * 5)
    with pytest.raises(DataError, match=r"arrays\[1\] cannot be decoded"):
        load_images(source, TRANSFORM, cache=tmp_path)
    data = load_images(source, TRANSFORM, cache=tmp_path, on_damaged="skip")
    assert [told.partition(":")[0] for told in data.skipped] == ["arrays[1]", "arrays[6]"]
    assert [data.class_names[k] for k in data.labels_n] == list("acdefhij")
    assert data.splits_n.tolist() == [0] * 6 + [2] * 2
    assert data.domains_n.tolist() == [0, 0, 1, 0, 1, 1, 0, 1]
    shades = data.table.inputs(np.arange(8), None)["pixel_values"][:, 0, 0, 0]
    np.testing.assert_allclose(shades * 127.5 + 127.5, [0, 20, 30, 40, 50, 70, 80, 90], atol=0.01)
    whole = from_arrays([png(10 * k) for k in range(10)], list("abcdefghij"), splits=["train"] * 8 + ["test"] * 2)
    assert load_images(whole, TRANSFORM, cache=tmp_path).fingerprint != data.fingerprint


def test_store_px(tmp_path: Path) -> None:
    source = from_arrays(np.zeros((4, 100, 100), np.uint8), [0, 1] * 2)
    for store_px, kept in ((None, 64), (16, 16), (200, 100)):
        data = load_images(source, TRANSFORM, cache=tmp_path, store_px=store_px)
        assert data.table.store.alike_nhwc.shape == (4, kept, kept, 3)  # type: ignore[attr-defined]


def test_wrong_uses_are_named(tmp_path: Path) -> None:
    images = from_arrays([b"junk", png(0)], [0, 0], splits=["train", "test"], name="pets")
    with pytest.raises(DataError, match="arrays holds texts, where images are needed"):
        load_images(TEXTS, TRANSFORM, cache=tmp_path)
    with pytest.raises(DataError, match="pets holds images, where texts are needed"):
        load_texts(images, tmp_path)
    with pytest.raises(ConfigError, match=r"data.on_damaged = 'ignore'; allowed are error and skip"):
        load_images(images, TRANSFORM, cache=tmp_path, on_damaged="ignore")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"store_px = 0; it must be 1 or more"):
        load_images(images, TRANSFORM, cache=tmp_path, store_px=0)
    with pytest.raises(DataError, match="no training image of pets can be decoded"):
        load_images(images, TRANSFORM, cache=tmp_path, on_damaged="skip")


@pytest.mark.shared
def test_real_images_of_several_sizes(tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip("the shared datasets are not beside this checkout")
    data = load_images(open_source(SHARED / "emoji_styles"), ImageTransform(32, (0,) * 3, (1,) * 3), cache=tmp_path)
    pixels = data.table.inputs(np.arange(64), Augment(1, 0))["pixel_values"]
    assert pixels.shape == (64, 3, 32, 32)
    assert 0 <= float(pixels.min()) < float(pixels.max()) <= 1
