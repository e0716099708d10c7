"""What is wrong with a dataset, found before hours are spent on it: damage, leaks, conflicting labels, thin classes."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lamina.data.decoding import decode, has_more_frames, nearly_black
from lamina.data.names import listed
from lamina.data.pixels import Damage, Progress, each
from lamina.data.records import Payload, Row, Source, escaped
from lamina.data.summary import count, counts, describe_source, notes
from lamina.types import SPLITS, Ints, Kind

_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """Groups of items with the same content: how many groups, how many items in them, and the first few of them."""

    groups: int
    items: int
    examples: tuple[tuple[str, ...], ...]
    """Each item as its place, split, class and (if there are several) domain."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What `audit` found. Items are called what `Source.where` calls them, with nothing escaped."""

    name: str
    kind: Kind
    items: int
    description: tuple[str, ...]
    """How the source was understood and what was left out of it: the lines of `describe_source`."""
    class_names: tuple[str, ...]
    domain_names: tuple[str, ...]
    per_split: dict[str, int]
    per_domain: dict[str, dict[str, int]]
    """Domain, then split, to items."""
    per_class: dict[str, dict[str, int]]
    """Class, then split, to items."""
    damaged: tuple[str, ...]
    """Images that cannot be decoded and why, or texts that are empty."""
    repeats: Repeats
    """Same content more than once, wherever."""
    leaks: Repeats
    """Same content in more than one split."""
    conflicts: Repeats
    """Same content with more than one class: a wrong label, or one item in two tasks of a class-incremental stream."""
    shared: Repeats
    """Same content in more than one domain."""
    few: dict[str, int]
    """Classes with fewer than the wanted number of training items, and how many they have."""
    untested: tuple[str, ...]
    """Classes with no test items."""
    untaught: tuple[str, ...]
    """Classes with no training items."""
    alike: tuple[str, ...]
    """A sentence for each group of names of classes or domains that look alike."""
    black: tuple[str, ...]
    """Images of more than 8 bits that have decoded to nearly black."""
    more_frames: tuple[str, ...]
    """Images with several frames or pages. Only the first is read. That is no problem by itself."""
    min_per_class: int

    @property
    def problems(self) -> list[str]:
        """One sentence for each kind of problem, most serious first; empty if there is none."""
        what = "prompt" if self.kind == "instructions" else self.kind
        few = [name for name in self.few if name not in self.untaught]
        found = [
            (len(self.damaged), f"{count(len(self.damaged), what)} damaged or empty"),
            (self.leaks.groups, f"{count(self.leaks.groups, what)} in more than one split: tests will look too good"),
            (
                self.conflicts.groups,
                f"{count(self.conflicts.groups, what)} in more than one class: one label is wrong",
            ),
            (self.shared.groups, f"{count(self.shared.groups, what)} in more than one domain: their tasks overlap"),
            (
                len(self.untaught),
                f"{count(len(self.untaught), 'class')} without training items: {listed(self.untaught)}",
            ),
            (
                len(few),
                f"{count(len(few), 'class')} with fewer than {self.min_per_class} training items: {listed(few)}",
            ),
            (len(self.untested), f"{count(len(self.untested), 'class')} without test items: {listed(self.untested)}"),
            *((1, sentence) for sentence in self.alike),
            (
                len(self.black),
                f"{count(len(self.black), what)} nearly black: numbers of 12 bits or fewer in 16? Scale them, or write the"
                f" TIFF tag SMaxSampleValue: {listed(self.black, 3)}",
            ),
        ]
        return [sentence for number, sentence in found if number]

    def as_dict(self) -> dict[str, Any]:
        """Everything, as what JSON can hold."""
        return {**asdict(self), "problems": self.problems}


def audit(source: Source, *, min_per_class: int = 5, progress: Progress | None = None) -> Audit:
    """Reads and decodes every item of a source. Damage is reported, never raised.

    Images are the same if their decoded pixels are; texts and the prompts of instructions, if they are after folding case and
    white space.
    """
    found = list(each(source, _content, progress))
    contents: list[bytes | Damage] = [item if isinstance(item, Damage) else item[0] for item in found]
    where = source.items.where
    black = tuple(where(row) for row, item in enumerate(found) if not isinstance(item, Damage) and item[1])
    more_frames = tuple(where(row) for row, item in enumerate(found) if not isinstance(item, Damage) and item[2])
    damaged = tuple(
        f"{where(row)}: {content.reason}" for row, content in enumerate(contents) if isinstance(content, Damage)
    )
    rows_by_content: dict[bytes, list[int]] = defaultdict(list)
    for row, content in enumerate(contents):
        if not isinstance(content, Damage):
            rows_by_content[content].append(row)
    groups = [np.array(rows) for rows in rows_by_content.values() if len(rows) > 1]
    labels_n, splits_n, domains_n = source.labels_n, source.splits_n, source.domains_n
    per_class = counts(source.class_names, labels_n, splits_n)
    # A damaged item teaches and tests nothing.
    whole_n = np.array([not isinstance(content, Damage) for content in contents])
    usable = counts(source.class_names, labels_n[whole_n], splits_n[whole_n])
    return Audit(
        name=source.name,
        kind=source.kind,
        items=len(source),
        description=tuple(describe_source(source)),
        class_names=source.class_names,
        domain_names=source.domain_names,
        per_split={name: int((splits_n == k).sum()) for k, name in enumerate(SPLITS)},
        per_domain=counts(source.domain_names, domains_n, splits_n),
        per_class=per_class,
        damaged=damaged,
        repeats=_repeats(groups, source),
        leaks=_repeats(_differing(groups, splits_n), source),
        conflicts=_repeats(_differing(groups, labels_n), source),
        shared=_repeats(_differing(groups, domains_n), source),
        few={name: per_split["train"] for name, per_split in usable.items() if per_split["train"] < min_per_class},
        untested=tuple(name for name, per_split in usable.items() if per_split["test"] == 0),
        untaught=tuple(name for name, per_split in usable.items() if per_split["train"] == 0),
        alike=tuple(notes(source)),
        black=black,
        more_frames=more_frames,
        min_per_class=min_per_class,
    )


def render(found: Audit) -> str:
    """The audit as plain text for a terminal, in which control characters of names are escaped."""
    splits = [name for name in SPLITS if found.per_split[name]]
    lines = [
        *found.description,
        "",
        *_columns("split", {name: {"items": found.per_split[name]} for name in splits}, ["items"]),
    ]
    if len(found.domain_names) > 1:
        lines += ["", *_columns("domain", found.per_domain, splits)]
    sizes = sorted((per_split["train"], name) for name, per_split in found.per_class.items())
    lines += [
        "",
        f"training items per class: {sizes[0][0]} ({sizes[0][1]}) to {sizes[-1][0]} ({sizes[-1][1]}),"
        f" median {sizes[len(sizes) // 2][0]}",
        f"repeated items: {found.repeats.items} in {count(found.repeats.groups, 'group')}",
    ]
    if found.more_frames:
        frames = found.more_frames
        lines.append(f"only the first frame is read: {count(len(frames), 'image')} ({listed(frames, 3)})")
    problems = found.problems
    lines += ["", count(len(problems), "problem") + (":" if problems else "")]
    lines += [f"- {sentence}" for sentence in problems]
    if found.damaged:
        lines += ["", "damaged:", *(f"  {where}" for where in found.damaged)]
    for title, repeats in (
        ("in more than one split", found.leaks),
        ("in more than one class", found.conflicts),
        ("in more than one domain", found.shared),
    ):
        if repeats.groups:
            told = f"{len(repeats.examples)} of {repeats.groups}" if repeats.groups > _EXAMPLES else "all"
            lines += ["", f"{title} ({told}):"]
            lines += [("    = " if k else "  ") + place for group in repeats.examples for k, place in enumerate(group)]
    return "\n".join(map(escaped, lines)) + "\n"


def content_of(payload: Payload) -> bytes:
    """A hash of what an item shows: decoded pixels, or text after folding case and white space."""
    return _content(payload)[0]


def _content(payload: Payload) -> tuple[bytes, bool, bool]:
    """A hash of what an item shows, whether it is an image that has turned out nearly black, and one of several frames."""
    if isinstance(payload, Row):
        turns = (
            [payload.prompt] if isinstance(payload.prompt, str) else [f"{m.role}: {m.content}" for m in payload.prompt]
        )
        payload = "\n".join(turns)
    if isinstance(payload, str):
        text = " ".join(payload.casefold().split())
        if not text:
            raise ValueError("the text is empty")
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest(), False, False
    pixels = decode(payload)
    content = hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).digest()
    return content, nearly_black(payload, pixels), has_more_frames(payload)


def _differing(groups: list[Ints], ids_n: Ints) -> list[Ints]:
    return [rows for rows in groups if len(np.unique(ids_n[rows])) > 1]


def _repeats(groups: list[Ints], source: Source) -> Repeats:
    def told(row: int) -> str:
        names = [SPLITS[source.splits_n[row]], source.class_names[source.labels_n[row]]]
        if len(source.domain_names) > 1:
            names.append(source.domain_names[source.domains_n[row]])
        return f"{source.items.where(row)} [{', '.join(names)}]"

    return Repeats(
        groups=len(groups),
        items=sum(len(rows) for rows in groups),
        examples=tuple(tuple(told(int(row)) for row in rows[:_EXAMPLES]) for rows in groups[:_EXAMPLES]),
    )


def _columns(title: str, rows: dict[str, dict[str, int]], columns: Sequence[str]) -> list[str]:
    rows = {escaped(name): row for name, row in rows.items()}
    wide = max(len(title), *(len(name) for name in rows))
    head = f"{title:<{wide}}" + "".join(f"{column:>9}" for column in columns)
    return [
        head,
        *(f"{name:<{wide}}" + "".join(f"{row[column]:>9}" for column in columns) for name, row in rows.items()),
    ]
