"""Instructions: prompts with their completions. Read from records, or made of labelled texts by a template.

Shape letters: n rows.
"""

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter
from typing import Any

import numpy as np

from lamina.data.instruction_rows import class_name, row_of, text_of, unicode_of, unused
from lamina.data.names import clean, refuse_likely_splits, shown
from lamina.data.records import Columns, Items, LeftOut, Message, Row, Source, build, domain_ids, split_ids
from lamina.errors import ConfigError, DataError
from lamina.types import SPLITS, Ints

__all__ = [
    "Message",
    "Records",
    "Row",
    "RowItems",
    "as_instructions",
    "from_records",
    "holds_instructions",
    "instructions_from",
]

FIELDS = ("text", "options", "domain")
"""What a template may name."""
_NAMED = 3


@dataclass(frozen=True, eq=False)
class Records:
    """The records of one file or table: mappings from column to value, as JSON and Parquet hold them."""

    name: str
    """What messages call it."""
    records: Sequence[Any]
    split: int | None = None
    """The split that its place or name tells."""
    domain: str | None = None
    """The domain that its place tells."""
    lines: Sequence[int] | None = None
    """The line of every record, for JSON lines."""

    def where(self, i: int) -> str:
        return f"{self.name}:{self.lines[i]}" if self.lines is not None else f"{self.name} row {i}"


@dataclass(frozen=True, eq=False)
class RowItems:
    """Instructions, and the records they come from."""

    rows: tuple[Row, ...]
    parts: tuple[Records, ...]
    starts: tuple[int, ...]

    def read(self, i: int) -> Row:
        return self.rows[i]

    def where(self, i: int) -> str:
        part, row = self.place(i)
        return part.where(row)

    def place(self, i: int) -> tuple[Records, int]:
        # The last part that starts there: empty ones come before it.
        which = bisect_right(self.starts, i) - 1
        return self.parts[which], i - self.starts[which]


def holds_instructions(names: Sequence[str], columns: Columns) -> bool:
    """Returns whether a table with columns of these names holds instructions: it has prompts and completions, or messages.

    A table of labelled images or texts may have a column of messages too, and stays one.
    """
    if {columns.prompt, columns.completion} <= set(names):
        return True
    labelled = columns.label in names and (columns.text in names or columns.image in names)
    return columns.messages in names and not labelled


def instructions_from(
    records: Sequence[Mapping[str, Any]],
    *,
    columns: Columns | None = None,
    name: str = "records",
    test_fraction: float = 0.2,
) -> Source:
    """Returns a source of instructions that are in memory.

    records: one mapping for each row, with prompt and completion or with messages, and perhaps options, domain and split.

    Raises DataError naming the first wrong row.
    """
    return from_records(
        [Records(name, records)],
        name=name,
        columns=columns or Columns(),
        test_fraction=test_fraction,
        form="items in memory",
    )


def from_records(
    parts: Sequence[Records],
    *,
    name: str,
    columns: Columns,
    domain_names: tuple[str, ...] | None = None,
    test_fraction: float,
    form: str,
    left_out: tuple[LeftOut, ...] = (),
) -> Source:
    """Returns a source of the instructions of these parts, one after another.

    form: what the parts are, for the layout. domain_names: the order of the domains; by default that of their rows.

    Raises DataError naming the first wrong row.
    """
    rows = tuple(row_of(record, columns, part.where(i)) for part in parts for i, record in enumerate(part.records))
    starts = np.cumsum([0, *(len(part.records) for part in parts)])[:-1]
    items = RowItems(rows, tuple(parts), tuple(int(start) for start in starts))
    if not rows:
        raise DataError(f"{name} holds no rows. Point at data with at least one prompt and its completion")
    told = ["prompts with their completions"]
    domains_n, domains = _domains(items, columns, domain_names, told)
    splits_n = _splits(items, columns, name, told)
    labels_n, class_names = _classes(items, domains_n, domains)
    beside = {key for part in parts for record in part.records for key in unused(record, columns)}
    if beside:
        few = tuple(sorted(map(shown, beside))[:_NAMED])
        left_out = (*left_out, LeftOut("columns that are not used", len(beside), few))
    return build(
        kind="instructions",
        name=name,
        # The records themselves are not needed any more.
        items=replace(items, parts=tuple(replace(part, records=range(len(part.records))) for part in parts)),
        labels_n=labels_n,
        class_names=class_names,
        splits_n=splits_n,
        domains_n=domains_n,
        domain_names=domains,
        contents=(_content(row) for row in rows),
        test_fraction=test_fraction,
        layout=f"{form}: {', '.join(told)}",
        left_out=left_out,
    )


def _values(items: RowItems, column: str) -> list[Any]:
    return [record.get(column) for part in items.parts for record in part.records]


def _told(items: RowItems, of: str) -> list[Any]:
    """What the place of every row's part tells: its `split` or `domain`."""
    return [getattr(part, of) for part in items.parts for _ in part.records]


def _domains(
    items: RowItems, columns: Columns, names: tuple[str, ...] | None, told: list[str]
) -> tuple[Ints, tuple[str, ...]]:
    values, places = _values(items, columns.domain), _told(items, "domain")
    if any(value is not None for value in values):
        told.append(f"domains in {shown(columns.domain)!r}")
        domains_n, found = domain_ids(values, names, items.where)
        for row, place in enumerate(places):
            if place is not None and found[domains_n[row]] != clean(place, "the name of a domain"):
                raise DataError(
                    f"{items.where(row)} is of the domain {shown(found[domains_n[row]])!r} by its column"
                    f" {shown(columns.domain)!r}, but of {shown(place)!r} by its folder. Correct the column, or remove it"
                )
        return domains_n, found
    if all(place is None for place in places):
        return np.zeros(len(values), np.int64), ("all",)
    told.append("domains told by the names of folders or files")
    return domain_ids(places, names, items.where)


def _splits(items: RowItems, columns: Columns, name: str, told: list[str]) -> Ints | None:
    values, places = _values(items, columns.split), _told(items, "split")
    if any(value is not None for value in values):
        told.append(f"splits in {shown(columns.split)!r}")
        splits_n = split_ids(values, items.where)
        # Where all files are called train, or all test, the name says nothing.
        wrong = [row for row, place in enumerate(places) if place not in (None, splits_n[row])]
        if wrong and len({part.split for part in items.parts}) > 1:
            row = wrong[0]
            raise DataError(
                f"{items.where(row)} is of the split {SPLITS[splits_n[row]]} by its column {shown(columns.split)!r}, but of"
                f" {SPLITS[places[row]]} by its place. Correct the column, remove it, or rename the file or folder"
            )
        return splits_n
    if all(place is None for place in places):
        stems = [part.name.rpartition("/")[2].partition(".")[0] for part in items.parts]
        refuse_likely_splits(list(dict.fromkeys(stems)), name)
        return None
    if None in places:
        without = items.place(places.index(None))[0].name
        other = next(part.name for part in items.parts if part.split is not None)
        raise DataError(
            f"the name of {other} tells a split, that of {without} does not. Name both by their splits (train, val, test), or"
            " move one elsewhere"
        )
    told.append("splits told by the names of files or folders")
    return np.array(places, np.int64)


def _classes(items: RowItems, domains_n: Ints, domains: tuple[str, ...]) -> tuple[Ints, tuple[str, ...]]:
    """Class ids (n,) and class names.

    In a domain whose rows all have the same options the class of a row is its completion, in the order of the first row's
    options. Any other domain is a single class.
    """
    rows = items.rows
    labels_n = np.zeros(len(rows), np.int64)
    names: list[str] = []
    for domain, domain_name in enumerate(domains):
        members: list[int] = np.flatnonzero(domains_n == domain).tolist()
        options = rows[members[0]].options
        wanted = frozenset(map(class_name, options))
        found = {class_name(rows[row].completion) for row in members}
        if not wanted or any(frozenset(map(class_name, rows[row].options)) != wanted for row in members):
            labels_n[members] = len(names)
            names.append(domain_name)
            continue
        ids: dict[str, int] = {}
        for option in dict.fromkeys(map(class_name, options)):
            if option in found:
                ids[option] = len(names)
                names.append(option if len(domains) == 1 else f"{domain_name}: {option}")
        labels_n[members] = [ids[class_name(rows[row].completion)] for row in members]
    for label, name in enumerate(names):
        if not name.isprintable():
            clean(name, f"the class of {items.where(int((labels_n == label).argmax()))}, by its completion,")
    if doubled := [name for name, times in Counter(names).items() if times > 1]:
        raise DataError(
            f"two domains come to classes of the same name, {shown(doubled[0])!r} (domain: completion). Rename one of the"
            " domains"
        )
    return labels_n, tuple(names)


def _content(row: Row) -> bytes:
    return json.dumps([row.prompt, row.completion, row.options], ensure_ascii=False).encode()


@dataclass(frozen=True, eq=False)
class TemplatedItems:
    """Labelled texts, asked as instructions."""

    items: Items
    pieces: tuple[tuple[str, str | None], ...]
    """Of the template: text, and the field after it."""
    labels_n: Ints
    domains_n: Ints
    domain_names: tuple[str, ...]
    answers: Mapping[tuple[int, int], str]
    """(Domain, class) to answer."""
    options: Sequence[tuple[str, ...]]
    """Of every domain."""

    def read(self, i: int) -> Row:
        domain, label = int(self.domains_n[i]), int(self.labels_n[i])
        options = self.options[domain]
        values = {
            "text": text_of(self.items.read(i), "text", self.where(i)),
            "options": ", ".join(options),
            "domain": self.domain_names[domain],
        }
        prompt = "".join(before + (values[field] if field else "") for before, field in self.pieces)
        return Row(prompt, self.answers[domain, label], options)

    def where(self, i: int) -> str:
        return self.items.where(i)


def as_instructions(source: Source, template: str, answers: Sequence[str] | None = None) -> Source:
    """Returns labelled texts as instructions: a prompt by the template, and the answer of the class as its completion.

    template: may name {text} (needed), {options} (separated by commas) and {domain}. answers (n,): of every row; by default
    those of the source's column of answers, or else the names of the classes. The options of a row are the answers of all
    classes with training rows in its domain, in the order of the classes. A row of another class has a completion that is
    none of its options. Classes, splits and domains stay the same.

    Raises ConfigError for a template with another field or without {text}; DataError for images, for a blank text (when it
    is read), and where a class has two answers, or two classes have the same, in one domain.
    """
    if source.kind != "text":
        raise DataError(f"{source.name} holds no labelled texts, so no template applies. Use labelled texts")
    pieces = _pieces(template)
    column = source.answers() if answers is None and source.answers is not None else answers
    if column is not None and len(column) != len(source):
        raise DataError(f"{source.name} holds {len(source)} rows but {len(column)} answers. Give one for each row")
    by_cell = _answers(source, column)
    options = []
    for domain, domain_name in enumerate(source.domain_names):
        taught = np.unique(source.labels_n[(source.domains_n == domain) & (source.splits_n == 0)]).tolist()
        said = {label: by_cell[domain, label] for label in taught}
        label_by_name: dict[str, int] = {}
        for label, answer in said.items():
            other = label_by_name.setdefault(class_name(answer), label)
            if other != label:
                raise DataError(
                    f"classes {shown(source.class_names[other])!r} and {shown(source.class_names[label])!r} of domain"
                    f" {shown(domain_name)!r} have the same answer, {shown(answer)!r}. Give them different answers"
                )
        options.append(tuple(said.values()))
    cells = [[*cell, answer] for cell, answer in sorted(by_cell.items())]
    told = json.dumps([source.fingerprint, template, cells], ensure_ascii=False)
    answered = "the column of answers" if source.answers is not None and answers is None else "the answers given"
    return replace(
        source,
        kind="instructions",
        items=TemplatedItems(
            source.items, pieces, source.labels_n, source.domains_n, source.domain_names, by_cell, options
        ),
        fingerprint=hashlib.blake2b(told.encode(), digest_size=16).hexdigest(),
        layout=f"{source.layout}; prompts by the template {template!r}, completions from"
        f" {answered if column is not None else 'the names of the classes'}",
        answers=None,
    )


def _answers(source: Source, column: Sequence[Any] | None) -> dict[tuple[int, int], str]:
    """The answer of every class in every domain where it occurs."""
    cells = list(zip(source.domains_n.tolist(), source.labels_n.tolist(), strict=True))
    if column is None:
        return {cell: text_of(source.class_names[cell[1]], "class name", source.name) for cell in dict.fromkeys(cells)}
    first: dict[tuple[int, int], int] = {}
    found: dict[tuple[int, int], str] = {}
    for row, (cell, value) in enumerate(zip(cells, column, strict=True)):
        if cell not in found:
            first[cell], found[cell] = row, text_of(value, "answer", source.where(row))
        elif value != found[cell]:
            raise DataError(
                f"{source.where(row)} has the answer {shown(repr(value))}, and {source.where(first[cell])}, of the same class"
                f" {shown(source.class_names[cell[1]])!r}, has {shown(repr(found[cell]))}; allowed is one answer for each class"
                " in a domain. Correct one, or name another column with --set data.columns.answer=NAME"
            )
    return found


def _pieces(template: str) -> tuple[tuple[str, str | None], ...]:
    allowed = ", ".join(f"{{{field}}}" for field in FIELDS)
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"data.template is {shown(template)!r}, which is no template ({error}). Write {{{{ and }}}} for braces that are no"
            f" field; the fields are {allowed}"
        ) from error
    for _, field, form, conversion in parsed:
        if field is not None and (field not in FIELDS or form or conversion):
            told = field + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise ConfigError(
                f"data.template has the field {{{shown(told)}}}; allowed are {allowed}. Correct it, or write {{{{ and }}}} for"
                " braces that are no field"
            )
    if "text" not in [field for _, field, _, _ in parsed]:
        raise ConfigError(f"data.template is {shown(template)!r}, without {{text}}. Add it where the text is to stand")
    unicode_of(template, "text", "data.template")
    return tuple((before, field) for before, field, _, _ in parsed)
