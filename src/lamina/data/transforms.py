"""Crops, flips and resizes of whole batches: two matrix products, with a weight matrix per image.

An antialiased bilinear resize is linear and separable. Output pixel y of a box [top, top + height) has its centre at
    c(y) = top + (y + 1/2) height / size,
and takes input pixel j with the weight max(0, 1 - |j + 1/2 - c(y)| / max(1, height / size)), scaled to sum to one: the
triangle filter of Pillow's `resize(box=..., BILINEAR)`. Crop and resize are these weights, a flip is their order.

Shape letters: b images of a batch, h w input pixels, c = 3 channels, s output pixels per side.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamina import rng
from lamina.data.pixels import PixelStore
from lamina.errors import ConfigError
from lamina.types import Augment, Ints

Boxes = NDArray[np.float64]

# Keys the draws, so that they share nothing with others made from the same seed and epoch, such as the order.
_DRAWS = rng.seed_of("lamina.data.transforms")
_FLIP, _CROP = _DRAWS, _DRAWS + 1
_TRIES = 10
# Images of more bytes than this (295 by 295 pixels) are resized one by one.
_SMALL_BYTES = 2**18


@dataclass(frozen=True)
class ImageTransform:
    """What happens between decoded pixels and a backbone. Raises ConfigError for a value that is not allowed."""

    size: int
    """Pixels per side of what the backbone sees."""
    mean: tuple[float, float, float]
    """Subtracted from every channel, which then lies in [0, 1] ..."""
    std: tuple[float, float, float]
    """... and what it is divided by."""
    evaluate: Literal["resize", "resize-crop"] = "resize"
    """resize: the whole image. resize-crop: the short side to 256/224 of the size, then the central square."""
    train: Literal["crop-flip", "crop", "none"] = "crop-flip"
    """crop-flip: a random resized crop, mirrored half of the time. crop: never mirrored. none: as in evaluation."""
    scale: tuple[float, float] = (0.08, 1.0)
    """The least and the largest share of an image's area that a random crop shows."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"size = {self.size}; it must be 1 or more")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError(
                f"backbone.mean = {self.mean}, backbone.std = {self.std}: must be three numbers each, std above 0"
            )
        if self.evaluate not in ("resize", "resize-crop"):
            raise ConfigError(f"data.evaluate = {self.evaluate!r}; allowed are resize and resize-crop")
        if self.train not in ("crop-flip", "crop", "none"):
            raise ConfigError(f"data.augment = {self.train!r}; allowed are crop-flip, crop and none")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"data.crop_scale = {self.scale}; allowed are two shares, 0 < least <= largest <= 1")


def random_resized_crop_boxes(
    sizes_n2: Ints,
    rows: Ints,
    augment: Augment,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Boxes:
    """Boxes (b, 4) as (top, left, height, width), in whole pixels, each within its image.

    Area and logarithm of the width-to-height ratio are uniform; ten draws, then the largest central box of an allowed
    ratio (torchvision's RandomResizedCrop). Each is a function of (seed, epoch, row) and of its image's size only.

    sizes_n2: sizes of the images of these rows, (b, 2). rows: (b,).
    """
    heights_b, widths_b = sizes_n2[:, 0], sizes_n2[:, 1]
    boxes_b4 = _central(heights_b, widths_b, ratio)
    open_m = np.arange(len(rows))
    for attempt in range(_TRIES):
        area_m, shape_m, down_m, right_m = (
            rng.uniform(rows[open_m], augment.seed, augment.epoch, _CROP + 4 * attempt + k) for k in range(4)
        )
        h_m, w_m = heights_b[open_m], widths_b[open_m]
        target_m = h_m * w_m * (scale[0] + (scale[1] - scale[0]) * area_m)
        aspect_m = np.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * shape_m)
        width_m = np.rint(np.sqrt(target_m * aspect_m))
        height_m = np.rint(np.sqrt(target_m / aspect_m))
        fits_m = (width_m > 0) & (width_m <= w_m) & (height_m > 0) & (height_m <= h_m)
        top_m = np.floor(down_m * (h_m - height_m + 1))
        left_m = np.floor(right_m * (w_m - width_m + 1))
        boxes_b4[open_m[fits_m]] = np.stack([top_m, left_m, height_m, width_m], 1)[fits_m]
        open_m = open_m[~fits_m]
        if not len(open_m):
            break
    return boxes_b4


def centre_boxes(sizes_n2: Ints, size: int, evaluate: Literal["resize", "resize-crop"]) -> Boxes:
    """The boxes (n, 4) of the evaluation transform, as (top, left, height, width).

    resize: whole images. resize-crop: what a resize of the short side to round(size 256 / 224) followed by a central
    crop of `size` shows, as one box.
    """
    heights_n, widths_n = sizes_n2[:, 0].astype(np.float64), sizes_n2[:, 1].astype(np.float64)
    if evaluate == "resize":
        zeros_n = np.zeros_like(heights_n)
        return np.stack([zeros_n, zeros_n, heights_n, widths_n], 1)
    side_n = np.minimum(heights_n, widths_n) * (size / round(size * 256 / 224))
    return np.stack([(heights_n - side_n) / 2, (widths_n - side_n) / 2, side_n, side_n], 1)


def resample(
    pixels_bhwc: Tensor, boxes_b4: Boxes, size: int, flip_b: NDArray[np.bool_], sizes_b2: Ints | None = None
) -> Tensor:
    """The boxes of the images, resized to `size` and mirrored where told: (b, 3, s, s) float32 in [0, 1].

    pixels_bhwc: uint8. boxes_b4: (top, left, height, width). sizes_b2: the part of each image that is not padding.
    As in Pillow, a reduction looks beyond its box where there are pixels, and never beyond the image.
    """
    b, h, w, c = pixels_bhwc.shape
    sizes_b2 = np.broadcast_to(np.array([h, w], np.int64), (b, 2)) if sizes_b2 is None else sizes_b2
    whole = (h, w) == (size, size) and bool((sizes_b2 == size).all())
    if whole and bool((boxes_b4 == np.array([0, 0, size, size])).all()):
        plain_bchw = pixels_bhwc.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        plain_bchw.mul_(1 / 255)
        if not flip_b.any():
            return plain_bchw
        return torch.where(torch.from_numpy(flip_b)[:, None, None, None], plain_bchw.flip(3), plain_bchw)
    rows_bsh = _weights(boxes_b4[:, 0], boxes_b4[:, 2], sizes_b2[:, 0], size, h, np.zeros(b, np.bool_))
    columns_bsw = _weights(boxes_b4[:, 1], boxes_b4[:, 3], sizes_b2[:, 1], size, w, flip_b)
    pixels = pixels_bhwc.to(torch.float32).reshape(b, h, w * c)
    reduced_bcsw = torch.bmm(rows_bsh.mul_(1 / 255), pixels).reshape(b, size, w, c).permute(0, 3, 1, 2)
    reduced = reduced_bcsw.reshape(b, c * size, w)
    return torch.bmm(reduced, columns_bsw.transpose(1, 2)).reshape(b, c, size, size).clamp_(0, 1)


class PixelTable:
    """Decoded images and their transform. Row k is image k of the store.

    names_n: the number by which each row is known to random draws; its own by default.
    """

    def __init__(self, store: PixelStore, transform: ImageTransform, names_n: Ints | None = None) -> None:
        self.store = store
        self.transform = transform
        self.names_n = names_n
        self._mean_c11 = torch.tensor(transform.mean)[:, None, None]
        self._std_c11 = torch.tensor(transform.std)[:, None, None]

    @property
    def augments(self) -> bool:
        return self.transform.train != "none"

    def lengths(self, rows: Ints) -> Ints:
        return np.ones(len(rows), np.int64)

    def inputs(self, rows: Ints, augment: Augment | None) -> dict[str, Tensor]:
        """`pixel_values` (b, 3, s, s) float32, normalised: the training transform with `augment`, else evaluation's."""
        transform = self.transform
        sizes_b2 = self.store.sizes_n2[rows]
        flip_b = np.zeros(len(rows), np.bool_)
        if augment is None or transform.train == "none":
            boxes_b4 = centre_boxes(sizes_b2, transform.size, transform.evaluate)
        else:
            names_b = rows if self.names_n is None else self.names_n[rows]
            boxes_b4 = random_resized_crop_boxes(sizes_b2, names_b, augment, transform.scale)
            if transform.train == "crop-flip":
                flip_b = rng.uniform(names_b, augment.seed, augment.epoch, _FLIP) < 0.5
        height, width = self.store.box
        resize = self._resize_together if 3 * height * width <= _SMALL_BYTES else self._resize_one_by_one
        pixels_bchw = resize(rows, boxes_b4, flip_b, sizes_b2)
        return {"pixel_values": pixels_bchw.sub_(self._mean_c11).div_(self._std_c11)}

    # Both ways take of an image what the image, its box and the store say, and nothing of its neighbours in the batch:
    # not even the last bit of a row depends on them.

    def _resize_together(self, rows: Ints, boxes_b4: Boxes, flip_b: NDArray[np.bool_], sizes_b2: Ints) -> Tensor:
        alike_nhwc = self.store.alike_nhwc
        shape = (len(rows), *self.store.box, 3)
        # In the order of the file, so that a disk is read in one direction.
        order = np.argsort(rows, kind="stable")
        if alike_nhwc is not None:
            gathered_bhwc = np.empty(shape, np.uint8)
            for k in order:
                gathered_bhwc[k] = alike_nhwc[rows[k]]
        else:
            gathered_bhwc = np.zeros(shape, np.uint8)
            for k in order:
                gathered_bhwc[k, : sizes_b2[k, 0], : sizes_b2[k, 1]] = self.store.image(rows[k])
        return resample(torch.from_numpy(gathered_bhwc), boxes_b4, self.transform.size, flip_b, sizes_b2)

    def _resize_one_by_one(self, rows: Ints, boxes_b4: Boxes, flip_b: NDArray[np.bool_], sizes_b2: Ints) -> Tensor:
        size = self.transform.size
        # The pixels the filter can reach from the box: a batch of whole large images would not fit into any cache.
        reach_b2 = np.maximum(boxes_b4[:, 2:] / size, 1.0)
        first_b2 = np.maximum(np.floor(boxes_b4[:, :2] - reach_b2), 0).astype(np.int64)
        last_b2 = np.minimum(np.ceil(boxes_b4[:, :2] + boxes_b4[:, 2:] + reach_b2).astype(np.int64), sizes_b2)
        resized_bchw = torch.empty(len(rows), 3, size, size)
        for k in np.argsort(rows, kind="stable"):
            (top, left), (bottom, right) = first_b2[k], last_b2[k]
            window_1hwc = torch.from_numpy(self.store.image(rows[k])[top:bottom, left:right].copy())[None]
            box_14 = boxes_b4[k : k + 1] - np.array([top, left, 0, 0])
            resized_bchw[k] = resample(window_1hwc, box_14, size, flip_b[k : k + 1])[0]
        return resized_bchw


def _weights(
    starts_b: NDArray[np.float64],
    lengths_b: NDArray[np.float64],
    limits_b: Ints,
    size: int,
    extent: int,
    reverse_b: NDArray[np.bool_],
) -> Tensor:
    """The triangle filter's weights (b, size, extent), float32; those of input pixels at or beyond a limit are zero."""
    steps_b = lengths_b / size
    outputs_s = np.arange(size) + 0.5
    centres_bs = starts_b[:, None] + outputs_s * steps_b[:, None]
    if reverse_b.any():
        centres_bs[reverse_b] = centres_bs[reverse_b, ::-1]
    # Centres are found in float64; for any image that can be stored, float32 holds them to a thousandth of a pixel.
    slope_b11 = torch.from_numpy((1 / np.maximum(steps_b, 1.0)).astype(np.float32))[:, None, None]
    centres_bs1 = torch.from_numpy(centres_bs.astype(np.float32))[:, :, None]
    inputs_e = torch.arange(extent, dtype=torch.float32) + 0.5
    weights_bse = (inputs_e - centres_bs1).abs_().mul_(-slope_b11).add_(1).clamp_(min=0)
    if bool((limits_b < extent).any()):
        limits_b11 = torch.from_numpy(limits_b.astype(np.float32))[:, None, None]
        weights_bse.mul_(inputs_e < limits_b11)
    return weights_bse.div_(weights_bse.sum(2, keepdim=True))


def _central(heights_b: Ints, widths_b: Ints, ratio: tuple[float, float]) -> Boxes:
    """The largest central boxes (b, 4) whose width-to-height ratio is allowed, in whole pixels."""
    shape_b = widths_b / heights_b
    width_b = np.where(shape_b > ratio[1], np.rint(heights_b * ratio[1]), widths_b)
    height_b = np.where(shape_b < ratio[0], np.rint(widths_b / ratio[0]), heights_b)
    top_b, left_b = (heights_b - height_b) // 2, (widths_b - width_b) // 2
    return np.stack([top_b, left_b, height_b, width_b], 1).astype(np.float64)
