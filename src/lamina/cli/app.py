"""The `lamina` command. Importing this module imports no torch, so that help comes at once."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from lamina import __version__
from lamina.cli.progress import GridWatcher, Watcher
from lamina.errors import LaminaError, RunError

if TYPE_CHECKING:
    from lamina.config import RunConfig
    from lamina.engine.loop import Event
    from lamina.record import Record

T = TypeVar("T")
app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Continual learning of pre-trained transformers with low-rank adapters: learn task after task, forget little.\n\n"
    "Start with `lamina demo`, then `lamina run --data FOLDER --tasks 5`.",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at data before learning from it.")
app.add_typer(data_app, name="data")
out_console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 100)

DEMO_SETTINGS: dict[str, Any] = {
    "data.source": "digits",
    "data.augment": "crop",
    "data.crop_scale": [0.6, 1.0],
    "stream.tasks": 5,
    "backbone.image_size": 32,
    "training.epochs": 15,
    "training.batch_size": 32,
    "training.head_lr": 3e-3,
}
DEMO_METHODS: dict[str, dict[str, Any]] = {
    "finetune": {"training.lr": 5e-4},
    "prototype": {},
    "inflora": {"training.lr": 2e-3, "method.epsilon": 0.99},
    "lamina": {},
}
"""Each with its own best settings, found by the same search on a fifth of the training images: see docs/results/demo.md. Those
of lamina are the same for every stream."""


def main() -> NoReturn:
    """Run the command; a failure the user can act on is one message and exit code 2."""
    try:
        app(standalone_mode=True)
    except LaminaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (PermissionError, IsADirectoryError, NotADirectoryError) as error:
        print(f"error: {error.filename}: {error.strerror}. Check the path and its rights.", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"lamina {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the four runs and the report.")] = Path(
        "demo"
    ),
) -> None:
    """Learn handwritten digits two at a time, in four ways, and compare them in one report. Offline, about six minutes.

    A demo that was interrupted goes on where it was; one that is finished is shown again (remove its directory to
    start anew).
    """
    from lamina import report, runs

    print(
        "1,797 handwritten digits of scikit-learn, 5 tasks of 2 digits, on the embedded backbone; old digits never come back."
    )
    records = []
    for method, tuned in DEMO_METHODS.items():
        config = runs.load_config(None, [*DEMO_SETTINGS.items(), ("method.name", method), *tuned.items()])
        records.append(_run_or_resume(config, out / method, method))
    page = report.write(records, out / "report.html", title="lamina demo: handwritten digits, two at a time")
    _table(records)
    print(f"\nOpen the report: {page.resolve()}")


@app.command("run")
def run_command(
    file: Annotated[Path | None, typer.Argument(help="YAML file with settings. Flags and --set go on top.")] = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="`lamina methods` lists them. Default: lamina.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", "-d", help="Folder of class folders, Parquet or CSV file(s), `hf:owner/name`, or `digits`."
        ),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option("--backbone", "-b", help="`nano`, a folder or file, or a hub name.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the input in pixels.")] = None,
    scenario: Annotated[str | None, typer.Option("--scenario", "-s", help="class, domain, task or mixed.")] = None,
    tasks: Annotated[int | None, typer.Option("--tasks", "-t", help="Split the classes into this many tasks.")] = None,
    joint: Annotated[bool, typer.Option("--joint", help="Joint training: all tasks at once (an upper bound).")] = False,
    per_class: Annotated[int | None, typer.Option(help="Train on at most this many examples of each class.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over each task's data.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the adapters.")] = None,
    init: Annotated[
        str | None, typer.Option(help="Where a task's training starts: chain (the method's own), fresh, merged.")
    ] = None,
    merging: Annotated[
        str | None, typer.Option(help="Weight merging over the tasks: none (as trained), mean, ema, weighted.")
    ] = None,
    drift: Annotated[
        str | None, typer.Option(help="Drift compensation of stored statistics: none, linear, linear+local.")
    ] = None,
    classifier: Annotated[
        str | None, typer.Option(help="own (the method's), or a unified one: ncm, lda, ridge, aligned, lda+ridge.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of initial weights, batches and augmentation.")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", "-j", help="Train this many tasks at a time, for methods whose tasks do not depend on each other."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting: key.path=value. Repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory of the run. Default: runs/DATA-METHOD-SEED.")
    ] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print every setting as YAML and stop.")] = False,
) -> None:
    """Learn a stream of tasks with one method, in a directory that can be killed and resumed.

    Examples:

        lamina run --method inflora --data photos/ --tasks 5

        lamina run --data pacs.parquet --scenario domain --set training.lr=1e-3 --print-config > pacs.yaml

        lamina run pacs.yaml --seed 1 --out runs/pacs-1
    """
    from lamina import config as configuration
    from lamina import runs

    flags = {
        "method.name": method,
        "data.source": data,
        "data.per_class": per_class,
        "backbone.name": backbone,
        "backbone.image_size": image_size,
        "stream.scenario": scenario,
        "stream.tasks": tasks,
        "stream.joint": joint or None,
        "training.epochs": epochs,
        "training.lr": lr,
        "consolidation.init": init,
        "consolidation.merging": merging,
        "consolidation.drift": drift,
        "consolidation.classifier": classifier,
        "seed": seed,
        "jobs": jobs,
    }
    overrides = [(key, value) for key, value in flags.items() if value is not None]
    overrides += [configuration.parse_override(text) for text in settings or []]
    config = runs.load_config(file, overrides)
    if print_config:
        print(configuration.to_yaml(config), end="")
        return
    name = config.method["name"] + ("-joint" if config.stream.joint else "")
    where = out or Path("runs") / f"{Path(config.data.source).stem}-{name}-seed{config.seed}"
    with Watcher(name) as watch:
        record = _working(where, lambda: runs.create(config, where, watch))
    _summary(record, where)


@app.command()
def resume(
    directory: Annotated[Path, typer.Argument(help="Directory of a run that was stopped or killed.")],
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Train this many tasks at a time. Default: as before.")
    ] = None,
) -> None:
    """Go on with a run from its last checkpoint, to the same result as if it had never been stopped."""
    from lamina import runs

    with Watcher(directory.name) as watch:
        record = _working(directory, lambda: runs.resume(directory, watch, jobs))
    _summary(record, directory)


@app.command("train-task", hidden=True)
def train_task(directory: Path, number: int, parent: int) -> None:
    """Train one task of a run, for the process of the run: what it starts if given --jobs."""
    from lamina import runs

    said = time.monotonic()

    def say(_: object, event: "Event") -> None:
        nonlocal said
        if event.phase == "train" and time.monotonic() - said > 0.5:
            said = time.monotonic()
            print(f"{event.done}/{event.total}", flush=True)

    _working(directory, lambda: runs.train_task(directory, number, parent, say))


@app.command()
def evaluate(
    directory: Annotated[Path, typer.Argument(help="Directory of a run; it need not be finished.")],
    split: Annotated[str, typer.Option(help="test, val or train.")] = "test",
) -> None:
    """Measure the newest model of a run on every task it has learnt."""
    from lamina import runs
    from lamina.maths.metrics import wilson_interval
    from lamina.types import SPLITS

    found = next((known for known in SPLITS if known == split), None)
    if found is None:
        raise RunError(f"--split {split!r}: choose one of {', '.join(SPLITS)}.")
    rows = runs.evaluate(directory, found)
    table = Table(box=None, pad_edge=False, header_style="")
    for title in ("task", "accuracy", "95 % interval", "task-aware", "examples"):
        table.add_column(title, justify="left" if title == "task" else "right")
    for row in rows:
        low, high = wilson_interval(row["correct"], row["total"])
        correct, known = row["correct"] / row["total"], row["task_aware_correct"] / row["total"]
        table.add_row(row["task"], f"{correct:.1%}", f"{low:.1%} to {high:.1%}", f"{known:.1%}", str(row["total"]))
    out_console.print(table)
    print(f"mean over tasks: {sum(r['correct'] / r['total'] for r in rows) / len(rows):.1%}")


@app.command("report")
def report_command(
    directories: Annotated[list[Path], typer.Argument(help="Directories of finished runs; several are compared.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write. Default: report.html in the only run, or here.")
    ] = None,
) -> None:
    """Write one self-contained HTML page about one run, or comparing several."""
    from lamina import record, report

    page = out or (directories[0] / "report.html" if len(directories) == 1 else Path("report.html"))
    written = report.write([record.read(directory) for directory in directories], page)
    print(f"Open the report: {written.resolve()}")


@app.command()
def compare(
    grid: Annotated[Path, typer.Argument(help="YAML file: methods, seeds, class orders, streams, settings.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory of the tables. Default: runs/NAME of the grid.")
    ] = None,
    cells: Annotated[Path | None, typer.Option(help="Directory of the runs. Default: runs/cells.")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Runs side by side.")] = None,
    only: Annotated[
        str | None, typer.Option(help="Only cells whose name holds this, or fits this pattern (*, ?).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and what is done, and stop.")] = False,
    no_run: Annotated[bool, typer.Option("--no-run", help="Only write the tables, from what is done.")] = False,
    keep_code: Annotated[
        bool, typer.Option("--keep-code", help="Take finished runs of older code too; the table says so.")
    ] = False,
    records: Annotated[
        Path | None,
        typer.Option(
            help="A file that keeps of finished runs what the table needs: they are taken from it, and noted in it."
        ),
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Write the Markdown into this page too, between its two markers.")
    ] = None,
) -> None:
    """Run a grid of methods, seeds and streams, and make one table of it.

    A cell that is done is never run again, an interrupted one goes on; one whose settings, data, weights or code changed is
    run anew. Stop it anywhere and give the same command again.

    Exit code 1 if a cell failed; the others are run all the same.
    """
    from lamina.compare import Outcome, Study, table
    from lamina.engine.loop import Interrupted

    if page is not None:
        table.check_page(page)
    study = Study(grid, out=out, cells=cells, only=only, keep_code=keep_code, records=records)
    if dry_run:
        for state, name, place in study.listing():
            print(f"{state or 'waits for the search':21}{name}" + (f"  {place.folder}" if place else ""))
        return
    command = f"lamina compare {grid}" + (" --keep-code" if keep_code else "")
    command += f" --records {records}" if records else ""
    outcome = Outcome()
    if not no_run:
        try:
            with GridWatcher(study.grid.name) as watch:
                outcome = study.work(jobs, watch)
        except (Interrupted, KeyboardInterrupt):
            print(f"stopped; what was learnt so far is saved. Go on with: {command}", file=sys.stderr)
            sys.exit(130)
    told = study.content(command)
    written = table.write(told, study.out, page)
    few = [
        k
        for k, title in enumerate(told.accuracies)
        if title.startswith(("Final", "Micro", "Forgetting", "Minus", "Runs"))
    ]
    for section in told.sections:
        shown = Table(box=None, pad_edge=False, header_style="", title=section.name, title_justify="left")
        for title in ("method", *(told.accuracies[k].lower() for k in few)):
            shown.add_column(title, justify="left" if title == "method" else "right")
        for line in section.lines:
            shown.add_row(line.name, *(line.accuracies[k] for k in few))
        out_console.print(shown)
    print(f"\n{study.out / 'table.md'}, {study.out / 'table.json'}\nOpen the table: {written.resolve()}")
    for failure in outcome.failures:
        print(f"FAILED {failure.name}, log {failure.log}:\n{failure.why}", file=sys.stderr)
    if outcome.not_started:
        print(
            f"{len(outcome.not_started)} cells not started: lamina's code changed meanwhile. Give the command again.",
            file=sys.stderr,
        )
    if outcome.failures or outcome.not_started:
        raise typer.Exit(1)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its paper and settings.")] = None,
) -> None:
    """List the methods, or show one: its paper, where it fits, what it needs, its settings."""
    from lamina.errors import ConfigError
    from lamina.methods import METHODS
    from lamina.methods.base import describe

    if name is None:
        for facts in map(describe, METHODS.values()):
            print(f"{facts['name']}\n    {facts['advice']}\n    {facts['authors']}, {facts['venue']}: {facts['title']}")
            print("".join(f"    {line}\n" for line in _needs(facts)))
        return
    if name not in METHODS:
        import difflib

        near = difflib.get_close_matches(name, METHODS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"no method {name!r}. There are: {', '.join(METHODS)}.{hint}")
    facts = describe(METHODS[name])
    print(
        f"{facts['name']}: {facts['title']}\n{facts['authors']}, {facts['venue']}, {facts['link']}\n\n{facts['advice']}\n"
    )
    print("\n".join([*_needs(facts), ""]))
    print("Settings (give them as --set method.NAME=VALUE, or under `method:` in YAML):")
    for key, setting in facts["settings"].items():
        print(f"  {key} = {setting['default']}\n      {' '.join(setting['what'].split())}")
    if facts["around"]:
        print("\nIts own defaults of settings that every method has:")
        for key, value in facts["around"].items():
            print(f"  {key} = {value}")
    if facts["departures"]:
        print("\nDepartures from the paper:")
        for departure in facts["departures"]:
            print(f"  - {departure}")


def _needs(facts: Mapping[str, Any]) -> list[str]:
    """What `describe` says a method fits and asks of its user, a line each."""
    alone = "; tasks can be trained side by side (--jobs)" if facts["independent"] else ""
    horizon = "the number of tasks helps it" if facts["horizon"] else "no number of tasks"
    return [
        f"fits: {', '.join(facts['scenarios'])}-incremental streams{alone}",
        f"needs: {horizon}; {facts['stored_examples']} stored samples per class",
        f"growth: {facts['growth']}",
        f"operations grow: {facts['operations']}",
    ]


@data_app.command("check")
def data_check(
    source: Annotated[str, typer.Argument(help="What `lamina run --data` would be given.")],
    kind: Annotated[str, typer.Option(help="auto, image or text.")] = "auto",
    min_per_class: Annotated[int, typer.Option(help="Name classes with fewer training examples than this.")] = 5,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="data.columns.label=..., data.test_fraction=...")
    ] = None,
) -> None:
    """Audit data: classes, counts per split, damaged files, exact duplicates across splits and tasks, scarce classes.

    Exit code 1 if problems were found, 0 if not.
    """
    from lamina import config as configuration
    from lamina import data

    overrides = [configuration.parse_override(text) for text in settings or []]
    section = configuration.load(
        None,
        [("data.source", source), ("data.kind", kind), *overrides],
        method_settings={"lamina": configuration.MethodConfig},
    ).data
    found = data.audit(
        data.open_source(
            section.source,
            kind=section.kind,
            columns=data.Columns(**section.columns.model_dump()),
            test_fraction=section.test_fraction,
        ),
        min_per_class=min_per_class,
    )
    print(data.render(found))
    if found.problems:
        raise typer.Exit(1)


def _run_or_resume(config: "RunConfig", where: Path, label: str) -> "Record":
    from lamina import runs

    with Watcher(label) as watch:
        if (where / "config.json").exists():
            return _working(where, lambda: runs.resume(where, watch))
        return _working(where, lambda: runs.create(config, where, watch))


def _working(where: Path, work: Callable[[], T]) -> T:
    """Do it; if asked to stop, say how to go on and exit with 130."""
    from lamina.engine.loop import Interrupted

    try:
        return work()
    except Interrupted:
        print(f"stopped; everything learnt so far is saved. Go on with: lamina resume {where}", file=sys.stderr)
        sys.exit(130)


def _summary(record: "Record", where: Path) -> None:
    _table([record])
    print(f"\nRecord: {where / 'results.json'}\nOpen the report: {(where / 'report.html').resolve()}")


def _table(records: "Sequence[Record]") -> None:
    table = Table(box=None, pad_edge=False, header_style="")
    for title in ("method", "final accuracy", "average", "forgetting", "task-aware", "seconds", "trained"):
        table.add_column(title, justify="left" if title == "method" else "right")
    for record in records:
        found, cost = record.metrics, record.cost
        table.add_row(
            record.name,
            f"{found.final_accuracy:.1%}",
            f"{found.average_accuracy:.1%}",
            f"{found.forgetting:.1%}",
            f"{found.task_aware_accuracy:.1%}",
            f"{cost.total_seconds or 0.0:.0f}",
            f"{cost.trainable_parameters or 0:,}",
        )
    print()
    out_console.print(table)


if __name__ == "__main__":
    main()
