"""Hugging Face datasets, saved on disk or from the hub."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from lamina.data.names import SPLIT_NAMES, shown, split_of
from lamina.data.records import Columns, Kind, Source
from lamina.data.tables import Part, check_once, from_parts, line_of, one_list_of_names
from lamina.errors import DataError

_BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError, pa.ArrowException)
"""What the library raises for files that are not what they claim to be."""


def open_saved(folder: Path, *, kind: Kind | None, columns: Columns, test_fraction: float) -> Source:
    """A Hugging Face dataset written with save_to_disk. Raises DataError if it is damaged or lacks a column."""
    import datasets

    try:
        parts, names = _parts(datasets.load_from_disk(str(folder)), folder.name, folder, columns)
    except _BROKEN as error:
        raise DataError(
            f"{folder} cannot be read as a saved Hugging Face dataset ({line_of(error)}). Save it again with save_to_disk"
        ) from error
    return from_parts(
        parts,
        name=folder.name,
        kind=kind,
        columns=columns,
        class_names=names,
        domain_names=None,
        test_fraction=test_fraction,
        form="saved Hugging Face dataset",
    )


def open_hub(address: str, *, kind: Kind | None, columns: Columns, test_fraction: float) -> Source:
    """A dataset of the Hugging Face hub: `owner/name` or `owner/name:configuration`.

    Raises DataError if it cannot be had, for example without a network, and if it lacks a column.
    """
    import datasets
    from huggingface_hub.constants import HF_HOME

    name, _, configuration = address.partition(":")
    try:
        loaded = datasets.load_dataset(name, configuration or None)
        parts, names = _parts(loaded, name.rpartition("/")[2], Path(HF_HOME), columns)
    except (*_BROKEN, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"hf:{address} cannot be had from the Hugging Face hub ({line_of(error)}). Check the spelling (hf:owner/name,"
            " or hf:owner/name:configuration) and the network; with HF_HUB_OFFLINE=1 only datasets fetched before"
            " can be used. Or save it elsewhere with save_to_disk and point at that folder"
        ) from error
    return from_parts(
        parts,
        name=name.rpartition("/")[2],
        kind=kind,
        columns=columns,
        class_names=names,
        domain_names=None,
        test_fraction=test_fraction,
        form="Hugging Face dataset",
    )


def _parts(loaded: Any, name: str, folder: Path, columns: Columns) -> tuple[list[Part], tuple[str, ...] | None]:
    """One table for each split, and the class names."""
    split_by_name = dict(loaded) if isinstance(loaded, dict) else {None: loaded}
    if not split_by_name:
        raise DataError(f"{name} holds no splits. Save a dataset that has rows")
    parts: list[Part] = []
    names: dict[str, tuple[str, ...] | None] = {}
    for split_name, dataset in split_by_name.items():
        split = split_of(split_name) if split_name is not None else None
        if split_name is not None and split is None:
            raise DataError(
                f"{name} has a split named {shown(split_name)!r}; allowed are {', '.join(SPLIT_NAMES)}."
                " Rename or drop it, and save the dataset with save_to_disk"
            )
        check_once(name, dataset.column_names, (columns.image, columns.text, columns.label))
        # In this format nothing is decoded, and rows selected or shuffled earlier come in their order.
        part = Part(f"{name}/{split_name}" if split_name else name, dataset.with_format("arrow")[:], split, folder)
        parts.append(part)
        listed = getattr(dataset.features.get(columns.label), "names", None)
        names[part.name] = tuple(map(str, listed)) if listed else None
    return parts, one_list_of_names(names)
