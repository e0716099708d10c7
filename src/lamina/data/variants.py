"""Variants of a task's examples, made to see how features change away from the examples.

    image   an example turned or mirrored; a third of them mixed with another such image, λ x + (1 - λ) x' (mixup: Zhang et
            al., ICLR 2018), a third with a rectangle of another pasted in (CutMix: Yun et al., ICCV 2019)
    text    the tokens of two examples in random order, as many as the first one has

They have no labels, so nothing can be learnt from them but what a model does to inputs.

Shape letters: b batch, c channels, h height, w width, t tokens.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lamina.types import Batch

POOL = 64 * 2**20
"""Variants are made from examples of at most this many bytes: 5,400 images of 32 pixels, or 111 of 224."""
BATCH = 64
Inputs = Mapping[str, Tensor]
"""Of one example, without the leading dimension."""


class Pool:
    """Evenly spaced examples of a pass of unknown length."""

    def __init__(self) -> None:
        self.found: list[Inputs] = []
        self.seen, self.stride, self.bytes = 0, 1, 0

    def add(self, batch: Batch) -> None:
        """Take some of the next examples of the pass."""
        for row in range(len(batch)):
            if self.seen % self.stride == 0:
                self.found.append({name: value[row].cpu().clone() for name, value in batch.inputs.items()})
                self.bytes += bytes_of(self.found[-1])
            self.seen += 1
            while self.bytes > POOL and len(self.found) > 1:
                self.found, self.stride = self.found[::2], 2 * self.stride
                self.bytes = sum(map(bytes_of, self.found))


def bytes_of(inputs: Inputs) -> int:
    """Returns the bytes of an example."""
    return sum(value.numel() * value.element_size() for value in inputs.values())


def variants_of(examples: Sequence[Inputs], count: int, generator: torch.Generator) -> Iterator[Batch]:
    """Yields `count` variants of these examples in batches, a function of the examples and the generator's state."""
    images = [example["pixel_values"] for example in examples if "pixel_values" in example]
    texts = [example["input_ids"][example["attention_mask"].bool()] for example in examples if "input_ids" in example]
    frame = (0, 0) if images else frame_of(texts)
    for first in range(0, count, BATCH):
        size = min(BATCH, count - first)
        inputs = of_images(images, size, generator) if images else of_texts(texts, frame, size, generator)
        yield Batch(inputs=inputs, labels_b=torch.full((size,), -1))


def of_images(images: Sequence[Tensor], count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Returns this many variants of images (c, h, w): `pixel_values`, (b, c, h, w). Only square ones are turned by a
    quarter."""
    height, width = images[0].shape[1:]
    step = 1 if height == width else 2

    def turned() -> Tensor:
        chosen = torch.randint(len(images), (count,), generator=generator).tolist()
        turns, flips = (torch.randint(n, (count,), generator=generator).tolist() for n in (4 // step, 2))
        return torch.stack(
            [
                torch.rot90(images[i].flip(2) if flip else images[i], step * turn, (1, 2))
                for i, turn, flip in zip(chosen, turns, flips, strict=True)
            ]
        )

    def stripe(size: int) -> Tensor:
        """Returns a random stretch of this many places for every variant, (b, size)."""
        ends_b2 = torch.randint(size + 1, (count, 2), generator=generator).sort(1).values
        return (torch.arange(size) >= ends_b2[:, :1]) & (torch.arange(size) < ends_b2[:, 1:])

    one_bchw, other_bchw = turned(), turned()
    kind_b111 = torch.randint(3, (count, 1, 1, 1), generator=generator)
    share_b111 = torch.rand(count, 1, 1, 1, generator=generator)
    rectangle_b1hw = stripe(height)[:, None, :, None] & stripe(width)[:, None, None, :]
    mixed_bchw = share_b111 * one_bchw + (1 - share_b111) * other_bchw
    cut_bchw = torch.where(rectangle_b1hw, other_bchw, one_bchw)
    return {"pixel_values": torch.where(kind_b111 == 0, one_bchw, torch.where(kind_b111 == 1, mixed_bchw, cut_bchw))}


def of_texts(
    texts: Sequence[Tensor], frame: tuple[int, int], count: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Returns this many variants of texts (t,), padded: `input_ids` and `attention_mask`, (b, t). frame: how many tokens at the
    beginning and at the end stay."""
    (start, end), found = frame, []
    for _ in range(count):
        first, second = (texts[int(i)] for i in torch.randint(len(texts), (2,), generator=generator))
        inner = [text[start : len(text) - end] for text in (first, second)]
        both = torch.cat(inner)
        body = both[torch.randperm(len(both), generator=generator)[: len(inner[0])]]
        found.append(torch.cat([first[:start], body, first[len(first) - end :]]))
    masks = [torch.ones_like(text) for text in found]
    return {
        "input_ids": pad_sequence(found, batch_first=True),
        "attention_mask": pad_sequence(masks, batch_first=True),
    }


def frame_of(texts: Sequence[Tensor]) -> tuple[int, int]:
    """Returns how many tokens all texts begin with, and how many they end with, such as [CLS] and [SEP]."""
    shortest = min(map(len, texts))
    start = shared(texts, shortest)
    return start, shared([text.flip(0) for text in texts], shortest - start)


def shared(texts: Sequence[Tensor], most: int) -> int:
    """Returns how many tokens, at most this many, all texts begin with."""
    heads = torch.stack([text[:most] for text in texts])
    return int((heads == heads[0]).all(0).long().cumprod(0).sum())
