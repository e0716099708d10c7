"""Opens what a user points at: images, labelled texts or instructions, in folders, files or Hugging Face datasets."""

from pathlib import Path
from typing import Literal

from lamina.data.arrays import from_arrays
from lamina.data.csv_files import open_csv
from lamina.data.digits import open_digits
from lamina.data.folders import open_folder
from lamina.data.hugging_face import open_hub, open_saved
from lamina.data.instruction_files import open_instruction_file, open_instruction_folder
from lamina.data.records import Columns, LeftOut, Source
from lamina.data.tables import open_parquet
from lamina.data.tree import Leftovers, is_hidden
from lamina.errors import ConfigError, DataError
from lamina.types import Kind

__all__ = ["Columns", "Source", "from_arrays", "open_source"]


def open_source(
    where: str | Path,
    *,
    kind: Literal["auto", "image", "text", "instructions"] = "auto",
    columns: Columns | None = None,
    test_fraction: float = 0.2,
) -> Source:
    """The labelled items at `where`, undecoded:

    - a folder with one folder of images per class, or SPLIT/CLASS, DOMAIN/CLASS, DOMAIN/SPLIT/CLASS;
    - a Parquet file, or a folder of them (or of a `data` folder of them);
    - a CSV file of texts;
    - a JSON lines file or a JSON file of instructions, or a folder of them (or of folders of them);
    - a folder written with a Hugging Face dataset's save_to_disk, or `hf:owner/name` for one on the hub;
    - `digits`, scikit-learn's handwritten digits.

    With kind `auto`, a table with prompts and completions, or with messages, holds instructions; else a table with an image
    column holds images, and any other texts. Where nothing is marked as test,
    `test_fraction` of the training items of each class and domain becomes the test; the choice is always the same.

    Raises DataError if it is not there, not one of these, or if a row is wrong; ConfigError for a wrong argument.
    """
    if kind not in ("auto", "image", "text", "instructions"):
        raise ConfigError(f"data.kind is {kind!r}; allowed are auto, image, text and instructions")
    columns = columns or Columns()
    wanted: Kind | None = None if kind == "auto" else kind
    try:
        str(where).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{str(where)!a} is not valid Unicode. Rename it") from error
    try:
        path = Path(where).expanduser()
        return _open(path, str(where), kind=wanted, columns=columns, test_fraction=test_fraction)
    except (OSError, RuntimeError) as error:
        # No permission, a name that is too long, links in a circle, a user without a home, a file that went away.
        raise DataError(f"{where} cannot be read ({error}). Correct the path, or make it readable") from error


def _open(path: Path, where: str, *, kind: Kind | None, columns: Columns, test_fraction: float) -> Source:
    if where == "digits" and not path.exists():
        if kind in ("text", "instructions"):
            raise DataError(f"`digits` holds images, but the kind asked for is {kind}. Leave data.kind at auto")
        return open_digits(test_fraction)
    if where.startswith("hf:"):
        return open_hub(where[3:], kind=kind, columns=columns, test_fraction=test_fraction)
    if not path.exists():
        raise DataError(
            f"{where} does not exist. Allowed are a folder of class folders, a Parquet, CSV or JSON lines file, a folder of"
            " such files, a saved Hugging Face dataset, hf:owner/name, and `digits`"
        )
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            return open_parquet([path], name=path.stem, kind=kind, columns=columns, test_fraction=test_fraction)
        if path.suffix.lower() == ".csv":
            return open_csv(path, kind=kind, columns=columns, test_fraction=test_fraction)
        if path.suffix.lower() in (".json", ".jsonl"):
            if kind in ("image", "text"):
                raise DataError(
                    f"{where} is a file of instructions, but the kind asked for is {kind}. Put labelled texts in a CSV or"
                    " Parquet file; for instructions, leave data.kind at auto"
                )
            return open_instruction_file(path, columns=columns, test_fraction=test_fraction)
        raise DataError(
            f"{where} is a file of type {path.suffix or 'unknown'!r}; allowed are .parquet, .csv, .jsonl and .json."
            " For images, point at the folder that holds one folder per class"
        )
    if not path.is_dir():
        raise DataError(f"{where} is neither a file nor a folder (a pipe, socket or device). Point at a file or folder")
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return open_saved(path, kind=kind, columns=columns, test_fraction=test_fraction)
    for folder in (path, path / "data"):
        files, left_out = _parquet_files(folder, path) if folder.is_dir() else ([], ())
        if files:
            return open_parquet(
                files,
                name=path.resolve().name,
                kind=kind,
                columns=columns,
                test_fraction=test_fraction,
                left_out=left_out,
            )
    if kind in (None, "instructions"):
        asked = kind == "instructions"
        found = open_instruction_folder(path, asked=asked, columns=columns, test_fraction=test_fraction)
        if found is not None:
            return found
    return open_folder(path, kind=kind or "image", test_fraction=test_fraction)


def _parquet_files(folder: Path, root: Path) -> tuple[list[Path], tuple[LeftOut, ...]]:
    """The Parquet files of a folder, in order of their names, and what else is there. folder: `root`, or one in it."""
    files, left = [], Leftovers()
    beside = [path for path in root.iterdir() if path != folder] if folder != root else []
    for path in sorted([*folder.iterdir(), *beside]):
        if is_hidden(path.name):
            left.add("hidden and system files and folders", str(path.relative_to(root)))
        elif path.parent == folder and path.suffix.lower() == ".parquet" and path.is_file():
            files.append(path)
        elif path != folder / "README.json":
            left.add("files and folders beside the Parquet files", str(path.relative_to(root)))
    return files, left.found()
