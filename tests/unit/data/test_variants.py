"""Variants of examples: what they are made of, and that they repeat.

Shape letters: b variants, c channels, h height, w width.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from lamina.data import variants as made
from lamina.data.variants import Pool, frame_of, of_images, of_texts, variants_of
from lamina.types import Batch


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 3, height: int = 4, width: int = 4) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(n, 2, height, width))).float()


def test_some_variants_are_an_image_turned_or_mirrored_and_others_are_not():
    whole_bchw = images()
    turns = [torch.rot90(side, k, (2, 3)) for side in (whole_bchw, whole_bchw.flip(3)) for k in range(4)]
    known = {image.numpy().tobytes() for turned in turns for image in turned}
    kept = [image.numpy().tobytes() in known for image in of_images(list(whole_bchw), 400, seeded())["pixel_values"]]
    assert 100 < sum(kept) < 240  # a third is neither mixed nor cut, and some rectangles are empty


@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_variants_stay_within_the_values_of_the_images(size: tuple[int, int]):
    whole_bchw = images(5, *size)
    found_bchw = of_images(list(whole_bchw), 100, seeded())["pixel_values"]
    assert found_bchw.shape == (100, 2, *size)
    assert found_bchw.dtype == torch.float32
    assert whole_bchw.min() <= found_bchw.min() <= found_bchw.max() <= whole_bchw.max()


def test_a_text_keeps_its_ends_and_its_length_and_gets_words_of_two():
    texts = [torch.tensor([101, *words, 102]) for words in ([1, 2, 3], [4, 5], [6, 7, 8, 9])]
    found = of_texts(texts, frame_of(texts), 200, seeded())
    words_seen = set()
    for ids_t, mask_t in zip(found["input_ids"], found["attention_mask"], strict=True):
        ids = ids_t[mask_t.bool()].tolist()
        assert (ids[0], ids[-1]) == (101, 102)
        assert 4 <= len(ids) <= 6
        assert not ids_t[~mask_t.bool()].any()
        inner = ids[1:-1]
        words_seen.add(tuple(inner))
        owners = {next(i for i, text in enumerate(texts) if word in text[1:-1]) for word in inner}
        assert len(owners) <= 2
    assert any({1, 2, 3} & set(words) and {4, 5} & set(words) for words in words_seen)


def test_texts_without_ends_in_common_and_a_single_text():
    short, one = [torch.tensor([1]), torch.tensor([2, 3])], [torch.tensor([1, 2, 3])]
    assert of_texts(short, frame_of(short), 5, seeded())["input_ids"].shape[0] == 5
    alone = of_texts(one, frame_of(one), 4, seeded())["input_ids"]
    assert torch.equal(alone, torch.tensor([[1, 2, 3]] * 4))


def test_as_many_as_asked_for_and_the_same_for_the_same_generator():
    examples = [{"pixel_values": image} for image in images()]
    first, again, other = (list(variants_of(examples, 150, seeded(seed))) for seed in (1, 1, 2))
    assert [len(batch) for batch in first] == [64, 64, 22]
    for one, same in zip(first, again, strict=True):
        assert torch.equal(one.inputs["pixel_values"], same.inputs["pixel_values"])
    assert not torch.equal(first[0].inputs["pixel_values"], other[0].inputs["pixel_values"])
    assert list(variants_of(examples, 0, seeded())) == []


@pytest.mark.parametrize("n", [3, 4, 9, 100])
def test_a_pool_holds_evenly_spaced_examples_whatever_the_batches(n: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(made, "POOL", 8 * 7)
    found = []
    for size in (1, 7):
        pool = Pool()
        for places in torch.arange(n).split(size):
            pool.add(Batch(inputs={"pixel_values": places[:, None]}, labels_b=places))
        found.append([int(example["pixel_values"]) for example in pool.found])
    assert found[0] == found[1]
    assert min(n, 4) <= len(found[0]) < 8
    assert len(set(np.diff(found[0]))) <= 1
    assert found[0][0] == 0
