"""`lamina compare`: a grid of runs, and one table of it."""

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamina.cli.progress import GridWatcher
from lamina.cli.tables import print_table
from lamina.errors import ConfigError

if TYPE_CHECKING:
    from lamina.compare import Outcome, Study
    from lamina.compare.runners import Runner


class RunnerName(StrEnum):
    local = "local"
    slurm = "slurm"
    ray = "ray"


SHOWN = ("Final", "By", "Forgetting", "Minus", "Runs")
"""Beginnings of the titles of columns that fit a terminal."""


def compare(
    grid: Annotated[
        list[Path] | None, typer.Argument(help="YAML file: methods, seeds, class orders, streams, settings.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="In place of a file: the protocol of a paper; `lamina presets` lists them.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="With --preset: its data.")] = None,
    backbone: Annotated[
        str | None, typer.Option("--backbone", "-b", help="With --preset: another backbone than the protocol's.")
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            help="With --preset: try it small on any data: this share of its epochs and examples, short texts, one seed."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory of the tables. Default: runs/NAME of the grid.")
    ] = None,
    cells: Annotated[Path | None, typer.Option(help="Directory of the runs. Default: runs/cells.")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Number of runs in parallel.")] = None,
    only: Annotated[
        str | None, typer.Option(help="Only cells whose name contains this, or matches this pattern (*, ?).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and their state, and exit.")] = False,
    no_run: Annotated[bool, typer.Option("--no-run", help="Write the tables from finished runs only.")] = False,
    keep_code: Annotated[
        bool, typer.Option("--keep-code", help="Accept finished runs of older code. The table says so.")
    ] = False,
    records: Annotated[
        Path | None,
        typer.Option(help="File with the records of finished runs. They are read from it, and new ones added to it."),
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Also write the Markdown table into this page, between its two markers.")
    ] = None,
    runner: Annotated[
        RunnerName, typer.Option(help="Where runs are made: processes of this machine, or jobs of a cluster.")
    ] = RunnerName.local,
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="For --runner slurm, such as partition=gpu or account=me. May be repeated."
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="For --runner ray: address of the cluster. Default: this machine's."),
    ] = None,
) -> None:
    """Run a grid of methods, seeds and streams, and write one table of the results.

    Finished cells are not run again, and interrupted ones continue. A cell is run anew if its settings, data, weights or code
    changed. Stop it at any time and give the same command again. `lamina report` compares finished runs.

    Exit code 1 if a cell failed or was not started; the other cells still run.
    """
    from lamina.compare import Outcome, Study, lease, table

    if preset is not None:
        grid = [_grid_of(preset, grid or [], out, data, backbone, scale)]
        out = grid[0].parent
    elif data or backbone or scale is not None:
        raise ConfigError("--data, --backbone and --scale go with --preset; a grid file sets these itself")
    if not grid:
        raise ConfigError("`lamina compare` takes a grid (a YAML file), or --preset NAME --data FOLDER")
    if len(grid) > 1 or grid[0].is_dir():
        raise ConfigError(
            f"`lamina compare` takes one grid (a YAML file), not {' '.join(map(str, grid))}. To compare finished runs: "
            f"lamina report {' '.join(map(str, grid))}"
        )
    if page is not None:
        table.check_page(page)
    if slurm and runner is not RunnerName.slurm:
        raise ConfigError(f"--slurm {slurm[0]} goes with --runner slurm")
    if ray is not None and runner is not RunnerName.ray:
        raise ConfigError(f"--ray {ray} goes with --runner ray")
    study = Study(grid[0], out=out, cells=cells, only=only, keep_code=keep_code, records=records)
    if dry_run:
        if runner is RunnerName.local:
            _runner(study, runner, jobs, [], "")  # refuses what this machine lacks
        for state, name, place in study.listing():
            held = place is not None and state != "done" and lease.holder(place.folder)
            print(
                f"{'at work' if held else state or 'waits for the search':21}{name}"
                + (f"  {place.folder}" if place else "")
            )
        return
    command = f"lamina compare {grid[0]}" + (" --keep-code" if keep_code else "")
    command += f" --records {records}" if records else ""
    outcome = Outcome() if no_run else _work(study, _runner(study, runner, jobs, slurm or [], ray or "auto"))
    content = study.content(command)
    written = table.write(content, study.out, page)
    columns = [k for k, title in enumerate(content.accuracies) if title.startswith(SHOWN)]
    for section in content.sections:
        titles = ("method", *(content.accuracies[k].lower() for k in columns))
        rows = [(line.name, *(line.accuracies[k] for k in columns)) for line in section.lines]
        if rows:
            print_table(titles, rows, title=section.name)
        else:
            print(f"{section.name}: {section.caption}")
    for warning in content.warnings:
        print(f"\n{warning}")
    print(f"\n{study.out / 'table'}.md, .csv, .tex, .json\nOpen the table: {written.resolve()}")
    _report_failures(outcome)


def _grid_of(
    name: str, grid: list[Path], out: Path | None, data: str | None, backbone: str | None, scale: float | None
) -> Path:
    """Returns the grid file of a preset, which is written for this data. Raises ConfigError where something is missing, or the
    data is not that of the protocol."""
    from lamina.compare import preset

    found = preset.load(name)
    if grid:
        raise ConfigError(f"--preset {name} and {grid[0]}: give one of them")
    if data is None:
        raise ConfigError(f"--preset {name} needs --data. It expects: {found.file.data.what}.")
    folder = out or Path("runs") / (name if scale is None else f"{name}-{scale:g}")
    return preset.write_grid(found, folder, data, backbone, 1.0 if scale is None else scale)


def _runner(study: "Study", name: RunnerName, jobs: int | None, slurm: list[str], ray: str) -> "Runner":
    """Returns what runs the cells. Raises ConfigError where it is not at hand, or this machine has too few cores or GPUs."""
    from lamina.compare import runners

    needed = [study.grid.resources(row) for row in study.grid.rows]
    if name is RunnerName.slurm:
        wrong = [text for text in slurm if "=" not in text]
        if wrong:
            raise ConfigError(f"--slurm {wrong[0]}: must be KEY=VALUE, such as partition=gpu")
        given = {key: value for key, _, value in (text.partition("=") for text in slurm)}
        return runners.Slurm(study.store.folder / ".slurm", jobs, given, study.grid.settings.jobs)
    if name is RunnerName.ray:
        return runners.Ray(ray, jobs, needed)
    return runners.local(jobs or study.grid.settings.jobs, needed)


def _work(study: "Study", runner: "Runner") -> "Outcome":
    """Returns the outcome of running all cells. If it is asked to stop, says how to continue and exits with code 130."""
    from lamina.engine.loop import Interrupted

    try:
        with GridWatcher(study.grid.name) as watch:
            return study.work(watch, runner)
    except (Interrupted, KeyboardInterrupt) as stopped:
        going_on = str(stopped) or "all progress is saved."
        print(f"stopped; {going_on} Continue with: lamina {shlex.join(sys.argv[1:])}", file=sys.stderr)
        sys.exit(130)


def _report_failures(outcome: "Outcome") -> None:
    """Name the cells that failed or did not start. Exits with code 1 if there are any."""
    for failure in outcome.failures:
        print(f"FAILED {failure.name}, log {failure.log}:\n{failure.why}", file=sys.stderr)
    if outcome.not_started:
        print(
            f"{len(outcome.not_started)} cells not started: lamina's code changed meanwhile. Give the command again; with "
            "--keep-code it keeps what is finished.",
            file=sys.stderr,
        )
    if outcome.failures or outcome.not_started:
        raise typer.Exit(1)
