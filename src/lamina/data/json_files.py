"""Strict JSON: files with one document, and files with one object a line."""

import json
from pathlib import Path
from typing import Any, NoReturn

from lamina.data.names import shown
from lamina.errors import DataError


def read_json(file: Path) -> Any:
    """Returns the document of a JSON file in UTF-8.

    Raises DataError for what is no JSON: NaN and infinities, keys that repeat, and nesting that is too deep among it.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not text in UTF-8 ({error.reason}). Save it in that encoding") from error
    return _parsed(text, str(file))


def read_json_lines(file: Path) -> tuple[list[Any], list[int]]:
    """Returns the documents of a JSON lines file in UTF-8, and the line of each, counted from 1. Blank lines are skipped.

    Raises DataError, naming file and line, for what is no JSON.
    """
    records, lines = [], []
    with file.open("rb") as content:
        # Only \n ends a line: U+2028 may stand inside a text.
        for number, line in enumerate(content, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file}:{number} is not text in UTF-8 ({error.reason}). Save the file in that encoding"
                ) from error
            if text.strip():
                records.append(_parsed(text, f"{file}:{number}"))
                lines.append(number)
    return records, lines


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_number, object_pairs_hook=_object)
    except RecursionError as error:
        raise DataError(f"{where} is nested too deep. Write a list of flat objects") from error
    except ValueError as error:
        what = str(error)
        if isinstance(error, json.JSONDecodeError) and "\n" not in text.strip():
            what = f"{error.msg}, character {error.pos + 1}"
        raise DataError(f"{where} is not valid JSON ({shown(what, 200)}). Correct it, or write it again") from error


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"the key {shown(twice)!r} is there more than once")
    return found
