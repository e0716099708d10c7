"""Transforms: the resize is Pillow's, the crops are torchvision's, and both are functions of (seed, epoch, row)."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from lamina.data import transforms
from lamina.data.pixels import PixelStore
from lamina.data.transforms import ImageTransform, PixelTable, centre_boxes, random_resized_crop_boxes, resample
from lamina.errors import ConfigError
from lamina.types import Augment

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.5, 1.0)
NO_FLIP = np.zeros(1, np.bool_)

few = settings(max_examples=40, deadline=None)
sizes = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=12)


def noise(*shape: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def table(sizes_n: list[tuple[int, int]], transform: ImageTransform) -> PixelTable:
    sizes_n2 = np.array(sizes_n, np.int64)
    return PixelTable(PixelStore(noise(3 * int(sizes_n2.prod(1).sum())), sizes_n2), transform)


@few
@given(data=st.data(), h=st.integers(1, 40), w=st.integers(1, 40), size=st.integers(1, 40), flip=st.booleans())
def test_resample_is_pillows_resize(data: st.DataObject, h: int, w: int, size: int, flip: bool) -> None:
    image = data.draw(hnp.arrays(np.uint8, (h, w, 3)))
    # Whole and fractional boxes within the image, of at least a pixel.
    top, left = data.draw(st.floats(0, h - 1, width=32)), data.draw(st.floats(0, w - 1, width=32))
    height, width = data.draw(st.floats(1, h - top)), data.draw(st.floats(1, w - left))
    box = (left, top, min(left + width, w), min(top + height, h))
    expected = np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=box))
    boxes = np.array([[top, left, box[3] - top, box[2] - left]])
    ours = resample(torch.from_numpy(image)[None], boxes, size, np.array([flip]))
    assert ours.shape == (1, 3, size, size)
    assert ours.dtype == torch.float32
    if flip:
        ours = ours.flip(3)
    difference = (ours[0].permute(1, 2, 0) * 255 - torch.from_numpy(expected).float()).abs().max()
    assert difference <= 1.01


def test_padding_is_never_seen() -> None:
    pixels = noise(1, 20, 30, 3)
    inner = resample(torch.from_numpy(pixels[:, :9, :11].copy()), np.array([[0, 0, 9, 11.0]]), 6, NO_FLIP)
    padded = resample(torch.from_numpy(pixels), np.array([[0, 0, 9, 11.0]]), 6, NO_FLIP, np.array([[9, 11]]))
    torch.testing.assert_close(inner, padded, rtol=0, atol=1e-6)


@pytest.mark.parametrize("flip", [False, True])
def test_an_image_of_the_right_size_is_left_as_it_is(flip: bool) -> None:
    pixels = noise(2, 8, 8, 3)
    boxes = np.array([[0, 0, 8, 8.0]] * 2)
    ours = resample(torch.from_numpy(pixels), boxes, 8, np.array([flip, False]))
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(ours[1], expected[1], rtol=0, atol=1e-7)
    torch.testing.assert_close(ours[0], expected[0].flip(2) if flip else expected[0], rtol=0, atol=1e-7)
    # The general path agrees with the short one.
    bigger = np.zeros((2, 8, 9, 3), np.uint8)
    bigger[:, :, :8] = pixels
    general = resample(torch.from_numpy(bigger), boxes, 8, np.array([flip, False]), np.array([[8, 8]] * 2))
    torch.testing.assert_close(ours, general, rtol=0, atol=1e-6)


@few
@given(sizes=sizes, seed=st.integers(0, 2**62), epoch=st.integers(0, 1000), low=st.floats(0.01, 1.0))
def test_crops_lie_within_their_images(sizes: list[tuple[int, int]], seed: int, epoch: int, low: float) -> None:
    sizes_n2 = np.array(sizes)
    boxes = random_resized_crop_boxes(sizes_n2, np.arange(len(sizes)), Augment(seed, epoch), (low, 1.0))
    top, left, height, width = boxes.T
    assert (boxes == np.rint(boxes)).all()
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top + height <= sizes_n2[:, 0]).all()
    assert (left + width <= sizes_n2[:, 1]).all()


@few
@given(seed=st.integers(0, 2**62), epoch=st.integers(0, 99), chosen=st.lists(st.integers(0, 19), min_size=1))
def test_crops_are_functions_of_seed_epoch_and_row(seed: int, epoch: int, chosen: list[int]) -> None:
    sizes_n2 = np.random.default_rng(1).integers(1, 90, (20, 2))
    everything = random_resized_crop_boxes(sizes_n2, np.arange(20), Augment(seed, epoch))
    rows = np.array(chosen)
    np.testing.assert_array_equal(
        random_resized_crop_boxes(sizes_n2[rows], rows, Augment(seed, epoch)), everything[rows]
    )


def test_crops_follow_their_distribution() -> None:
    n = 20_000
    sizes_n2 = np.full((n, 2), 1000)
    boxes = random_resized_crop_boxes(sizes_n2, np.arange(n), Augment(3, 1), (0.2, 0.6))
    share = boxes[:, 2] * boxes[:, 3] / 1e6
    aspect = np.log(boxes[:, 3] / boxes[:, 2])
    assert abs(share.mean() - 0.4) < 0.005
    assert share.min() > 0.198
    assert share.max() < 0.602
    assert abs(aspect.mean()) < 0.005
    assert abs(aspect.std() - 2 * np.log(4 / 3) / np.sqrt(12)) < 0.005
    assert abs((boxes[:, 0] / (1000 - boxes[:, 2])).mean() - 0.5) < 0.01
    other = random_resized_crop_boxes(sizes_n2, np.arange(n), Augment(3, 2), (0.2, 0.6))
    assert (boxes != other).any(1).mean() > 0.99


def test_an_image_too_narrow_for_any_crop_gives_its_middle() -> None:
    boxes = random_resized_crop_boxes(np.array([[10, 100], [100, 10]]), np.arange(2), Augment(0, 0), (1.0, 1.0))
    assert boxes.tolist() == [[0, 43, 10, 13], [43, 0, 13, 10]]


def test_evaluation_boxes() -> None:
    sizes_n2 = np.array([[256, 512], [100, 80]])
    assert centre_boxes(sizes_n2, 224, "resize").tolist() == [[0, 0, 256, 512], [0, 0, 100, 80]]
    assert centre_boxes(sizes_n2, 224, "resize-crop").tolist() == [[16, 144, 224, 224], [15, 5, 70, 70]]


def test_resize_crop_is_a_resize_and_then_a_crop() -> None:
    image = noise(64, 96, 3)
    transform = ImageTransform(28, MEAN, STD, evaluate="resize-crop")
    ours = PixelTable(PixelStore(image[None], np.array([[64, 96]])), transform).inputs(np.array([0]), None)
    resized = np.asarray(Image.fromarray(image).resize((48, 32), Image.Resampling.BILINEAR))[2:30, 10:38]
    expected = (torch.from_numpy(resized.copy()).permute(2, 0, 1) / 255 - torch.tensor(MEAN)[:, None, None]) / (
        torch.tensor(STD)[:, None, None]
    )
    assert (ours["pixel_values"][0] - expected).abs().max() < 1.01 / 255 / min(STD)


@pytest.mark.parametrize("train", ["crop-flip", "crop", "none"])
@pytest.mark.parametrize("scale", [1, 40])
def test_not_a_bit_of_a_row_depends_on_the_batch(train: Any, scale: int) -> None:
    sizes_n = [(8 * scale, 8 * scale), (6 * scale, 12 * scale), (12 * scale, 7 * scale), (8 * scale, 8 * scale)]
    ours = table(sizes_n, ImageTransform(8, MEAN, STD, train=train))
    for augment in (None, Augment(5, 2)):
        together = ours.inputs(np.array([2, 0, 1, 3]), augment)["pixel_values"]
        assert together.shape == (4, 3, 8, 8)
        for k, row in enumerate([2, 0, 1, 3]):
            assert torch.equal(ours.inputs(np.array([row]), augment)["pixel_values"][0], together[k])


def test_large_images_one_by_one_are_as_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = table([(300, 310), (290, 320), (40, 30)], ImageTransform(32, MEAN, STD))
    rows = np.arange(3)
    one_by_one = [ours.inputs(rows, augment)["pixel_values"] for augment in (None, *(Augment(0, k) for k in range(5)))]
    monkeypatch.setattr(transforms, "_SMALL_BYTES", 2**30)
    together = [ours.inputs(rows, augment)["pixel_values"] for augment in (None, *(Augment(0, k) for k in range(5)))]
    torch.testing.assert_close(one_by_one, together, rtol=0, atol=1e-4)


def test_the_training_variants() -> None:
    def made(train: Any, augment: Augment | None) -> torch.Tensor:
        return table([(9, 9)] * 40, ImageTransform(8, (0, 0, 0), (1, 1, 1), train=train, scale=(1.0, 1.0))).inputs(
            np.arange(40), augment
        )["pixel_values"]

    plain, augment = made("none", None), Augment(0, 0)
    torch.testing.assert_close(made("none", augment), plain, rtol=0, atol=0)
    never, sometimes = made("crop", augment), made("crop-flip", augment)
    same = (never - sometimes).abs().amax((1, 2, 3)) < 1e-5
    mirrored = (never - sometimes.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    assert (same | mirrored).all()
    assert 8 <= int(mirrored.sum()) <= 32


def test_normalisation() -> None:
    pixels = noise(1, 4, 4, 3)
    ours = PixelTable(PixelStore(pixels, np.array([[4, 4]])), ImageTransform(4, MEAN, STD)).inputs(np.array([0]), None)
    expected = (pixels[0] / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(ours["pixel_values"][0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "size = 0; it must be 1 or more"),
        ({"std": (1.0, 0.0, 1.0)}, "std above 0"),
        ({"mean": (1.0,)}, "three numbers each"),
        ({"evaluate": "crop"}, "data.evaluate = 'crop'; allowed are resize and resize-crop"),
        ({"train": "flip"}, "data.augment = 'flip'; allowed are crop-flip, crop and none"),
        ({"scale": (0.5, 0.2)}, r"data.crop_scale = \(0.5, 0.2\); allowed are two shares"),
        ({"scale": (0.0, 1.0)}, "data.crop_scale"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImageTransform(**{"size": 8, "mean": MEAN, "std": STD, **change})


def test_no_rows() -> None:
    ours = table([(8, 8)], ImageTransform(8, MEAN, STD)).inputs(np.array([], np.int64), Augment(0, 0))
    assert ours["pixel_values"].shape == (0, 3, 8, 8)
