"""Hugging Face datasets, saved on disk or from the hub."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pyarrow as pa

from lamina.data.names import SPLIT_NAMES, shown, split_of
from lamina.data.records import Columns, LeftOut, Source
from lamina.data.tables import Part, check_once, from_parts, instruction_columns, line_of, one_list_of_names
from lamina.data.tree import Leftovers, is_hidden
from lamina.errors import DataError
from lamina.types import Kind

_BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError, pa.ArrowException)
"""What the library raises for files that are not what they claim to be."""
_ADDRESS = re.compile(r"(\w[\w.-]*(?:/\w[\w.-]*)?)(?::([^<>:/\\|?*]+))?", re.ASCII)
"""A name on the hub, with or without its owner, and perhaps a configuration."""


def open_saved(folder: Path, *, kind: Kind | None, columns: Columns, test_fraction: float) -> Source:
    """A Hugging Face dataset written with save_to_disk. Raises DataError if it is damaged or lacks a column."""
    import datasets

    _refuse_pipes(folder)
    try:
        loaded = datasets.load_from_disk(str(folder))
        parts, names = _parts(loaded, folder.name, folder, columns)
        left_out = _beside(folder, list(loaded) if isinstance(loaded, dict) else None)
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
        left_out=left_out,
    )


def open_hub(address: str, *, kind: Kind | None, columns: Columns, test_fraction: float) -> Source:
    """A dataset of the Hugging Face hub: `owner/name` or `owner/name:configuration`.

    Raises DataError for an address of another form, if it cannot be had, for example without a network, and if it lacks
    a column.
    """
    import datasets
    from huggingface_hub.constants import HF_HOME

    known = _ADDRESS.fullmatch(address)
    if known is None:
        raise DataError(
            f"{shown('hf:' + address)!r} is no address on the Hugging Face hub; allowed are hf:owner/name, hf:name and"
            " either with :configuration. For files on this machine, give their path without hf:"
        )
    name, configuration = known.groups()
    if os.path.lexists(name):
        # The library would open it, and read whatever it finds.
        raise DataError(
            f"hf:{address} is an address on the Hugging Face hub, but {Path(name).absolute()} is on this machine, and would"
            " be taken instead. Give the path without hf:, or start from another folder"
        )
    try:
        loaded = datasets.load_dataset(name, configuration)
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


def _refuse_pipes(folder: Path) -> None:
    """Raises DataError for a pipe, a socket or a device below the folder: reading one may never end."""
    seen: set[str] = set()
    for at, folders, files in os.walk(folder, followlinks=True):
        for name in files:
            path = Path(at, name)
            if path.exists() and not path.is_file():
                raise DataError(
                    f"{path} is no regular file (a pipe, socket or device). Remove it, or save the dataset again"
                )
        # Links may lead in circles.
        folders[:] = [name for name in folders if os.path.realpath(Path(at, name)) not in seen]
        seen.update(os.path.realpath(Path(at, name)) for name in folders)


def _beside(folder: Path, splits: list[str] | None) -> tuple[LeftOut, ...]:
    """What is in the folder of a saved dataset, or in those of its splits, that the dataset does not name."""
    left = Leftovers()

    def note(at: Path, known: set[str]) -> None:
        for path in sorted(at.iterdir()):
            if is_hidden(path.name):
                left.add("hidden and system files and folders", str(path.relative_to(folder)))
            elif path.name not in known:
                left.add("files and folders beside the saved dataset", str(path.relative_to(folder)))

    if splits is not None:
        note(folder, {"dataset_dict.json", *splits})
    for at in [folder] if splits is None else [folder / split for split in splits]:
        state = json.loads((at / "state.json").read_text("utf-8"))
        note(at, {"state.json", "dataset_info.json", *(file["filename"] for file in state["_data_files"])})
    return left.found()


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
        wanted = (columns.image, columns.text, columns.label, *instruction_columns(columns))
        check_once(name, dataset.column_names, wanted)
        # In this format nothing is decoded, and rows selected or shuffled earlier come in their order.
        part = Part(f"{name}/{split_name}" if split_name else name, dataset.with_format("arrow")[:], split, folder)
        parts.append(part)
        listed = getattr(dataset.features.get(columns.label), "names", None)
        names[part.name] = tuple(map(str, listed)) if listed else None
    return parts, one_list_of_names(names)
