"""What a source holds and what was left out of it, in numbers and in sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lamina.data.names import alike, listed, shown
from lamina.data.records import Row, Source
from lamina.errors import DataError
from lamina.types import SPLITS, Ints, Kind

Counts = dict[str, dict[str, int]]
"""Name of a class or domain, then split, to items."""

_NAMED = 10


def counts(names: tuple[str, ...], ids_n: Ints, splits_n: Ints) -> Counts:
    """Items of every name in every split. ids_n: positions in names; splits_n: positions in SPLITS."""
    table = np.bincount(ids_n * len(SPLITS) + splits_n, minlength=len(names) * len(SPLITS)).reshape(-1, len(SPLITS))
    return {
        name: {split: int(count) for split, count in zip(SPLITS, row, strict=True)}
        for name, row in zip(names, table, strict=True)
    }


def count(n: int, noun: str) -> str:
    """The number and the noun, in the plural where needed."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}{'es' if noun.endswith('s') else 's'}"


def noun(kind: Kind) -> str:
    """Returns what one example of this kind is called."""
    return "instruction" if kind == "instructions" else kind


def kinds(kind: Kind) -> str:
    """Returns what examples of this kind are called."""
    return f"{noun(kind)}s"


def notes(source: Source) -> list[str]:
    """One sentence for each group of names that look alike."""
    return [
        f"{role} {' and '.join(repr(shown(name)) for name in group)} differ only in case, space or leading zeros"
        for role, names in (("classes", source.class_names), ("domains", source.domain_names))
        for group in alike(names)
    ]


def describe_source(source: Source) -> list[str]:
    """How a source was understood, in lines: its size, layout, splits, classes, domains, and what was left out.

    `lamina data check` and `lamina run` print these lines.
    """
    told = as_dict(source)
    classes: Counts = told["classes"]
    sizes = sorted(per_split["train"] for per_split in classes.values())
    each = str(sizes[0]) if sizes[0] == sizes[-1] else f"{sizes[0]} to {sizes[-1]}"
    lines = [
        f"{shown(source.name)}: {count(len(source), noun(source.kind))}, {count(len(classes), 'class')},"
        f" {count(len(source.domain_names), 'domain')}",
        f"layout: {source.layout}",
        "splits: " + ", ".join(f"{split} {items}" for split, items in told["splits"].items() if items),
        f"classes: {listed(classes, _NAMED)} ({each} training {kinds(source.kind)} each)",
    ]
    if len(source.domain_names) > 1:
        sums = [f"{name} {sum(per_split.values())}" for name, per_split in told["domains"].items()]
        lines.append(f"domains: {listed(sums, _NAMED)}")
    if source.kind == "instructions":
        lines += _describe_instructions(told["instructions"])
    lines += [f"left out: {left}" for left in source.left_out]
    return lines + [f"note: {note}" for note in told["notes"]]


def as_dict(source: Source) -> dict[str, Any]:
    """What `describe_source` tells, complete, as what JSON can hold. `classes` is what `difference` compares."""
    per_split = np.bincount(source.splits_n, minlength=len(SPLITS))
    more = {"instructions": instruction_facts(source)} if source.kind == "instructions" else {}
    return {
        "name": source.name,
        "kind": source.kind,
        "layout": source.layout,
        "splits": {split: int(items) for split, items in zip(SPLITS, per_split, strict=True)},
        "classes": counts(source.class_names, source.labels_n, source.splits_n),
        "domains": counts(source.domain_names, source.domains_n, source.splits_n),
        "left_out": [
            {"reason": left.reason, "count": left.count, "examples": list(left.examples)} for left in source.left_out
        ],
        "notes": notes(source),
        **more,
    }


def instruction_facts(source: Source) -> dict[str, Any]:
    """Returns how many instructions have options, how few and how many options, and the longest texts in characters.

    Rows that cannot be read are passed over: the audit and the tokenizer name them.
    """
    sizes: set[int] = set()
    chats = without = 0
    longest = {"prompt": (0, ""), "completion": (0, "")}
    for i in range(len(source)):
        try:
            row = source.read(i)
        except DataError:
            continue
        assert isinstance(row, Row)
        chat = not isinstance(row.prompt, str)
        chats += chat
        without += not row.options
        sizes |= {len(row.options)} if row.options else set()
        prompt = sum(len(message[1]) for message in row.prompt) if chat else len(row.prompt)
        for name, length in (("prompt", prompt), ("completion", len(row.completion))):
            if length > longest[name][0]:
                longest[name] = (length, source.where(i))
    return {
        "chats": chats,
        "without_options": without,
        "options": [min(sizes), max(sizes)] if sizes else None,
        "longest": {name: {"characters": length, "where": where} for name, (length, where) in longest.items()},
    }


def _describe_instructions(facts: Mapping[str, Any]) -> list[str]:
    if facts["options"] is None:
        options = "none: any completion is allowed"
    else:
        least, most = facts["options"]
        options = f"{most} in each row" if least == most else f"{least} to {most} in each row"
        if facts["without_options"]:
            options = f"{options} that has any; {count(facts['without_options'], 'row')} without"
    longest = [f"{name} {told['characters']:,} characters ({told['where']})" for name, told in facts["longest"].items()]
    chats = [f"chats: {count(facts['chats'], 'row')}"] if facts["chats"] else []
    return [f"options: {options}", *chats, f"longest: {', '.join(longest)}"]


def difference(old: Mapping[str, Mapping[str, int]], new: Mapping[str, Mapping[str, int]]) -> str:
    """A sentence that names the classes and counts that changed from one summary {class: {split: count}} to another."""
    parts = []
    if added := [name for name in new if name not in old]:
        parts.append(f"new: {count_of(added)}")
    if gone := [name for name in old if name not in new]:
        parts.append(f"missing: {count_of(gone)}")
    changed = [
        f"{name} ({split} {old[name].get(split, 0)}, now {new[name].get(split, 0)})"
        for name in new
        if name in old
        for split in SPLITS
        if old[name].get(split, 0) != new[name].get(split, 0)
    ]
    if changed:
        parts.append(f"changed: {listed(changed)}")
    if not parts and list(old) != list(new):
        parts.append("the order of the classes changed")
    return "; ".join(parts) or "classes and counts are the same; the contents, the names of files or the splits changed"


def count_of(names: Sequence[str]) -> str:
    """How many classes these are, and the first few of them."""
    return f"{count(len(names), 'class')} ({listed(names)})"
