"""CSV files of texts."""

import csv
from pathlib import Path

import pyarrow as pa

from lamina.data.records import Columns, Source
from lamina.data.tables import PROVENANCE, Part, check_once, from_parts, is_of_instructions, line_of
from lamina.errors import DataError
from lamina.types import Kind

_LONGEST_CELL = 2**28
_MISSING = ("", "na", "n/a", "#n/a", "nan", "null", "none")
"""What programs write for a number that is not there."""


def open_csv(file: Path, *, kind: Kind | None, columns: Columns, test_fraction: float) -> Source:
    """A CSV file of texts with a header, in UTF-8. Raises DataError if it is damaged or lacks a column.

    Labels are kept as they are written, unless all are whole numbers (0, 1, ...), which are class ids.
    """
    if kind == "image":
        raise DataError(
            f"{file} is a CSV file, which can only hold texts. Point at a folder of images or a Parquet file"
        )
    wanted = (columns.text, columns.label, columns.domain, columns.split, PROVENANCE)
    header = _header(file)
    if is_of_instructions(kind, header, columns) and (kind is not None or columns.text not in header):
        raise DataError(
            f"{file} is a CSV file, which can only hold labelled texts. Write instructions as JSON lines (.jsonl) or Parquet;"
            " for labelled texts, leave data.kind at auto"
        )
    check_once(file.name, header, wanted)
    present = [column for column in header if column in (*wanted, columns.answer)]
    if columns.text in present and columns.label in present:
        table = _read(file, present)
        labels = table.column_names.index(columns.label)
        table = table.set_column(labels, columns.label, _numbers_where_all_are(table.column(labels)))
    else:
        # An empty table with all of the columns lets the message list what there is.
        table = pa.table({column: pa.array([], pa.string()) for column in header})
    # The file's name says nothing here: a lone train.csv must still be able to bring its own split column.
    return from_parts(
        [Part(file.name, table, None, file.parent)],
        name=file.stem,
        kind="text",
        columns=columns,
        class_names=None,
        domain_names=None,
        test_fraction=test_fraction,
        form="CSV file",
    )


def _header(file: Path) -> list[str]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            return next(csv.reader(lines), [])
    except UnicodeDecodeError as error:
        raise _not_utf8(file) from error
    except (OSError, csv.Error) as error:
        raise _damaged(file, error) from error


def _read(file: Path, present: list[str]) -> pa.Table:
    from pyarrow import csv as arrow_csv

    try:
        return arrow_csv.read_csv(
            file,
            # A cell must fit into a block.
            read_options=arrow_csv.ReadOptions(block_size=max(2**16, min(file.stat().st_size + 1, _LONGEST_CELL))),
            parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
            convert_options=arrow_csv.ConvertOptions(
                include_columns=present, column_types=dict.fromkeys(present, pa.string())
            ),
        )
    except (pa.ArrowException, OSError) as error:
        if "UTF8" in str(error):
            raise _not_utf8(file) from error
        if "straddl" in str(error):
            raise DataError(
                f"{file} has a cell of more than {_LONGEST_CELL >> 20} MB, or a quotation mark that is never closed."
                " Shorten the text, or close the quotation"
            ) from error
        raise _damaged(file, error) from error


def _numbers_where_all_are(labels: pa.ChunkedArray) -> pa.ChunkedArray:
    """The labels as integers if all are, apart from missing ones; else as they are written."""
    import pyarrow.compute as pc

    trimmed = pc.utf8_trim_whitespace(labels)
    missing = pc.is_in(pc.utf8_lower(trimmed), pa.array(_MISSING))
    # Of at most 18 digits, which fit into 64 bits.
    number = pc.match_substring_regex(trimmed, r"^(0|-?[1-9][0-9]{0,17})$")
    if not pc.all(pc.or_(number, missing)).as_py() or not pc.any(number).as_py():
        return labels
    return pc.if_else(missing, None, trimmed).cast(pa.int64())


def _not_utf8(file: Path) -> DataError:
    return DataError(f"{file} is not text in UTF-8. Save it in that encoding (in a spreadsheet: `CSV UTF-8`)")


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(
        f"{file} cannot be read as CSV ({line_of(error)}). Correct the line, quoting texts that hold commas"
    )
