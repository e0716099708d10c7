"""What every source of data comes to: undecoded items, and for each a class, a split and a domain.

Shape letters: n items.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lamina import rng
from lamina.data.names import SPLIT_NAMES, clean, listed, shown, split_of
from lamina.errors import ConfigError, DataError
from lamina.types import SPLITS, Ints, Kind


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    """system, user or assistant."""
    content: str


@dataclass(frozen=True)
class Row:
    """One instruction as the data holds it."""

    prompt: str | tuple[Message, ...]
    """A text, or the messages before the completion."""
    completion: str
    options: tuple[str, ...] = ()
    """The candidate completions. Empty: any text is allowed."""


Payload: TypeAlias = bytes | NDArray[np.uint8] | str | Row


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which column of a table holds what."""

    image: str = "image"
    """Encoded images: binary, or the {bytes, path} pairs of Hugging Face datasets."""
    text: str = "text"
    label: str = "label"
    """Class ids (0, 1, ...) or class names."""
    domain: str = "domain"
    """The domain of each row. May be missing: then all rows are of one domain."""
    split: str = "split"
    """train, val or test. May be missing: then file names tell, or else a seeded share of each class is the test."""
    prompt: str = "prompt"
    completion: str = "completion"
    options: str = "options"
    """Lists of candidate completions. May be missing, or null in a row."""
    messages: str = "messages"
    """Lists of {role, content}, in place of prompt and completion. The last message is the completion."""
    answer: str = "answer"
    """What a language model is to say of a labelled text. May be missing: then it says the name of the class."""


class Items(Protocol):
    """The payloads of a source, by row."""

    def read(self, i: int) -> Payload:
        """The raw payload of row i. Raises OSError if its file cannot be read."""
        ...

    def where(self, i: int) -> str:
        """What a user would call row i: a path, or a file and a row."""
        ...


@dataclass(frozen=True)
class LeftOut:
    """Files or folders that are no data, for one reason."""

    reason: str
    """What they are, in the plural."""
    count: int
    examples: tuple[str, ...]
    """The first few."""

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.examples) else ""
        return f"{self.reason}: {self.count} ({listed(self.examples)}{more})"


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """Labelled items, not yet decoded.

    labels_n: class ids; splits_n: 0 train, 1 val, 2 test; domains_n: domain ids. `fingerprint` is a hash of the kind,
    names, labels, splits, domains and contents (for folders: relative paths and sizes), and of no machine's paths.
    """

    kind: Kind
    name: str
    items: Items
    labels_n: Ints
    splits_n: Ints
    domains_n: Ints
    class_names: tuple[str, ...]
    domain_names: tuple[str, ...]
    fingerprint: str
    stamp: str = ""
    """For folders, a hash of the times of change: a decoded copy is current only while it stays the same."""
    layout: str = ""
    """How the folder or table was understood: one sentence."""
    left_out: tuple[LeftOut, ...] = ()
    """What was found there and is no data."""
    held_out: bool = False
    """Whether it has no test split of its own, so that a share of each class was held out."""
    answers: Callable[[], Sequence[Any]] | None = None
    """Returns the column of answers (n,), unchecked; None where the table has none."""

    def __len__(self) -> int:
        return len(self.labels_n)

    def read(self, i: int) -> Payload:
        """The raw payload of row i: encoded bytes, pixels (h, w) or (h, w, 3) uint8, text, or an instruction."""
        return self.items.read(i)

    def where(self, i: int) -> str:
        """What a user would call row i, for messages: on one line, with what a terminal cannot show escaped."""
        return escaped(self.items.where(i))


class NothingToTrainOn(DataError):
    """A source has no training items. It can still be measured on."""

    def __init__(self, source: Source) -> None:
        present = ", ".join(SPLITS[k] for k in np.unique(source.splits_n))
        super().__init__(f"{source.name} holds no training items, only {present}. Add items whose split is train")
        self.source = source


def escaped(text: str) -> str:
    """The whole text on one line, with what a terminal cannot show escaped."""
    return shown(text, len(text))


def label_ids(
    values: Sequence[Any], names: tuple[str, ...] | None, where: Callable[[int], str]
) -> tuple[Ints, tuple[str, ...]]:
    """Class ids (n,) and class names, from a column of ids, of names, or of True and False.

    Known `names` fix the ids. Otherwise the distinct values, in ascending order, are the classes. Names are compared in
    Unicode NFC.

    Raises DataError naming the first row whose label is missing, empty, unknown, out of range or of another type.
    """
    if names is not None:
        odd = next((k for k, name in enumerate(names) if not isinstance(name, str)), None)
        if odd is not None:
            raise DataError(
                f"the name of class {odd} is {shown(repr(names[odd]))} ({type(names[odd]).__name__}); allowed is text (str)."
                " Convert the list of class names to text"
            )
        names = tuple(clean(name, f"the name of class {k}") for k, name in enumerate(names))
        if doubled := [name for name, times in Counter(names).items() if times > 1]:
            raise DataError(f"class name {doubled[0]!r} is listed more than once: give every class a name of its own")
    first = next((value for value in values if value is not None), None)
    # A sequence of True and False holds the classes of these names.
    wanted: type = str if isinstance(first, str) else bool if isinstance(first, bool | np.bool_) else Integral
    # Of types, not of rows: there may be millions, and a test for an abstract class takes its time.
    fits = {
        type_: issubclass(type_, bool | np.bool_) if wanted is bool else _fits(type_, wanted)
        for type_ in set(map(type, values))
    }
    if not all(fits.values()):
        row, value = next((row, value) for row, value in enumerate(values) if not fits[type(value)])
        if value is None:
            raise DataError(f"{where(row)} has no label. Remove the row, or label it")
        raise DataError(
            f"{where(row)} has the label {shown(repr(value))} ({type(value).__name__}); allowed are class ids (0, 1, ...)"
            " or class names, one or the other throughout"
        )
    if wanted is str or (wanted is bool and names is None):
        return _ids_of_names([str(value) for value in values], names, where)
    return _ids_of_numbers([int(value) for value in values], names, where)


def _fits(type_: type, wanted: type) -> bool:
    return issubclass(type_, wanted) and not issubclass(type_, bool | np.bool_)


def _ids_of_names(
    values: list[str], names: tuple[str, ...] | None, where: Callable[[int], str]
) -> tuple[Ints, tuple[str, ...]]:
    spelt: dict[str, str] = {}
    for row, value in enumerate(values):
        if value not in spelt:
            if not value.strip():
                raise DataError(f"{where(row)} has no label: it is empty. Remove the row, or label it")
            spelt[value] = clean(value, f"the label of {where(row)}")
    known = names if names is not None else tuple(sorted(set(spelt.values())))
    place = {name: k for k, name in enumerate(known)}
    if unknown := {value for value, name in spelt.items() if name not in place}:
        row, value = next((row, value) for row, value in enumerate(values) if value in unknown)
        raise DataError(
            f"{where(row)} has the label {shown(value)!r}, which is none of the {len(known)} class names"
            f" ({_some(known)}). Correct the label or the list of names"
        )
    return np.array([place[spelt[value]] for value in values], np.int64), known


def _ids_of_numbers(
    values: list[int], names: tuple[str, ...] | None, where: Callable[[int], str]
) -> tuple[Ints, tuple[str, ...]]:
    limit = len(names) if names is not None else 2**63
    wrong = next((row for row, value in enumerate(values) if not 0 <= value < limit), None)
    if wrong is not None:
        allowed = f"0 to {limit - 1}, one for each class name" if names is not None else "0 or more, in 64 bits"
        raise DataError(
            f"{where(wrong)} has the label {values[wrong]}; allowed is {allowed}."
            " Correct the label, or leave unlabelled rows out"
        )
    labels_n = np.array(values, np.int64)
    if names is not None:
        return labels_n, names
    distinct, ids_n = np.unique(labels_n, return_inverse=True)
    return ids_n.astype(np.int64), tuple(map(str, distinct))


def split_ids(values: Sequence[Any], where: Callable[[int], str]) -> Ints:
    """Positions in SPLITS (n,), from names or positions. Raises DataError naming the first row with neither."""
    found = [split_of(value) if isinstance(value, str) else value for value in values]
    missing = [value is None or (isinstance(value, str) and not value.strip()) for value in values]
    if any(missing) and not all(missing):
        without, given = missing.index(True), missing.index(False)
        raise DataError(
            f"{where(given)} has the split {shown(repr(values[given]))}, and {where(without)} has none. Give every row a split,"
            " or leave the column out"
        )
    for row, split in enumerate(found):
        whole = type(split) is int or (isinstance(split, Integral) and not isinstance(split, bool))
        if not whole or split not in range(len(SPLITS)):
            raise DataError(
                f"{where(row)} has the split {shown(repr(values[row]))}; allowed are {', '.join(SPLIT_NAMES)}."
                " Rename it, or leave the row out"
            )
    return np.array(found, np.int64)


def domain_ids(
    values: Sequence[Any], names: tuple[str, ...] | None, where: Callable[[int], str]
) -> tuple[Ints, tuple[str, ...]]:
    """Domain ids (n,) and names, in the order of `names` if there are any, else of first appearance.

    Raises DataError naming the first row without a domain, with one that is neither text nor a whole number, or with
    one that `names` lacks.
    """
    spelt: dict[Any, str] = {}
    allowed = {type_: issubclass(type_, str | bool | np.bool_ | Integral) for type_ in set(map(type, values))}
    for row, value in enumerate(values):
        if value is None or (isinstance(value, str) and not value.strip()):
            raise DataError(f"{where(row)} has no domain. Name one, or remove the column of domains")
        if not allowed[type(value)]:
            raise DataError(
                f"{where(row)} has the domain {shown(repr(value))} ({type(value).__name__}); allowed are names and whole"
                " numbers. Convert the column of domains to text"
            )
        if value not in spelt:
            spelt[value] = clean(str(value), f"the domain of {where(row)}")
    found = tuple(dict.fromkeys(spelt.values()))
    if names is not None:
        names = tuple(clean(name, "a name of a domain") for name in names)
        if doubled := [name for name, times in Counter(names).items() if times > 1]:
            raise DataError(f"domain {shown(doubled[0])!r} is listed more than once: list every domain once")
        if lacking := set(found) - set(names):
            row, name = next((row, spelt[value]) for row, value in enumerate(values) if spelt[value] in lacking)
            raise DataError(
                f"{where(row)} has the domain {shown(name)!r}, which the list of domains in README.json lacks"
                f" ({_some(names)}). Add it there, in the order in which the domains are to come, or remove the list"
            )
        found = tuple(name for name in names if name in set(found))
    place = {name: k for k, name in enumerate(found)}
    return np.array([place[spelt[value]] for value in values], np.int64), found


def hold_out(labels_n: Ints, domains_n: Ints, splits_n: Ints, fraction: float) -> Ints:
    """Splits (n,) in which a seeded share of the training rows of every class and domain has become the test.

    At least one row of each class and domain goes to either side, where there are two. No generator is involved.
    """
    splits_n = splits_n.copy()
    rows = np.flatnonzero(splits_n == 0)
    rows = rows[np.lexsort((rows, labels_n[rows], domains_n[rows]))]
    edges = np.flatnonzero(np.diff(labels_n[rows]) | np.diff(domains_n[rows])) + 1
    for rows_m in np.split(rows, edges):
        if len(rows_m) < 2:
            continue
        held = min(max(round(len(rows_m) * fraction), 1), len(rows_m) - 1)
        domain, label = int(domains_n[rows_m[0]]), int(labels_n[rows_m[0]])
        order_m = rng.permutation(len(rows_m), rng.seed_of("lamina.data.hold_out"), domain, label)
        splits_n[rows_m[order_m[:held]]] = 2
    return splits_n


def build(
    *,
    kind: Kind,
    name: str,
    items: Items,
    labels_n: Ints,
    class_names: tuple[str, ...],
    splits_n: Ints | None,
    contents: Iterable[bytes | memoryview],
    domains_n: Ints | None = None,
    domain_names: tuple[str, ...] = ("all",),
    test_fraction: float = 0.2,
    stamp: str = "",
    layout: str,
    left_out: tuple[LeftOut, ...] = (),
    answers: Callable[[], Sequence[Any]] | None = None,
) -> Source:
    """The source of these rows. Where no row is marked as test, `test_fraction` of the training rows becomes the test.

    contents: one buffer per row, hashed into the fingerprint. layout: how the source was understood.

    Raises DataError if there are no rows, or none to train on; ConfigError if the fraction is not in (0, 1).
    """
    if not 0 < test_fraction < 1:
        raise ConfigError(f"data.test_fraction is {test_fraction}; allowed is more than 0 and less than 1, such as 0.2")
    n = len(labels_n)
    if n == 0:
        raise DataError(f"{name} holds no items. Point at a source with at least one labelled item in each class")
    domains_n = np.zeros(n, np.int64) if domains_n is None else domains_n
    splits_n = np.zeros(n, np.int64) if splits_n is None else splits_n
    trainable = bool((splits_n == 0).any())
    held_out = trainable and not (splits_n == 2).any()
    if held_out:
        splits_n = hold_out(labels_n, domains_n, splits_n, test_fraction)
        layout += f"; no test split, so a fixed {test_fraction:.0%} of each class is held out for testing"
    digest = hashlib.blake2b(digest_size=16)
    for part in (kind, *class_names, "", *domain_names, ""):
        _feed(digest, part.encode())
    for ids_n in (labels_n, splits_n, domains_n):
        _feed(digest, ids_n.astype("<i8").tobytes())
    for content in contents:
        _feed(digest, content)
    source = Source(
        kind=kind,
        name=name,
        items=items,
        labels_n=labels_n,
        splits_n=splits_n,
        domains_n=domains_n,
        class_names=class_names,
        domain_names=domain_names,
        fingerprint=digest.hexdigest(),
        stamp=stamp,
        layout=layout,
        left_out=left_out,
        held_out=held_out,
        answers=answers,
    )
    if not trainable:
        raise NothingToTrainOn(source)
    return source


def _feed(digest: "hashlib.blake2b", content: bytes | memoryview) -> None:
    # The length goes first, so that moving a byte from one item to the next changes the hash.
    digest.update(len(content).to_bytes(8, "little"))
    digest.update(content)


def _some(names: Sequence[str], most: int = 5) -> str:
    told = ", ".join(repr(shown(name)) for name in names[:most])
    return told if len(names) <= most else f"{told}, ..."
