"""What a source holds, in numbers and in sentences."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lamina.data.records import Source
from lamina.types import SPLITS, Ints

Counts = dict[str, dict[str, int]]
"""Name of a class or domain, then split, to items."""


def counts(names: tuple[str, ...], ids_n: Ints, splits_n: Ints) -> Counts:
    """Items of every name in every split. ids_n: positions in names; splits_n: positions in SPLITS."""
    table = np.bincount(ids_n * len(SPLITS) + splits_n, minlength=len(names) * len(SPLITS)).reshape(-1, len(SPLITS))
    return {
        name: {split: int(count) for split, count in zip(SPLITS, row, strict=True)}
        for name, row in zip(names, table, strict=True)
    }


def describe_source(source: Source) -> list[str]:
    """How a source was understood, in lines. `lamina data check` and `lamina run` print them."""
    told = as_dict(source)
    splits = ", ".join(f"{split} {items}" for split, items in told["splits"].items() if items)
    return [
        f"{source.name}: {len(source)} {source.kind}s, {len(source.class_names)} classes, {len(source.domain_names)} domains",
        f"splits: {splits}",
    ]


def as_dict(source: Source) -> dict[str, Any]:
    """What `describe_source` tells, complete, as what JSON can hold. `classes` is what `difference` compares."""
    per_split = np.bincount(source.splits_n, minlength=len(SPLITS))
    return {
        "name": source.name,
        "kind": source.kind,
        "layout": "",
        "splits": {split: int(items) for split, items in zip(SPLITS, per_split, strict=True)},
        "classes": counts(source.class_names, source.labels_n, source.splits_n),
        "domains": counts(source.domain_names, source.domains_n, source.splits_n),
        "left_out": [],
        "notes": [],
    }


def difference(old: Mapping[str, Mapping[str, int]], new: Mapping[str, Mapping[str, int]]) -> str:
    """A sentence that names the classes and counts that changed from one summary {class: {split: count}} to another."""
    parts = []
    if added := [name for name in new if name not in old]:
        parts.append(f"new: {', '.join(added)}")
    if gone := [name for name in old if name not in new]:
        parts.append(f"missing: {', '.join(gone)}")
    changed = [
        f"{name} ({split} {old[name].get(split, 0)}, now {new[name].get(split, 0)})"
        for name in new
        if name in old
        for split in SPLITS
        if old[name].get(split, 0) != new[name].get(split, 0)
    ]
    if changed:
        parts.append(f"changed: {', '.join(changed)}")
    return "; ".join(parts) or "classes and counts are the same; the contents, the names of files or the splits changed"
