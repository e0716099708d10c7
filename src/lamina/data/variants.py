"""Variants of a task's examples: inputs that are no example, made to see how features change away from the examples.

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

POOL = 512
"""Variants are made from this many examples, or up to twice as many."""
BATCH = 64
Inputs = Mapping[str, Tensor]
"""Of one example, without the leading dimension."""


class Pool:
    """Evenly spaced examples of a pass of unknown length."""

    def __init__(self) -> None:
        self.found: list[Inputs] = []
        self.seen, self.stride = 0, 1

    def add(self, batch: Batch) -> None:
        for row in range(len(batch)):
            if self.seen % self.stride == 0:
                self.found.append({name: value[row].cpu() for name, value in batch.inputs.items()})
            self.seen += 1
            if len(self.found) == 2 * POOL:
                self.found, self.stride = self.found[::2], 2 * self.stride


def variants(examples: Sequence[Inputs], count: int, generator: torch.Generator) -> Iterator[Batch]:
    """Yields `count` variants of these examples in batches, a function of the examples and the generator's state."""
    if "pixel_values" in examples[0]:
        images_bchw = torch.stack([example["pixel_values"] for example in examples])
    else:
        texts = [example["input_ids"][example["attention_mask"].bool()] for example in examples]
    for first in range(0, count, BATCH):
        size = min(BATCH, count - first)
        inputs = (
            {"pixel_values": of_images(images_bchw, size, generator)}
            if "pixel_values" in examples[0]
            else of_texts(texts, size, generator)
        )
        yield Batch(inputs=inputs, labels_b=torch.full((size,), -1))


def of_images(images_nchw: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Returns this many variants of images, (count, c, h, w). Only square images are turned by a quarter."""
    height, width = images_nchw.shape[2:]
    step = 1 if height == width else 2

    def turned() -> Tensor:
        found_bchw = images_nchw[torch.randint(len(images_nchw), (count,), generator=generator)]
        turns, flips = (torch.randint(n, (count,), generator=generator).tolist() for n in (4 // step, 2))
        return torch.stack(
            [
                torch.rot90(image_chw.flip(2) if flip else image_chw, step * turn, (1, 2))
                for image_chw, turn, flip in zip(found_bchw, turns, flips, strict=True)
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
    return torch.where(kind_b111 == 0, one_bchw, torch.where(kind_b111 == 1, mixed_bchw, cut_bchw))


def of_texts(texts: Sequence[Tensor], count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Returns this many variants of texts (t,). The tokens that all texts begin or end with, such as [CLS] and [SEP], stay."""
    start = shared(texts, min(map(len, texts)))
    end = shared([text.flip(0) for text in texts], min(map(len, texts)) - start)
    found = []
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


def shared(texts: Sequence[Tensor], most: int) -> int:
    """Returns how many tokens, at most this many, all texts begin with."""
    heads = torch.stack([text[:most] for text in texts])
    return int((heads == heads[0]).all(0).long().cumprod(0).sum())
