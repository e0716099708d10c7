"""Names of classes, domains and splits: how they are spelt, which split a name means, and which names look alike."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache

from lamina.errors import DataError
from lamina.types import SPLITS

SPLIT_NAMES = {
    "train": 0,
    "training": 0,
    "val": 1,
    "valid": 1,
    "validation": 1,
    "dev": 1,
    "test": 2,
    "testing": 2,
}
"""How people name the three splits, in lower case, and the position in SPLITS each means."""
_FILLERS = ("sets", "set", "dataset", "data", "images", "image", "imgs", "img", "samples", "folder", "dir", "split")
"""Words that may stand beside the name of a split without changing its meaning: training_set, val-images, TestData."""
_LIKE_SPLITS = {
    "training": 0,
    "train": 0,
    "trn": 0,
    "tr": 0,
    "testing": 2,
    "test": 2,
    "tst": 2,
    "validation": 2,
    "valid": 2,
    "val": 2,
    "evaluation": 2,
    "eval": 2,
    "dev": 2,
}
"""What stands before or after another word, or alone, in names that are splits in all likelihood: mytrain, mytest, trn."""
_ENDINGS = frozenset({"ed", "ee", "ees", "er", "ers"})
"""A trainer and a tester are people."""
_NUMBER = re.compile(r"[\s_\-.]*\d+(?:[\s_\-.]*of[\s_\-.]*\d+)?$")
_BETWEEN = " _-."
_YEAR = re.compile(r"(?:19|20)\d\d")
_SHOWN = 60


def clean(name: str, what: str) -> str:
    """The name in Unicode NFC, in which names are compared. what: its role and place, for messages.

    Raises DataError for a name that is empty, is not valid Unicode, or holds control characters.
    """
    if not name.strip():
        raise DataError(f"{what} is empty. Give it a name that can be seen")
    # Most names are ASCII, and a table may hold millions of them.
    if name.isascii() and name.isprintable():
        return name
    wrong = next((sign for sign in name if unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp")), None)
    if wrong is not None:
        why = "is not valid Unicode" if unicodedata.category(wrong) == "Cs" else "holds a control character"
        raise DataError(f"{what} is {name[:_SHOWN]!a}, which {why} ({wrong!a}). Rename it")
    return unicodedata.normalize("NFC", name)


def shown(text: str, most: int = _SHOWN) -> str:
    """The text on one line, with what a terminal cannot show escaped, cut at that many characters."""
    short = text if len(text) <= most else text[: most - 3] + "..."
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in short)


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first few names, separated by commas; those with a space at an end in quotation marks."""
    few = list(names)
    told = (shown(name) if name == name.strip() else repr(shown(name)) for name in few[:most])
    return ", ".join(told) + (", ..." if len(few) > most else "")


def alike(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Groups of names that differ only in case, white space, invisible characters or leading zeros, in their order."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        seen = (sign for sign in unicodedata.normalize("NFKC", name) if unicodedata.category(sign) != "Cf")
        key = " ".join("".join(seen).casefold().split())
        groups[key.lstrip("0") or "0" if key.isdecimal() else key].append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


@lru_cache(maxsize=1024)
def split_of(name: str) -> int | None:
    """The split a name means, as a position in SPLITS, or None.

    A name means a split if it is a split's name (`train`), alone or beside words such as `set` and `images`.
    Raises DataError for a name that means two splits.
    """
    splits, rest = split_words(name)
    if rest or not splits:
        return None
    if len(splits) > 1:
        told = " and ".join(SPLITS[split] for split in sorted(splits))
        raise DataError(f"the name {shown(name)!r} means both {told}. Rename it, so that it means one split")
    return min(splits)


def split_words(name: str) -> tuple[frozenset[int], tuple[str, ...]]:
    """The splits that words of a name mean, and its other words; fillers and years are neither."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=\D)(?=\d)|(?<=\d)(?=\D)", " ", name)
    splits: set[int] = set()
    rest: list[str] = []
    for word in re.split(r"[\s_\-.]+", apart.strip().lower()):
        stem = next((word.removesuffix(f) for f in _FILLERS if word.removesuffix(f) in SPLIT_NAMES), word)
        if stem in SPLIT_NAMES:
            splits.add(SPLIT_NAMES[stem])
        elif word and word not in _FILLERS and not _YEAR.fullmatch(word):
            rest.append(word)
    return frozenset(splits), tuple(rest)


def splits_in_file_names(stems: Sequence[str]) -> list[int | None]:
    """The split that each name begins with (`train-00-of-05`), or else has as a word beside other names' splits.

    stems: names of files without their suffix.
    """
    first = [split_of(re.split(r"[-_.]", stem, maxsplit=1)[0]) for stem in stems]
    if any(split is not None for split in first):
        return first
    words = [split_words(stem)[0] for stem in stems]
    told: list[int | None] = [min(splits) if len(splits) == 1 else None for splits in words]
    # A lone file may be about anything, such as crash tests.
    return told if 0 in told and len(set(told)) > 1 else [None] * len(stems)


def refuse_likely_splits(names: Sequence[str], where: str, read_as_splits: Collection[str] = ()) -> None:
    """Raises DataError for names that differ only in what looks like train and test, but are not all read as splits.

    where: what holds them, for the message.
    """
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for name in names:
        for stem, split in _stems(name):
            found[stem][name] = split
    for split_by_name in found.values():
        if len(set(split_by_name.values())) > 1 and not split_by_name.keys() <= set(read_as_splits):
            raise DataError(
                f"{where} holds {listed(split_by_name)}, which may be splits: it cannot be told, and tests must not be trained"
                " on. Rename them train and test; if they are no splits, give them names that differ in another word"
            )


def _stems(name: str) -> Iterator[tuple[str, int]]:
    """What is left of a name without something like a split at its start or end, and that split."""
    bare = _NUMBER.sub("", name.strip().lower())
    for word, split in _LIKE_SPLITS.items():
        for rest in {bare.removeprefix(word), bare.removesuffix(word)} - {bare}:
            stem = rest.strip(_BETWEEN)
            glued = rest == stem != ""
            # Many words begin with tr.
            if not glued or (stem not in _ENDINGS and word != "tr"):
                yield stem, split
