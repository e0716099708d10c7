"""The audit finds what was planted, and nothing else."""

import io
import json

import numpy as np
from PIL import Image

from lamina.data import audit, from_arrays, render


def png(shade: int, **options: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(file, "PNG", **options)
    return file.getvalue()


def test_a_clean_dataset_has_no_problems() -> None:
    images_n = np.arange(20, dtype=np.uint8)[:, None, None].repeat(3, 1).repeat(3, 2)
    found = audit(from_arrays(images_n, ["cat", "dog"] * 10, name="clean"))
    assert found.problems == []
    assert found.per_split == {"train": 16, "val": 0, "test": 4}
    assert found.per_class["cat"] == {"train": 8, "val": 0, "test": 2}
    assert "clean: 20 images, 2 classes, 1 domain\n" in render(found)
    assert "0 problems\n" in render(found)


def test_everything_planted_is_found() -> None:
    # The same pixels, encoded twice: an exact copy to the eye, not to the file system.
    images = [png(0), png(0, compress_level=0), png(1), png(2), png(2), b"junk", png(3), png(4), png(5)]
    labels = ["cat", "cat", "cat", "cat", "dog", "dog", "dog", "cow", "cat"]
    splits = ["train", "test", "train", "train", "train", "train", "train", "train", "test"]
    domains = ["photo", "sketch", "photo", "photo", "photo", "photo", "photo", "photo", "photo"]
    calls: list[tuple[int, int]] = []
    found = audit(
        from_arrays(images, labels, splits=splits, domains=domains, name="pets"),
        min_per_class=2,
        progress=lambda *call: calls.append(call),
    )
    assert calls[-1] == (9, 9)
    assert len(found.damaged) == 1
    assert found.damaged[0].startswith("pets[5]: cannot identify image file")
    assert (found.repeats.groups, found.repeats.items) == (2, 4)
    assert found.leaks.examples == (("pets[0] [train, cat, photo]", "pets[1] [test, cat, sketch]"),)
    assert found.shared.groups == 1
    assert found.conflicts.examples == (("pets[3] [train, cat, photo]", "pets[4] [train, dog, photo]"),)
    assert found.few == {"cow": 1}
    assert found.untested == ("cow", "dog")
    assert found.problems == [
        "1 image damaged or empty",
        "1 image in more than one split: tests will look too good",
        "1 image in more than one class: one label is wrong",
        "1 image in more than one domain: their tasks overlap",
        "1 class with fewer than 2 training items: cow",
        "2 classes without test items: cow, dog",
    ]
    told = render(found)
    assert "6 problems:\n- 1 image damaged or empty\n" in told
    assert "damaged:\n  pets[5]" in told
    assert "in more than one split (all):\n  pets[0] [train, cat, photo]\n    = pets[1] [test, cat, sketch]\n" in told
    assert "domain    train     test\nphoto         7        1\nsketch        0        1\n" in told
    stored = json.loads(json.dumps(found.as_dict()))
    assert stored["problems"] == found.problems
    assert stored["leaks"]["groups"] == 1


def test_examples_are_a_few() -> None:
    found = audit(from_arrays(np.zeros((40, 2, 2), np.uint8), [0, 1] * 20))
    assert found.conflicts.groups == 1
    assert found.conflicts.items == 40
    assert len(found.conflicts.examples[0]) == 5
    many = np.arange(80, dtype=np.uint8)[:, None, None].repeat(2, 0)
    found = audit(from_arrays(many, [0, 1] * 80))
    assert found.conflicts.groups == 80
    assert len(found.conflicts.examples) == 5
    assert "in more than one class (5 of 80):" in render(found)


def test_texts_are_compared_after_folding() -> None:
    texts = ["Hello  World", "hello world", "other", " ", "more", "else"]
    splits = ["train", "test", "train", "train", "train", "test"]
    found = audit(from_arrays(texts, [0, 0, 0, 1, 1, 1], splits=splits), min_per_class=1)
    assert found.leaks.groups == 1
    assert found.damaged == ("arrays[3]: the text is empty",)
    assert found.problems[0] == "1 text damaged or empty"
