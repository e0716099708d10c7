"""`lamina report`: a page about finished runs."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    directories: Annotated[list[Path], typer.Argument(help="Directories of finished runs. Several are compared.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File to write. Default: report.html in the run, or here for several runs."),
    ] = None,
) -> None:
    """Write one self-contained HTML page about one run, or one that compares several runs."""
    from lamina import report, runs

    page = out or (directories[0] / "report.html" if len(directories) == 1 else Path("report.html"))
    written = report.write([runs.read_record(directory) for directory in directories], page)
    print(f"Open the report: {written.resolve()}")
