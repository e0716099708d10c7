"""`lamina presets` and `lamina ledger`: the protocols of the papers, and what was measured in them."""

from pathlib import Path
from typing import Annotated

import typer

from lamina.errors import ConfigError, LaminaError

LEDGER = Path("docs/ledger.jsonl")


def presets(
    name: Annotated[str | None, typer.Argument(help="Show this preset: data, settings with their sources.")] = None,
) -> None:
    """List the papers' protocols, or show the settings of one with the source of each.

    `lamina compare --preset NAME --data FOLDER` runs one.
    """
    from lamina.compare import preset as found

    if name is None:
        width = max(map(len, found.names()))
        print(f"{'preset'.ljust(width)}  protocol")
        for each in found.names():
            print(f"{each.ljust(width)}  {found.load(each).file.title}")
        print("\n`lamina presets NAME` shows one in full. `lamina compare --preset NAME --data FOLDER` runs it;")
        print("with --scale 0.02 and --backbone nano it runs small, on any data.")
        return
    one = found.load(name)
    file, settings = one.file, one.settings
    print(f"{name}: {file.title}\n{file.paper}\n\nData: {file.data.what}.")
    expected = file.data.model_dump(exclude={"what"}, exclude_none=True)
    print("  checked: " + ", ".join(f"{key} {value}" for key, value in expected.items()))
    print("\nSettings and their sources:")
    width = max(len(f"{key} = {value}") for key, value in settings.items() if key in file.sources)
    for key, source in file.sources.items():
        if key in settings:
            print(f"  {f'{key} = {settings[key]}'.ljust(min(width, 64))}  {source}")
    print("\nRows: " + ", ".join(file.grid["methods"]))
    for note in file.notes:
        print(f"Note: {note}")
    for value in file.reported:
        spread = "" if value.spread is None else f" ± {value.spread}"
        stream = f"{value.stream}, " if value.stream else ""
        print(
            f"Published: {stream}{value.row}, {value.figure.replace('_', ' ')} {value.value}{spread} ({value.source})"
        )


ledger = typer.Typer(no_args_is_help=True, help="Published values beside ours, in the papers' protocols.")
File = Annotated[Path, typer.Option("--ledger", help="File of the ledger.")]


@ledger.command("add")
def add(
    runs: Annotated[list[Path], typer.Argument(help="Directories of finished runs.")],
    preset: Annotated[str, typer.Option(help="The preset that they followed.")],
    file: File = LEDGER,
) -> None:
    """Add runs to the ledger, if they really followed the preset: its settings, its backbone, its data."""
    from lamina.compare import ledger as book
    from lamina.compare import preset as found

    one, problems = found.load(preset), []
    for run in runs:
        try:
            entry = book.entry_of(one, run)
            new = book.add(file, entry)
        except LaminaError as error:
            problems.append(f"{run}: {error}" if str(run) not in str(error) else str(error))
            continue
        print(f"{run}: {entry.row}, seed {entry.seed}" + ("" if new else ": is in the ledger already"))
    if problems:
        raise ConfigError("\n".join(problems))


@ledger.command("page")
def page(
    out: Annotated[Path, typer.Argument(help="Markdown file to write.")] = Path("docs/ledger.md"), file: File = LEDGER
) -> None:
    """Write the ledger as a page."""
    from lamina.compare import ledger as book
    from lamina.files import replace_text

    out.parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, book.page(book.read(file)))
    print(out)
