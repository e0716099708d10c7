"""Tables: Parquet and CSV files, and Hugging Face datasets, saved or from the hub. All are read as Arrow tables."""

import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from lamina.data.records import (
    SPLIT_NAMES,
    Columns,
    Kind,
    Payload,
    Source,
    build,
    domain_ids,
    label_ids,
    split_ids,
    split_in_file_name,
    split_of,
)
from lamina.errors import DataError
from lamina.types import Ints

PROVENANCE = "source"
"""An optional column that says where each row came from; it makes messages clearer."""


@dataclass(frozen=True, eq=False)
class Part:
    """One table of a source: a file, or a split of a dataset."""

    name: str
    table: pa.Table
    split: int | None
    folder: Path
    """What paths in the table are relative to, and must stay in."""


@dataclass(frozen=True, eq=False)
class TableItems:
    """One column of the parts, one after another."""

    parts: tuple[Part, ...]
    column: str
    starts: tuple[int, ...]

    def read(self, i: int) -> Payload:
        part, row = self.place(i)
        value = part.table.column(self.column)[row].as_py()
        if isinstance(value, Mapping):
            if value.get("bytes") is not None:
                return bytes(value["bytes"])
            return self._inside(part, str(value["path"])).read_bytes()
        payload: Payload = value
        return payload

    @staticmethod
    def _inside(part: Part, path: str) -> Path:
        """A path that a table names. Only files below the table's own folder are ever read."""
        found = (part.folder / path).resolve()
        if not found.is_relative_to(part.folder.resolve()):
            raise DataError(
                f"{part.name} names the file {path!r}, which is outside {part.folder}. Move the file into that folder, or"
                " store the images in the table as bytes"
            )
        return found

    def where(self, i: int) -> str:
        part, row = self.place(i)
        told = part.table.column(PROVENANCE)[row].as_py() if PROVENANCE in part.table.column_names else None
        return f"{part.name} row {row}" + (f" ({told})" if told else "")

    def place(self, i: int) -> tuple[Part, int]:
        which = bisect_right(self.starts, i) - 1
        return self.parts[which], i - self.starts[which]

    def contents(self) -> Iterator[bytes]:
        for start, part in zip(self.starts, self.parts, strict=True):
            if pa.types.is_struct(part.table.schema.field(self.column).type):
                for row in range(len(part.table)):
                    # A path on this machine would make the fingerprint differ elsewhere: hash what it leads to.
                    payload = self.read(start + row)
                    yield payload if isinstance(payload, bytes) else bytes(str(payload), "utf-8")
                continue
            for some in part.table.select([self.column]).to_batches(max_chunksize=1024):
                yield from some.column(0).cast(pa.large_binary()).to_numpy(zero_copy_only=False)


def open_parquet(files: list[Path], *, name: str, kind: Kind | None, columns: Columns, test_fraction: float) -> Source:
    """Parquet files with the columns image or text, label, and perhaps split and domain.

    Class names come from `class_names` in a README.json beside the files, or from the features that Hugging Face
    datasets write into the files, or else they are the labels. Raises DataError for what is missing or damaged.
    """
    import pyarrow.parquet as pq

    readme = _readme(files[0].parent / "README.json")
    wanted = (columns.image, columns.text, columns.label, columns.domain, columns.split, PROVENANCE)
    payloads = [column for of, column in (("image", columns.image), ("text", columns.text)) if kind in (None, of)]
    parts = []
    names: tuple[str, ...] | None = None
    for file in files:
        try:
            schema = pq.read_schema(file)
            names = names or _names_in_schema(schema, columns.label)
            present = [column for column in schema.names if column in wanted]
            # Where a column is missing, an empty table with all of them lets the message list what there is.
            complete = columns.label in present and any(payload in present for payload in payloads)
            table = pq.read_table(file, columns=present, memory_map=True) if complete else schema.empty_table()
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{file} cannot be read as Parquet ({_line(error)}). Fetch or write the file again"
            ) from error
        parts.append(Part(file.name, table, split_in_file_name(file.stem), file.parent))
    return from_parts(
        parts,
        name=name,
        kind=kind,
        columns=columns,
        class_names=_listed(readme, "class_names", files[0].parent) or names,
        domain_names=_listed(readme, "domains", files[0].parent),
        test_fraction=test_fraction,
    )


def open_csv(file: Path, *, kind: Kind | None, columns: Columns, test_fraction: float) -> Source:
    """A CSV file of texts with a header. Raises DataError if it is damaged or lacks a column."""
    from pyarrow import csv

    if kind == "image":
        raise DataError(
            f"{file} is a CSV file, which can only hold texts. Point at a folder of images or a Parquet file"
        )
    texts = {column: pa.string() for column in (columns.text, columns.domain, columns.split)}
    try:
        table = csv.read_csv(
            file,
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=csv.ConvertOptions(column_types=texts),
        )
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file} cannot be read as CSV ({_line(error)}). Correct the line, quoting texts that hold commas"
        ) from error
    # The file's name says nothing here: a lone train.csv must still be able to bring its own split column.
    return from_parts(
        [Part(file.name, table, None, file.parent)],
        name=file.stem,
        kind="text",
        columns=columns,
        class_names=None,
        domain_names=None,
        test_fraction=test_fraction,
    )


def open_saved(folder: Path, *, kind: Kind | None, columns: Columns, test_fraction: float) -> Source:
    """A Hugging Face dataset written with save_to_disk. Raises DataError if it is damaged or lacks a column."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(
            f"{folder} cannot be read as a saved Hugging Face dataset ({_line(error)}). Save it again with save_to_disk"
        ) from error
    return _from_datasets(loaded, folder.name, folder, kind=kind, columns=columns, test_fraction=test_fraction)


def open_hub(address: str, *, kind: Kind | None, columns: Columns, test_fraction: float) -> Source:
    """A dataset of the Hugging Face hub: `owner/name` or `owner/name:configuration`.

    Raises DataError if it cannot be had, for example without a network, and if it lacks a column.
    """
    import datasets
    from huggingface_hub.constants import HF_HOME

    name, _, configuration = address.partition(":")
    try:
        loaded = datasets.load_dataset(name, configuration or None)
    except (OSError, ValueError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"hf:{address} cannot be had from the Hugging Face hub ({_line(error)}). Check the spelling (hf:owner/name,"
            " or hf:owner/name:configuration) and the network; with HF_HUB_OFFLINE=1 only datasets fetched before"
            " can be used. Or save it elsewhere with save_to_disk and point at that folder"
        ) from error
    return _from_datasets(
        loaded, name.rpartition("/")[2], Path(HF_HOME), kind=kind, columns=columns, test_fraction=test_fraction
    )


def from_parts(
    parts: list[Part],
    *,
    name: str,
    kind: Kind | None,
    columns: Columns,
    class_names: tuple[str, ...] | None,
    domain_names: tuple[str, ...] | None,
    test_fraction: float,
) -> Source:
    """A source of the rows of these tables, one after another. Raises DataError naming the first wrong row."""
    kind = kind or _kind(parts[0], columns)
    payload = columns.image if kind == "image" else columns.text
    for part in parts:
        _require(part, payload, kind)
        _require(part, columns.label, "label")
        _check_payload(part, payload, kind)
    starts = np.cumsum([0, *(len(part.table) for part in parts)])
    items = TableItems(tuple(parts), payload, tuple(int(start) for start in starts[:-1]))
    missing_n = np.concatenate([part.table.column(payload).is_null().to_numpy() for part in parts])
    if missing_n.any():
        raise DataError(f"{items.where(int(missing_n.argmax()))} has no {kind}. Remove the row")
    labels_n, names = label_ids(_values(parts, columns.label), class_names, items.where)
    domains_n: Ints | None = None
    found_domains: tuple[str, ...] = ("all",)
    if all(columns.domain in part.table.column_names for part in parts):
        domains_n, found_domains = domain_ids(_values(parts, columns.domain), domain_names, items.where)
    splits_n = None
    if all(columns.split in part.table.column_names for part in parts):
        splits_n = split_ids(_values(parts, columns.split), items.where)
    elif all(part.split is not None for part in parts):
        splits_n = np.concatenate([np.full(len(part.table), part.split, np.int64) for part in parts])
    return build(
        kind=kind,
        name=name,
        items=items,
        labels_n=labels_n,
        class_names=names,
        splits_n=splits_n,
        domains_n=domains_n,
        domain_names=found_domains,
        contents=items.contents(),
        test_fraction=test_fraction,
    )


def _from_datasets(
    loaded: Any, name: str, folder: Path, *, kind: Kind | None, columns: Columns, test_fraction: float
) -> Source:
    split_by_name = dict(loaded) if isinstance(loaded, dict) else {None: loaded}
    parts = []
    for split_name, dataset in split_by_name.items():
        split = split_of(split_name) if split_name is not None else None
        if split_name is not None and split is None:
            raise DataError(
                f"{name} has a split named {split_name!r}; allowed are {', '.join(SPLIT_NAMES)}."
                " Rename or drop it, and save the dataset with save_to_disk"
            )
        # In this format nothing is decoded, and rows selected or shuffled earlier come in their order.
        table = dataset.with_format("arrow")[:]
        parts.append(Part(f"{name}/{split_name}" if split_name else name, table, split, folder))
    feature = next(iter(split_by_name.values())).features.get(columns.label)
    names = getattr(feature, "names", None)
    return from_parts(
        parts,
        name=name,
        kind=kind,
        columns=columns,
        class_names=tuple(names) if names else None,
        domain_names=None,
        test_fraction=test_fraction,
    )


def _kind(part: Part, columns: Columns) -> Kind:
    if columns.image in part.table.column_names:
        return "image"
    if columns.text in part.table.column_names:
        return "text"
    raise DataError(
        f"{part.name} has neither a column {columns.image!r} of images nor a column {columns.text!r} of texts. Its"
        f" columns: {', '.join(part.table.column_names) or 'none'}. Say which one it is with"
        " --set data.columns.image=NAME or --set data.columns.text=NAME"
    )


def _require(part: Part, column: str, role: Literal["image", "text", "label"]) -> None:
    if column not in part.table.column_names:
        have = ", ".join(part.table.column_names) or "none"
        raise DataError(
            f"{part.name} has no column {column!r}, which should hold the {role} of each row. Its columns: {have}."
            f" Say which one it is with --set data.columns.{role}=NAME"
        )


def _check_payload(part: Part, column: str, kind: Kind) -> None:
    found = part.table.schema.field(column).type
    if kind == "text":
        fits, allowed = pa.types.is_string(found) or pa.types.is_large_string(found), "string"
    else:
        pair = pa.types.is_struct(found) and {"bytes", "path"} <= {field.name for field in found}
        fits = pair or pa.types.is_binary(found) or pa.types.is_large_binary(found)
        allowed = "binary (encoded images), or {bytes, path} pairs"
    if not fits:
        raise DataError(
            f"column {column!r} of {part.name} is of type {found}; allowed for {kind}s is {allowed}."
            f" Convert it, or name another column with --set data.columns.{kind}=NAME"
        )


def _values(parts: list[Part], column: str) -> list[Any]:
    def listed(values: pa.ChunkedArray) -> list[Any]:
        plain = pa.types.is_integer(values.type) or pa.types.is_string(values.type)
        found: list[Any] = values.to_numpy().tolist() if plain and not values.null_count else values.to_pylist()
        return found

    return [value for part in parts for value in listed(part.table.column(column))]


def _names_in_schema(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """Class names that Hugging Face datasets left in the metadata of a Parquet file."""
    stored = (schema.metadata or {}).get(b"huggingface")
    if stored is None:
        return None
    names = json.loads(stored).get("info", {}).get("features", {}).get(label, {}).get("names")
    return tuple(map(str, names)) if names else None


def _readme(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({_line(error)}). Correct it, or remove it") from error
    return told if isinstance(told, dict) else {}


def _listed(readme: Mapping[str, Any], key: str, folder: Path) -> tuple[str, ...] | None:
    names = readme.get(key)
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{key!r} in {folder / 'README.json'} is not a list of names. Correct it, or remove it")
    return tuple(names)


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
