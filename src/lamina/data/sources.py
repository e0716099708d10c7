"""Opens what a user points at: a folder of images, Parquet or CSV files, a Hugging Face dataset, or `digits`."""

from pathlib import Path
from typing import Literal

from lamina.data.arrays import from_arrays
from lamina.data.digits import open_digits
from lamina.data.folders import open_folder
from lamina.data.records import Columns, Kind, Source
from lamina.data.tables import open_csv, open_hub, open_parquet, open_saved
from lamina.errors import ConfigError, DataError

__all__ = ["Columns", "Source", "from_arrays", "open_source"]


def open_source(
    where: str | Path,
    *,
    kind: Literal["auto", "image", "text"] = "auto",
    columns: Columns | None = None,
    test_fraction: float = 0.2,
) -> Source:
    """The labelled items at `where`, undecoded:

    - a folder with one folder of images per class, or SPLIT/CLASS, DOMAIN/CLASS, DOMAIN/SPLIT/CLASS;
    - a Parquet file, or a folder of them (or of a `data` folder of them);
    - a CSV file of texts;
    - a folder written with a Hugging Face dataset's save_to_disk, or `hf:owner/name` for one on the hub;
    - `digits`, scikit-learn's handwritten digits.

    With kind `auto`, a table with an image column holds images, and any other texts. Where nothing is marked as test,
    `test_fraction` of the training items of each class and domain becomes the test; the choice is always the same.

    Raises DataError if it is not there, not one of these, or if a row is wrong; ConfigError for a wrong argument.
    """
    if kind not in ("auto", "image", "text"):
        raise ConfigError(f"data.kind is {kind!r}; allowed are auto, image and text")
    columns = columns or Columns()
    wanted: Kind | None = None if kind == "auto" else kind
    path = Path(where).expanduser()
    if str(where) == "digits" and not path.exists():
        if wanted == "text":
            raise DataError("`digits` holds images, but the kind asked for is text. Leave data.kind at auto")
        return open_digits(test_fraction)
    if str(where).startswith("hf:"):
        return open_hub(str(where)[3:], kind=wanted, columns=columns, test_fraction=test_fraction)
    if not path.exists():
        raise DataError(
            f"{where} does not exist. Allowed are a folder of class folders, a Parquet or CSV file, a folder of Parquet"
            " files, a saved Hugging Face dataset, hf:owner/name, and `digits`"
        )
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            return open_parquet([path], name=path.stem, kind=wanted, columns=columns, test_fraction=test_fraction)
        if path.suffix.lower() == ".csv":
            return open_csv(path, kind=wanted, columns=columns, test_fraction=test_fraction)
        raise DataError(
            f"{where} is a file of type {path.suffix or 'unknown'!r}; allowed are .parquet and .csv."
            " For images, point at the folder that holds one folder per class"
        )
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return open_saved(path, kind=wanted, columns=columns, test_fraction=test_fraction)
    files = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    if files:
        name = path.resolve().name
        return open_parquet(files, name=name, kind=wanted, columns=columns, test_fraction=test_fraction)
    return open_folder(path, kind=wanted or "image", test_fraction=test_fraction)
