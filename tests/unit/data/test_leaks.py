"""Test items among the training items: exact copies, near ones, and what only looks alike."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lamina.data import from_arrays, leaks, open_source
from lamina.data.leaks import NEAR_BITS, near_hashes


def picture(seed: int, size: int = 48) -> Image.Image:
    """A smooth random image, as photographs are."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def saved(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def test_copies_of_images_are_found(tmp_path: Path):
    for k in range(12):
        saved(picture(k), tmp_path / "train" / f"c{k % 2}" / f"{k}.png")
        saved(picture(100 + k), tmp_path / "test" / f"c{k % 2}" / f"{k}.png")
    clean = leaks.leaks(open_source(str(tmp_path)))
    assert (clean.tests, clean.exact, clean.near, clean.examples) == (12, 0, 0, ())
    saved(picture(3), tmp_path / "test" / "c0" / "copy.png")
    squeezed = io.BytesIO()
    picture(4).save(squeezed, "JPEG", quality=60)
    saved(Image.open(squeezed), tmp_path / "test" / "c1" / "squeezed.jpg")
    saved(picture(5).resize((32, 32)), tmp_path / "test" / "c1" / "smaller.png")
    found = leaks.leaks(open_source(str(tmp_path)))
    assert (found.tests, found.exact, found.near) == (15, 1, 2)
    pairs = {(Path(ours).name, Path(theirs).name) for ours, theirs in found.examples}
    assert pairs == {("copy.png", "3.png"), ("squeezed.jpg", "4.png"), ("smaller.png", "5.png")}


def test_drawings_on_white_paper_are_not_copies(tmp_path: Path):
    """By pHash alone they are near."""
    for k in range(6):
        paper = np.full((64, 64, 3), 255, np.uint8)
        row = 8 + 8 * k
        paper[row : row + 3, 10:50] = 0
        saved(Image.fromarray(paper), tmp_path / ("train" if k < 3 else "test") / "a" / f"{k}.png")
        saved(picture(k), tmp_path / "train" / "b" / f"{k}.png")
        saved(picture(k + 50), tmp_path / "test" / "b" / f"{k}.png")
    assert leaks.leaks(open_source(str(tmp_path))).near == 0


def test_tiny_images_are_not_judged():
    found = leaks.leaks(open_source("digits"))
    assert (found.near, found.searched) == (None, True)


def test_copies_of_texts_are_found():
    words = [f"word{k}" for k in range(400)]
    draw = np.random.default_rng(0)
    lines = [" ".join(draw.choice(words, 30)) for _ in range(20)]
    train, test = lines[:10], lines[10:]
    near = train[2].split()
    near[29] = "other"
    far = train[3].split()
    far[::4] = ["other"] * len(far[::4])
    test += [f"  {train[0].upper()} ", train[1], " ".join(near), " ".join(far)]
    source = from_arrays(train + test, [0, 1] * 5 + [0, 1] * 7, splits=["train"] * 10 + ["test"] * 14)
    found = leaks.leaks(source)
    assert (found.tests, found.exact, found.near, found.domains) == (14, 2, 1, {})
    domains = ["spoken"] * 20 + ["spoken", "written", "written", "written"]
    source = from_arrays(train + test, [0, 1] * 5 + [0, 1] * 7, splits=["train"] * 10 + ["test"] * 14, domains=domains)
    assert leaks.leaks(source).domains == {"spoken": 1, "written": 2}


def test_without_the_libraries_only_exact_copies_are_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(leaks, "has_near", lambda source: False)
    source = from_arrays(["a b", "c d", "A  b"], [0, 1, 0], splits=["train", "train", "test"])
    found = leaks.leaks(source)
    assert (found.exact, found.near) == (1, None)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(0, 2**32), st.integers(2, 30))
def test_near_hashes_are_all_found(seed: int, count: int):
    draw = np.random.default_rng(seed)
    hashes_n = draw.integers(0, 2**63, count, np.uint64)
    for k in range(1, count, 2):  # a copy of the one before, with up to six bits flipped
        for bit in draw.integers(0, 64, draw.integers(0, 7)):
            hashes_n[k] = (
                hashes_n[k - 1] ^ np.uint64(1 << int(bit)) if bit == 0 else hashes_n[k] ^ np.uint64(1 << int(bit))
            )
        if draw.random() < 0.7:
            hashes_n[k] = hashes_n[k - 1]
            for bit in set(draw.integers(0, 64, draw.integers(0, 7)).tolist()):
                hashes_n[k] ^= np.uint64(1 << bit)
    train, test = range(0, count, 2), range(1, count, 2)
    expected = {(t, s) for t in test for s in train if int(hashes_n[t] ^ hashes_n[s]).bit_count() <= NEAR_BITS}
    assert set(near_hashes(hashes_n, train, test)) == expected


def test_leaks_are_looked_for_within_the_domains_of_a_stream():
    texts = ["one two three four", "five six seven eight", "one two three four", "five six seven eight"]
    source = from_arrays(texts, [0, 1, 0, 1], splits=["train"] * 2 + ["test"] * 2, domains=["a", "b", "a", "a"])
    assert (leaks.leaks(source).tests, leaks.leaks(source).exact) == (2, 2)
    assert (leaks.leaks(source, ["a"]).tests, leaks.leaks(source, ["a"]).exact) == (2, 1)
