"""Test items that are also among the training items: exact copies, and near ones.

Near copies of images have perceptual hashes of 64 bits (from `imagehash`) that nearly agree: pHash in all but NEAR_BITS bits,
and the wavelet hash in all but WAVELET_BITS. By pHash alone, drawings on white paper look alike. Near copies of texts share at
least NEAR_WORDS of their runs of three words (Jaccard similarity, estimated with the MinHash of `datasketch`). Both libraries
are an extra; without them only exact copies are found.
"""

import importlib.util
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lamina.data.audit import content_of
from lamina.data.decoding import decode
from lamina.data.pixels import Damage, Progress, each
from lamina.data.records import Payload, Row, Source
from lamina.types import SPLITS

NEAR_BITS, WAVELET_BITS, NEAR_WORDS = 3, 8, 0.8
PERMUTATIONS = 64
SMALLEST = 16
"""Least height and width of an image, in pixels, for which near copies are looked for."""
_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class Leaks:
    """tests: the number of test items. exact, near: how many of them are among the training items; near is None where it was
    not looked for, because `searched` is false or all images are too small. examples: places of a test item and of the
    training item that is like it. domains: how many were found in each domain, where the source has several."""

    tests: int
    exact: int
    near: int | None
    examples: tuple[tuple[str, str], ...] = ()
    domains: Mapping[str, int] = field(default_factory=dict)
    searched: bool = False
    """Whether the library that finds near copies was there."""


def leaks(source: Source, domains: Collection[str] | None = None, progress: Progress | None = None) -> Leaks:
    """Returns the test items of a source that are among its training items, within these domains (all if None). Damaged items
    are passed over."""
    used_n = np.array([domains is None or name in domains for name in source.domain_names])[source.domains_n]
    train_n, test_n = (used_n & (source.splits_n == SPLITS.index(split)) for split in ("train", "test"))
    contents = list(each(source, content_of, progress))
    first: dict[bytes, int] = {}
    for row in np.flatnonzero(train_n).tolist():
        content = contents[row]
        if not isinstance(content, Damage):
            first.setdefault(content, row)
    tests = np.flatnonzero(test_n).tolist()
    exact = {row: first[c] for row in tests if not isinstance(c := contents[row], Damage) and c in first}
    near, searched = None, has_near(source)
    if searched:
        rows = [row for row in range(len(source)) if not isinstance(contents[row], Damage) and row not in exact]
        search = _near_images if source.kind == "image" else _near_texts
        near = search(source, [row for row in rows if train_n[row]], [row for row in rows if test_n[row]], progress)
    found = exact | (near or {})
    where, names = source.items.where, source.domain_names
    domains = Counter(names[source.domains_n[row]] for row in found) if len(names) > 1 else {}
    return Leaks(
        tests=len(tests),
        exact=len(exact),
        near=None if near is None else len(near),
        examples=tuple((where(row), where(like)) for row, like in list(found.items())[:_EXAMPLES]),
        domains=dict(domains),
        searched=searched,
    )


def has_near(source: Source) -> bool:
    """Returns whether the library that finds near copies of this kind is installed."""
    return importlib.util.find_spec("imagehash" if source.kind == "image" else "datasketch") is not None


def _near_images(source: Source, train: list[int], test: list[int], progress: Progress | None) -> dict[int, int] | None:
    """Returns None where all test images are too small."""
    import imagehash

    found = list(each(source, perceptual_hash, progress))
    all_tests = test
    train, test = ([row for row in rows if not isinstance(found[row], Damage)] for rows in (train, test))
    if all_tests and not test:
        return None
    hashes_n = np.array([0 if isinstance(one, Damage) else one for one in found], np.uint64)
    alike: dict[int, int] = {}
    for row, other in near_hashes(hashes_n, train, test):
        if row not in alike:
            ours, theirs = (imagehash.whash(Image.fromarray(decode(source.read(r)))) for r in (row, other))
            if ours - theirs <= WAVELET_BITS:
                alike[row] = other
    return alike


def perceptual_hash(payload: Payload) -> int:
    """Returns the pHash of an image. Raises ValueError for one that is too small to tell a copy from a likeness."""
    import imagehash

    assert not isinstance(payload, str | Row)
    pixels = decode(payload)
    if min(pixels.shape[:2]) < SMALLEST:
        raise ValueError("the image is too small")
    bits = imagehash.phash(Image.fromarray(pixels)).hash.ravel()
    return int(np.packbits(bits).view(">u8")[0])


def near_hashes(hashes_n: NDArray[np.uint64], train: Iterable[int], test: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yields every test row with each training row whose hash differs in at most NEAR_BITS bits. Of NEAR_BITS + 1 parts of such
    a pair, one is equal, so only rows that share a part are compared."""
    parts = NEAR_BITS + 1
    width = np.uint64(64 // parts)
    keys_np = np.stack(
        [(hashes_n >> (width * np.uint64(p))) & np.uint64(2 ** (64 // parts) - 1) for p in range(parts)], 1
    )
    rows_of: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(parts)]
    for row in train:
        for p in range(parts):
            rows_of[p][int(keys_np[row, p])].append(row)
    for row in test:
        alike = sorted({other for p in range(parts) for other in rows_of[p].get(int(keys_np[row, p]), ())})
        if alike:
            apart_m = np.bitwise_count(hashes_n[alike] ^ hashes_n[row])
            yield from ((row, alike[close]) for close in np.flatnonzero(apart_m <= NEAR_BITS).tolist())


def _near_texts(source: Source, train: list[int], test: list[int], progress: Progress | None) -> dict[int, int]:
    from datasketch import MinHashLSH

    sketches = list(each(source, _sketch, progress))
    index = MinHashLSH(threshold=NEAR_WORDS, num_perm=PERMUTATIONS)
    for row in train:
        if not isinstance(sketches[row], Damage):
            index.insert(row, sketches[row], check_duplication=False)
    found = {}
    for row in test:
        sketch = sketches[row]
        if not isinstance(sketch, Damage):
            like = next((o for o in sorted(index.query(sketch)) if sketch.jaccard(sketches[o]) >= NEAR_WORDS), None)
            if like is not None:
                found[row] = like
    return found


def _sketch(payload: Payload) -> Any:
    from datasketch import MinHash

    if isinstance(payload, Row):
        turns = [payload.prompt] if isinstance(payload.prompt, str) else [m.content for m in payload.prompt]
        payload = "\n".join(turns)
    assert isinstance(payload, str)
    words = payload.casefold().split()
    runs = {" ".join(words[k : k + 3]) for k in range(max(1, len(words) - 2))}
    sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
    sketch.update_batch([run.encode("utf-8", "surrogatepass") for run in sorted(runs)])
    return sketch
