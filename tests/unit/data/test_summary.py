"""What is said of a source, what changed between two and which classes nothing teaches."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lamina.data import (
    as_dict,
    audit,
    describe_source,
    difference,
    from_arrays,
    open_source,
    render,
)

OLD = {"cat": {"train": 8, "val": 0, "test": 2}, "dog": {"train": 8, "val": 0, "test": 2}}


def test_a_source_in_lines() -> None:
    source = from_arrays(
        ["a", "b", "c", "d", "e", "f"],
        ["cat", "dog", "Cat", "cat", "dog", "Cat"],
        splits=["train"] * 3 + ["test"] * 3,
        domains=["x", "y"] * 3,
        name="pets",
    )
    assert describe_source(source) == [
        "pets: 6 texts, 3 classes, 2 domains",
        "layout: items in memory",
        "splits: train 3, test 3",
        "classes: Cat, cat, dog (1 training texts each)",
        "domains: x 3, y 3",
        "note: classes 'Cat' and 'cat' differ only in case, space or leading zeros",
    ]
    found = audit(source, min_per_class=1)
    assert "classes 'Cat' and 'cat' differ only in case, space or leading zeros" in found.problems
    assert render(found).startswith("\n".join(describe_source(source)) + "\n")
    told = json.loads(json.dumps(as_dict(source)))
    assert told["splits"] == {"train": 3, "val": 0, "test": 3}
    assert told["classes"]["dog"] == {"train": 1, "val": 0, "test": 1}
    assert told["domains"]["y"] == {"train": 1, "val": 0, "test": 2}
    assert told["notes"] == ["classes 'Cat' and 'cat' differ only in case, space or leading zeros"]


def test_what_is_left_out_is_in_the_lines_and_in_the_record(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (3, 3)).save(tmp_path / name / "0.png")
    for k in range(5):
        (tmp_path / f"{k}.txt").write_text("")
    source = open_source(tmp_path)
    assert "left out: files without the suffix of an image: 5 (0.txt, 1.txt, 2.txt, ...)" in describe_source(source)
    assert as_dict(source)["left_out"] == [
        {"reason": "files without the suffix of an image", "count": 5, "examples": ["0.txt", "1.txt", "2.txt"]}
    ]


@pytest.mark.parametrize(
    ("new", "told"),
    [
        (OLD, "classes and counts are the same; the contents, the names of files or the splits changed"),
        ({**OLD, "cow": {"train": 1}}, "new: 1 class (cow)"),
        ({"cat": OLD["cat"]}, "missing: 1 class (dog)"),
        ({**OLD, "dog": {"train": 9, "val": 0, "test": 2}}, "changed: dog (train 8, now 9)"),
        (
            {"dog": {"train": 8, "test": 1}, "hen": {}},
            "new: 1 class (hen); missing: 1 class (cat); changed: dog (test 2, now 1)",
        ),
        ({"dog": OLD["dog"], "cat": OLD["cat"]}, "the order of the classes changed"),
    ],
)
def test_what_changed(new: dict[str, dict[str, int]], told: str) -> None:
    assert difference(OLD, new) == told


def test_a_class_whose_images_are_all_damaged_is_named(tmp_path: Path) -> None:
    images = [np.full((4, 4, 3), k, np.uint8) for k in range(4)]
    files = []
    for k, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{k}.png")
        files.append((tmp_path / f"{k}.png").read_bytes())
    source = from_arrays([b"<html>", b"<html>", *files], list("xxyyxy"), splits=["train"] * 4 + ["test"] * 2)
    found = audit(source, min_per_class=1)
    assert found.untaught == ("x",)
    assert "1 class without training items: x" in found.problems


def test_the_fingerprint_of_digits_stays_what_records_say() -> None:
    assert open_source("digits").fingerprint == "24aedc8bff02496cbb9d839cbb79a301"


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "fingerprint"),
    [
        ("cifar100", "880fa8e37f0c3d19b24722640d88011b"),
        ("pacs", "42ba261c27248c37964957d9b28044fb"),
        ("clinc150", "1b5961186afccb4288da8a91a6d6a046"),
    ],
)
def test_the_fingerprints_of_shared_data_stay_what_records_say(name: str, fingerprint: str) -> None:
    shared = Path(__file__).resolve().parents[3].parent / "shared" / "data" / name
    if not shared.is_dir():
        pytest.skip("the shared datasets are not beside this checkout")
    assert open_source(shared).fingerprint == fingerprint


def test_the_fingerprint_of_folders_stays_what_records_say(tmp_path: Path) -> None:
    for place in ("train/b", "train/a/deeper", "test/a", "test/b", "val/b"):
        (tmp_path / place).mkdir(parents=True)
        for k in range(3):
            (tmp_path / place / f"{k}.png").write_bytes(b"x" * k)
    assert open_source(tmp_path).fingerprint == "642b0d0be459b999ec340884c93236c5"
