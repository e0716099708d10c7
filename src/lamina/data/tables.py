"""Tables of labelled rows, and Parquet files. CSV files and Hugging Face datasets come to the same Arrow tables."""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lamina.data.instructions import Records, from_records, holds_instructions
from lamina.data.names import listed, refuse_likely_splits, shown, splits_in_file_names
from lamina.data.records import Columns, LeftOut, Payload, Source, build, domain_ids, label_ids, split_ids
from lamina.errors import DataError
from lamina.types import SPLITS, Ints, Kind

PROVENANCE = "source"
"""An optional column that says where each row came from; it makes messages clearer."""
_COLUMNS = 20
"""How many columns a message lists."""


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
        """A path that a table names. Only regular files below the table's own folder are ever read."""
        if "\0" in path:
            raise DataError(
                f"{part.name} names the file {shown(path)!r}, which no file can be called. Correct the table"
            )
        found = (part.folder / path).resolve()
        if not found.is_relative_to(part.folder.resolve()):
            raise DataError(
                f"{part.name} names the file {path!r}, which is outside {part.folder}. Move the file into that folder, or"
                " store the images in the table as bytes"
            )
        if found.exists() and not found.is_file():
            raise OSError(f"{found} is no regular file")
        return found

    def where(self, i: int) -> str:
        part, row = self.place(i)
        told = part.table.column(PROVENANCE)[row].as_py() if PROVENANCE in part.table.column_names else None
        return f"{part.name} row {row}" + (f" ({shown(str(told))})" if told else "")

    def place(self, i: int) -> tuple[Part, int]:
        which = bisect_right(self.starts, i) - 1
        return self.parts[which], i - self.starts[which]

    def contents(self) -> Iterator[bytes]:
        for start, part in zip(self.starts, self.parts, strict=True):
            if pa.types.is_struct(part.table.schema.field(self.column).type):
                for row in range(len(part.table)):
                    # A path on this machine would make the fingerprint differ elsewhere: hash what it leads to.
                    try:
                        payload = self.read(start + row)
                    except OSError:
                        # Decoding names the image, or leaves it out.
                        payload = b""
                    yield payload if isinstance(payload, bytes) else bytes(str(payload), "utf-8")
                continue
            for some in part.table.select([self.column]).to_batches(max_chunksize=1024):
                yield from some.column(0).cast(pa.large_binary()).to_numpy(zero_copy_only=False)


def open_parquet(
    files: list[Path],
    *,
    name: str,
    kind: Kind | None,
    columns: Columns,
    test_fraction: float,
    left_out: tuple[LeftOut, ...] = (),
) -> Source:
    """Parquet files with the columns image or text, label, and perhaps split and domain; or with those of instructions.

    Class names come from `class_names` in a README.json beside the files, or from the features that Hugging Face
    datasets write into the files, or else they are the labels. Raises DataError for what is missing or damaged.
    """
    readme = read_readme(files[0].parent / "README.json")
    splits = splits_in_file_names([file.stem for file in files])
    parts: list[Part] = []
    names_by_file: dict[str, tuple[str, ...] | None] = {}
    for file, split in zip(files, splits, strict=True):
        table, names_by_file[file.name] = read_parquet(file, kind, columns)
        parts.append(Part(file.name, table, split, file.parent))
    listed_names = names_listed(readme, "class_names", files[0].parent)
    return from_parts(
        parts,
        name=name,
        kind=kind,
        columns=columns,
        class_names=listed_names or one_list_of_names(names_by_file),
        domain_names=names_listed(readme, "domains", files[0].parent),
        test_fraction=test_fraction,
        form=f"Parquet, {len(files)} file{'s' * (len(files) > 1)}",
        left_out=left_out,
    )


def read_parquet(file: Path, kind: Kind | None, columns: Columns) -> tuple[pa.Table, tuple[str, ...] | None]:
    """Returns the wanted columns of a file, and the class names it lists. Raises DataError for a damaged file."""
    import pyarrow.parquet as pq

    payloads = [column for of, column in (("image", columns.image), ("text", columns.text)) if kind in (None, of)]
    try:
        schema = pq.read_schema(file)
        if is_of_instructions(kind, schema.names, columns):
            wanted: tuple[str, ...] = instruction_columns(columns)
            complete = holds_instructions(schema.names, columns)
        else:
            wanted = (columns.image, columns.text, columns.label, columns.domain, columns.split, PROVENANCE)
            complete = columns.label in schema.names and any(payload in schema.names for payload in payloads)
        check_once(file.name, schema.names, wanted)
        present = [column for column in dict.fromkeys(schema.names) if column in (*wanted, columns.answer)]
        # Where a column is missing, an empty table with all of them lets the message list what there is.
        table = pq.read_table(file, columns=present, memory_map=True) if complete else schema.empty_table()
    except (pa.ArrowException, OSError, RecursionError) as error:
        raise DataError(
            f"{file} cannot be read as Parquet ({line_of(error)}). Fetch or write the file again"
        ) from error
    return table, _names_in_schema(file, schema, columns.label)


def instruction_columns(columns: Columns) -> tuple[str, ...]:
    """Returns the columns that a table of instructions may have."""
    return (columns.prompt, columns.completion, columns.options, columns.messages, columns.domain, columns.split)


def is_of_instructions(kind: Kind | None, names: Sequence[str], columns: Columns) -> bool:
    """Returns whether a table with columns of these names is to be read as instructions."""
    return kind == "instructions" or (kind is None and holds_instructions(names, columns))


def records_of(part: Part, columns: Columns) -> Records:
    """Returns the rows of a table of instructions. Raises DataError where it has no such columns or is damaged."""
    if not holds_instructions(part.table.column_names, columns):
        raise DataError(
            f"{part.name} has neither the columns {columns.prompt!r} and {columns.completion!r} nor a column"
            f" {columns.messages!r}. Its columns: {_have(part)}. Say which they are with --set data.columns.prompt=NAME and"
            " --set data.columns.completion=NAME. For labelled texts, leave data.kind at auto"
        )
    present = [column for column in instruction_columns(columns) if column in part.table.column_names]
    try:
        rows = part.table.select(list(dict.fromkeys(present))).to_pylist()
    except (pa.ArrowException, ValueError) as error:
        raise DataError(
            f"{part.name} cannot be read ({line_of(error)}). Write the file again; texts in UTF-8"
        ) from error
    return Records(part.name, rows, part.split)


def from_parts(
    parts: list[Part],
    *,
    name: str,
    kind: Kind | None,
    columns: Columns,
    class_names: tuple[str, ...] | None,
    domain_names: tuple[str, ...] | None,
    test_fraction: float,
    form: str,
    left_out: tuple[LeftOut, ...] = (),
) -> Source:
    """A source of the rows of these tables, one after another. form: what kind of tables they are.

    Raises DataError naming the first wrong row.
    """
    if is_of_instructions(kind, parts[0].table.column_names, columns):
        return from_records(
            [records_of(part, columns) for part in parts],
            name=name,
            columns=columns,
            domain_names=domain_names,
            test_fraction=test_fraction,
            form=form,
            left_out=left_out,
        )
    kind = kind or _kind(parts[0], columns)
    payload = columns.image if kind == "image" else columns.text
    for part in parts:
        _require(part, payload, "image" if kind == "image" else "text")
        _require(part, columns.label, "label")
    parts = [
        replace(part, table=_plain(part, (payload, columns.label, columns.domain, columns.split))) for part in parts
    ]
    for part in parts:
        _check_payload(part, payload, kind)
    starts = np.cumsum([0, *(len(part.table) for part in parts)])
    items = TableItems(tuple(parts), payload, tuple(int(start) for start in starts[:-1]))
    missing_n = np.concatenate([_missing(part.table.column(payload)) for part in parts])
    if missing_n.any():
        raise DataError(f"{items.where(int(missing_n.argmax()))} has no {kind}. Remove the row")
    labels_n, names = label_ids(_values(parts, columns.label), class_names, items.where)
    told = [f"{kind}s in column {shown(payload)!r}, labels in {shown(columns.label)!r}"]
    domains_n: Ints | None = None
    found_domains: tuple[str, ...] = ("all",)
    if _in_all(parts, columns.domain, "domain"):
        domains_n, found_domains = domain_ids(_values(parts, columns.domain), domain_names, items.where)
        told.append(f"domains in {shown(columns.domain)!r}")
    splits_n = None
    if _in_all(parts, columns.split, "split"):
        splits_n = split_ids(_values(parts, columns.split), items.where)
        _refuse_contradiction(splits_n, items, columns.split)
        told.append(f"splits in {shown(columns.split)!r}")
    elif any(part.split is not None for part in parts):
        splits_n = _splits_of_parts(parts)
        told.append("splits told by the names of the parts")
    else:
        refuse_likely_splits([Path(part.name).stem for part in parts], name)
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
        layout=f"{form}: {', '.join(told)}",
        left_out=left_out,
        answers=_column_of_answers(parts, columns.answer) if kind == "text" else None,
    )


def _column_of_answers(parts: list[Part], column: str) -> Callable[[], Sequence[Any]] | None:
    """Reads the column when it is asked for: what stands in it is nothing to those who need no answers."""
    has = [part.name for part in parts if column in part.table.column_names]
    return partial(_read_answers, parts, column) if has else None


def _read_answers(parts: list[Part], column: str) -> Sequence[Any]:
    for part in parts:
        check_once(part.name, part.table.column_names, (column,))
        if column not in part.table.column_names:
            raise DataError(
                f"{part.name} has no column {shown(column)!r}, other parts have one. Give every file an answer for each row,"
                " or none"
            )
    return _values([replace(part, table=_plain(part, (column,))) for part in parts], column)


def check_once(table: str, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Raises DataError where a wanted column stands more than once."""
    doubled = next((column for column in wanted if found.count(column) > 1), None)
    if doubled is not None:
        raise DataError(
            f"{table} has {found.count(doubled)} columns named {shown(doubled)!r}; allowed is one. Rename or remove the others"
        )


def one_list_of_names(names_by_part: Mapping[str, tuple[str, ...] | None]) -> tuple[str, ...] | None:
    """The class names that all parts list, None where none does. Raises DataError where two lists differ."""
    told = {part: names for part, names in names_by_part.items() if names}
    first = next(iter(told), None)
    other = next((part for part, names in told.items() if names != told[str(first)]), None)
    if other is not None:
        raise DataError(
            f"{first} and {other} list different class names ({listed(told[str(first)])}; {listed(told[other])}), so a label"
            " has two meanings. Write both with the same list"
        )
    return told[first] if first is not None else None


def _splits_of_parts(parts: list[Part]) -> Ints:
    without = next((part for part in parts if part.split is None), None)
    if without is not None:
        other = next(part for part in parts if part.split is not None)
        raise DataError(
            f"the name of {other.name} tells a split, that of {without.name} does not. Name both by their splits (train, val,"
            " test), or move one elsewhere"
        )
    return np.concatenate([np.full(len(part.table), part.split, np.int64) for part in parts])


def _refuse_contradiction(splits_n: Ints, items: TableItems, column: str) -> None:
    """Raises DataError naming the first row whose split column differs from the split that its file's name tells.

    Where all files are called train, or all test, the name says nothing: a lone train.parquet may bring its own splits.
    """
    if len({part.split for part in items.parts}) == 1:
        return
    lengths = [len(part.table) for part in items.parts]
    told_n = np.repeat([-1 if part.split is None else part.split for part in items.parts], lengths)
    wrong_n = (told_n >= 0) & (told_n != splits_n)
    if wrong_n.any():
        row = int(wrong_n.argmax())
        raise DataError(
            f"{items.where(row)} is of the split {SPLITS[splits_n[row]]} by its column {shown(column)!r}, but of"
            f" {SPLITS[told_n[row]]} by the name {items.place(row)[0].name}. Correct the column, remove it, or rename what"
            " holds the row, so that both say the same"
        )


def _in_all(parts: list[Part], column: str, role: Literal["domain", "split"]) -> bool:
    """Whether the tables have this column. Raises DataError where only some have it."""
    has = [part.name for part in parts if column in part.table.column_names]
    if has and len(has) < len(parts):
        without = next(part.name for part in parts if part.name not in has)
        raise DataError(
            f"{has[0]} has a column {column!r}, {without} does not. Give every file a {role} for each row, or none"
        )
    return bool(has)


def _plain(part: Part, columns: Sequence[str]) -> pa.Table:
    """The table with dictionary-encoded and view columns as plain ones, and its texts known to be valid Unicode."""
    table = part.table
    for column in dict.fromkeys(column for column in (*columns, PROVENANCE) if column in table.column_names):
        values = table.column(column)
        try:
            if pa.types.is_dictionary(values.type):
                values = values.cast(values.type.value_type)
            if pa.types.is_string_view(values.type) or pa.types.is_binary_view(values.type):
                values = values.cast(pa.large_string() if pa.types.is_string_view(values.type) else pa.large_binary())
            if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
                values.validate(full=True)
        except pa.ArrowException as error:
            raise DataError(
                f"column {column!r} of {part.name} cannot be read ({line_of(error)}). Write the file again; texts in UTF-8"
            ) from error
        table = table.set_column(table.column_names.index(column), column, values)
    return table


def _missing(values: pa.ChunkedArray) -> NDArray[np.bool_]:
    """(n,) whether a row holds nothing: neither bytes nor a path, in a pair of them."""
    missing_n: NDArray[np.bool_] = values.is_null().to_numpy()
    if pa.types.is_struct(values.type) and len(values):
        found, path = (
            np.concatenate([chunk.field(name).is_null().to_numpy(zero_copy_only=False) for chunk in values.chunks])
            for name in ("bytes", "path")
        )
        missing_n = missing_n | (found & path)
    return missing_n


def _kind(part: Part, columns: Columns) -> Kind:
    if columns.image in part.table.column_names:
        return "image"
    if columns.text in part.table.column_names:
        return "text"
    raise DataError(
        f"{part.name} has neither a column {columns.image!r} of images nor a column {columns.text!r} of texts. Its"
        f" columns: {_have(part)}. Say which one it is with"
        " --set data.columns.image=NAME or --set data.columns.text=NAME"
    )


def _require(part: Part, column: str, role: Literal["image", "text", "label"]) -> None:
    if column not in part.table.column_names:
        raise DataError(
            f"{part.name} has no column {column!r}, which should hold the {role} of each row. Its columns: {_have(part)}."
            f" Say which one it is with --set data.columns.{role}=NAME"
        )


def _have(part: Part) -> str:
    return listed(part.table.column_names, _COLUMNS) or "none"


def _check_payload(part: Part, column: str, kind: Kind) -> None:
    found = part.table.schema.field(column).type
    if kind == "text":
        fits, allowed = pa.types.is_string(found) or pa.types.is_large_string(found), "string"
    else:
        fits = _is_pair(found) or pa.types.is_binary(found) or pa.types.is_large_binary(found)
        allowed = "binary (encoded images), or {bytes, path} pairs"
    if not fits:
        raise DataError(
            f"column {column!r} of {part.name} is of type {shown(str(found))}; allowed for {kind}s is {allowed}."
            f" Convert it, or name another column with --set data.columns.{kind}=NAME"
        )


def _is_pair(found: pa.DataType) -> bool:
    """Whether it is a {bytes, path} pair of Hugging Face datasets."""
    if not pa.types.is_struct(found) or sorted(inner.name for inner in found) != ["bytes", "path"]:
        return False
    content, path = found.field("bytes").type, found.field("path").type
    binary = pa.types.is_binary(content) or pa.types.is_large_binary(content) or pa.types.is_null(content)
    return bool(binary and (pa.types.is_string(path) or pa.types.is_large_string(path) or pa.types.is_null(path)))


def _values(parts: list[Part], column: str) -> list[Any]:
    def listed(values: pa.ChunkedArray) -> list[Any]:
        plain = pa.types.is_integer(values.type) or pa.types.is_string(values.type)
        found: list[Any] = values.to_numpy().tolist() if plain and not values.null_count else values.to_pylist()
        return found

    return [value for part in parts for value in listed(part.table.column(column))]


def _names_in_schema(file: Path, schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """Class names that Hugging Face datasets left in the metadata of a Parquet file."""
    stored = (schema.metadata or {}).get(b"huggingface")
    if stored is None:
        return None
    try:
        feature = json.loads(stored)["info"]["features"].get(label, {})
        names = feature.get("names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"the `huggingface` metadata of {file} is damaged ({type(error).__name__}: {line_of(error)}). Write the file"
            " again, or list the class names in a README.json beside it, without that metadata"
        ) from error
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise DataError(
            f"the `huggingface` metadata of {file} holds class names that are no list of names ({shown(repr(names))})."
            " Write the file again"
        )
    return tuple(names) if names else None


def read_readme(path: Path) -> Mapping[str, Any]:
    """Returns the README.json of a dataset; nothing where there is none. Raises DataError for another document."""
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({line_of(error)}). Correct it, or remove it") from error
    if not isinstance(told, dict):
        raise DataError(
            f"{path} holds a {type(told).__name__}; allowed is an object with `class_names` and `domains`. Correct it, or"
            " remove it"
        )
    return told


def names_listed(readme: Mapping[str, Any], key: str, folder: Path) -> tuple[str, ...] | None:
    """Returns the names that a README.json lists under this key, if any. Raises DataError for what is no list of names."""
    names = readme.get(key)
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{key!r} in {folder / 'README.json'} is not a list of names. Correct it, or remove it")
    return tuple(names)


def line_of(error: BaseException) -> str:
    """What an error says, on one line."""
    lines = str(error).strip().splitlines()
    return shown(lines[0], 200) if lines else type(error).__name__
