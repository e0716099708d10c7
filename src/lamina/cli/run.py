"""`lamina run`, `resume` and `evaluate`: one run."""

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from lamina.cli.progress import Watcher, speaks
from lamina.cli.tables import print_evaluation, print_summary, print_table
from lamina.errors import ConfigError, RunError

if TYPE_CHECKING:
    from lamina.config import RunConfig
    from lamina.engine.loop import Event

T = TypeVar("T")
Settings = Annotated[list[str] | None, typer.Option("--set", help="Any setting: key.path=value. Repeatable.")]
Moved = Annotated[str | None, typer.Option("--data", "-d", help="Where the same data lies now, if it was moved.")]


def run(
    file: Annotated[Path | None, typer.Argument(help="YAML file with settings. Flags and --set override it.")] = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="Method; `lamina methods` lists them. Default: lamina.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="Folder of class folders, Parquet, CSV or JSON lines file(s), `hf:owner/name`, or `digits`.",
        ),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option("--backbone", "-b", help="`nano`, a folder or file with weights, or a hub name.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Height and width of the input in pixels.")] = None,
    scenario: Annotated[str | None, typer.Option("--scenario", "-s", help="class, domain, task or mixed.")] = None,
    tasks: Annotated[
        int | None, typer.Option("--tasks", "-t", help="Number of tasks that the classes are split into.")
    ] = None,
    joint: Annotated[bool, typer.Option("--joint", help="Joint training: all tasks at once, as a reference.")] = False,
    per_class: Annotated[int | None, typer.Option(help="Maximum number of training examples per class.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over each task's training data.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the adapters.")] = None,
    init: Annotated[
        str | None, typer.Option(help="Weights that a task's training starts from: chain, fresh or merged.")
    ] = None,
    merging: Annotated[
        str | None, typer.Option(help="Weight merging over the tasks: none, mean, ema or weighted.")
    ] = None,
    drift: Annotated[
        str | None,
        typer.Option(help="Drift compensation of stored statistics: none, linear, linear+local or random (a control)."),
    ] = None,
    classifier: Annotated[
        str | None,
        typer.Option(help="own (the method's), or a unified classifier: ncm, lda, ridge, aligned, lda+ridge or gram."),
    ] = None,
    rehearsal: Annotated[
        int | None,
        typer.Option(help="Training examples of each old class that are kept and trained on again. Default: 0."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of initial weights, batch order and augmentation.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda. auto: the GPU if there is one.")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", "-j", help="Number of tasks trained in parallel, for methods that learn tasks independently."
        ),
    ] = None,
    track: Annotated[
        list[str] | None,
        typer.Option(help="Also log to tensorboard, mlflow, wandb (offline) or trackio. Repeatable.", metavar="NAME"),
    ] = None,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory of the run. Default: runs/DATA-METHOD-seedN.")
    ] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print every setting as YAML and exit.")] = False,
) -> None:
    """Learn a stream of tasks with one method. The run can be stopped or killed at any time, and resumed.

    Examples:

        lamina run --method inflora --data photos/ --tasks 5

        lamina run --data pacs.parquet --scenario domain --set training.lr=1e-3 --print-config > pacs.yaml

        lamina run pacs.yaml --seed 1 --out runs/pacs-1
    """
    from lamina import config as configuration
    from lamina import runs
    from lamina.engine.world import leave

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
        "rehearsal.per_class": rehearsal,
        "tracking.to": track or None,
        "seed": seed,
        "device": device,
        "jobs": jobs,
    }
    overrides = [(key, value) for key, value in flags.items() if value is not None]
    overrides += [configuration.parse_override(text) for text in settings or []]
    config = runs.load_config(file, overrides)
    if tasks is not None and config.stream.scenario in ("domain", "mixed"):
        raise ConfigError(
            f"--tasks {tasks}: it splits classes, and with stream.scenario = {config.stream.scenario!r} a task is "
            + (
                "a domain. Choose some with --set stream.domains=[...]"
                if config.stream.scenario == "domain"
                else "named in stream.plan"
            )
        )
    if print_config:
        print(configuration.to_yaml(config), end="")
        return
    where = out or default_directory(config)
    with Watcher(config.name) as watch:
        record = stoppable(_resume(where), lambda: runs.create(config, where, watch), where)
    leave()
    if speaks():
        print_summary(record, where)


def resume(
    directory: Annotated[Path, typer.Argument(help="Directory of a run that was stopped or killed.")],
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Number of tasks trained in parallel. Default: as before.")
    ] = None,
    data: Moved = None,
) -> None:
    """Continue a run from its last checkpoint. On the same CPU, the result is the same as without the interruption."""
    from lamina import runs
    from lamina.engine.world import leave
    from lamina.runs.directory import finished as find_finished

    with Watcher(directory.resolve().name) as watch:
        finished = find_finished(directory) is not None
        record = stoppable(_resume(directory), lambda: runs.resume(directory, watch, jobs, data), directory)
    leave()
    if speaks():
        if finished:
            print(f"{directory} was finished already; nothing was done.", file=sys.stderr)
        print_summary(record, directory)


def evaluate(
    directory: Annotated[Path, typer.Argument(help="Directory of a run, which need not be finished, or of a model.")],
    labelled: Annotated[
        str | None, typer.Argument(help="For a model: labelled data to measure it on.", metavar="[DATA]")
    ] = None,
    split: Annotated[str, typer.Option(help="test, val or train.")] = "test",
    data: Moved = None,
    fall_back: Annotated[
        bool, typer.Option("--fall-back", help="If the newest checkpoint is damaged, measure the one before it.")
    ] = False,
) -> None:
    """Measure a run on every task it has finished, or a model on labelled data.

    Of data for a model its test split is used, or all of it where it has none. Classes are matched by name.
    """
    from lamina import model, runs
    from lamina.maths.metrics import wilson_interval
    from lamina.types import SPLITS

    if (directory / "model.json").is_file():
        if labelled is None:
            raise RunError(
                f"{directory} is a model: name the data to measure it on, `lamina evaluate {directory} DATA`."
            )
        if split != "test" or data is not None or fall_back:
            raise RunError(
                "--split, --data and --fall-back are for runs; a model is measured on the data that is named. Leave them out."
            )
        with Watcher(directory.resolve().name, brief=True) as watch:
            print_evaluation(model.Model(directory).evaluate(labelled, watch))
        return
    if labelled is not None:
        raise RunError(f"{directory} is a run, whose data is known. If it was moved, give its place with --data.")
    found = next((known for known in SPLITS if known == split), None)
    if found is None:
        raise RunError(f"--split {split!r}: choose one of {', '.join(SPLITS)}.")
    with Watcher(directory.resolve().name) as watch:
        measured = runs.evaluate(directory, found, watch, source=data, fall_back=fall_back)
    rows = []
    for task in measured:
        low, high = wilson_interval(task.correct, task.total)
        interval = f"{low:.1%} to {high:.1%}"
        rows.append((task.task, f"{task.accuracy:.1%}", interval, f"{task.task_aware_accuracy:.1%}", str(task.total)))
    print_table(("task", "accuracy", "95 % interval", "task-aware", "examples"), rows)
    print(f"mean over tasks: {sum(task.accuracy for task in measured) / len(measured):.1%}")


def train_task(directory: Path, number: int, parent: int) -> None:
    """Train one task of a run. `lamina run --jobs` starts this command, with the number of its own process."""
    from lamina import runs

    said = time.monotonic()

    def say(_: object, event: "Event") -> None:
        nonlocal said
        if event.phase == "train" and time.monotonic() - said > 0.5:
            said = time.monotonic()
            print(f"{event.done}/{event.total}", flush=True)

    stoppable(_resume(directory), lambda: runs.train_task(directory, number, parent, say))


def default_directory(config: "RunConfig") -> Path:
    """Returns the directory of a run for which none is given. It is named after the data, the method and the seed."""
    source = Path(config.data.source).expanduser()
    data = source.resolve().name if source.is_dir() else source.stem
    return Path("runs") / f"{data}-{config.name}-seed{config.seed}"


def _resume(where: Path) -> str:
    return f"lamina resume {shlex.quote(str(where))}"


def stoppable(again: str, work: Callable[[], T], run: Path | None = None) -> T:
    """Returns the result of some work. If it is asked to stop, says which command continues it and exits with code 130.

    run: its directory, if it is a run: before its first checkpoint nothing is saved.
    """
    from lamina.engine.loop import Interrupted

    try:
        return work()
    except Interrupted:
        if speaks():
            saved = run is None or any(run.glob("checkpoints/*"))
            told = (
                "stopped; all progress is saved. Continue with"
                if saved
                else "stopped before anything was saved. Begin again with"
            )
            print(f"{told}: {again}", file=sys.stderr)
        sys.exit(130)
