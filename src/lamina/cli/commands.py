"""The `lamina` command: its subcommands, and how failures are reported. Importing it imports no torch, so help is quick."""

import errno
import os
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from lamina import __version__
from lamina.cli import compare, data, demo, export, methods, model, predict, presets, report, run, serve
from lamina.errors import ConfigError, LaminaError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Continual learning of pre-trained transformers with low-rank adapters: learn task after task, forget little.\n\n"
    "Start with `lamina demo`, then `lamina create MODEL` and `lamina learn MODEL FOLDER`.",
)
data_app = typer.Typer(no_args_is_help=True, help="Check data before a run.")
LIVING, RUNS = "A model that keeps learning", "Runs: experiments on a whole stream"
app.command("demo")(demo.demo)
app.command("create", rich_help_panel=LIVING)(model.create)
app.command("learn", rich_help_panel=LIVING)(model.learn)
app.command("predict", rich_help_panel=LIVING)(predict.predict)
app.command("evaluate", rich_help_panel=LIVING)(run.evaluate)
app.command("serve", rich_help_panel=LIVING)(serve.serve)
app.command("export", rich_help_panel=LIVING)(export.export)
app.command("import", rich_help_panel=LIVING)(export.import_)
app.command("status", rich_help_panel=LIVING)(model.status)
app.command("history", rich_help_panel=LIVING)(model.history)
app.command("gate", rich_help_panel=LIVING)(model.gate)
app.command("rollback", rich_help_panel=LIVING)(model.rollback)
app.command("configure", rich_help_panel=LIVING)(model.configure)
app.command("forget", rich_help_panel=LIVING)(model.forget)
app.command("prune", rich_help_panel=LIVING)(model.prune)
app.command("run", rich_help_panel=RUNS)(run.run)
app.command("resume", rich_help_panel=RUNS)(run.resume)
app.command("report", rich_help_panel=RUNS)(report.report)
app.command("compare", rich_help_panel=RUNS)(compare.compare)
app.command("presets", rich_help_panel=RUNS)(presets.presets)
app.add_typer(presets.ledger, name="ledger", rich_help_panel=RUNS)
app.command("methods")(methods.methods)
app.add_typer(data_app, name="data")
data_app.command("check")(data.check)
app.command("train-task", hidden=True)(run.train_task)

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""In the messages of PyTorch."""
REMEDIES = {
    errno.ENOSPC: "Make room and give the command again; what was saved before is intact.",
    errno.EDQUOT: "Make room and give the command again; what was saved before is intact.",
    errno.EROFS: "Choose a directory that can be written to.",
    errno.EACCES: "Check the permissions of the path, or choose another.",
    errno.EPERM: "Check the permissions of the path, or choose another.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ENOENT: "Check the path.",
    errno.ENOTDIR: "Check the path.",
    errno.EISDIR: "Check the path.",
    errno.ELOOP: "Check the path: it is a symbolic link to itself.",
    errno.EMFILE: "Raise the limit of open files, for example with `ulimit -n 4096`.",
}


def main() -> NoReturn:
    """Run the command. A failure that the user can act on is one message and exit code 2."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):  # a terminal without UTF-8 shows "?" for what it lacks
                stream.reconfigure(errors="replace")
        _refuse_renamed_flags(sys.argv[1:])
        app(standalone_mode=True)
    except LaminaError as error:
        _fail(str(error))
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(_sentence(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise
        _fail(
            f"out of memory: {' '.join(str(error).split())[:200]}. Use smaller settings of training.batch_size, "
            f"evaluation.batch_size or backbone.image_size, or a smaller backbone."
        )
    sys.exit(0)


@app.command("run-cell", hidden=True)
def run_cell(directory: Path, held: bool = False, attempt: str = "", parent: int = 0) -> None:
    """Run one cell of a comparison. `lamina compare` starts this command, here or on other machines."""
    from lamina.compare import cell_run

    def command(arguments: list[str]) -> int:
        sys.argv = ["lamina", *arguments]
        try:
            main()
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else 1

    raise typer.Exit(cell_run.run(directory, command, held=held, attempt=attempt, parent=parent))


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _sentence(error: OSError) -> str:
    """Returns what an operation on a file failed at, and what to do."""
    where = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    what = error.strerror or str(error) or type(error).__name__
    return f"{where + ': ' if where else ''}{what}. {REMEDIES.get(error.errno or 0, '')}".strip()


def _refuse_renamed_flags(arguments: list[str]) -> None:
    """Raises ConfigError naming the new flag for one of an older version."""
    renamed = {"--joined": "--joint", "--merge": "--merging", "--head": "--classifier"}
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag in renamed:
            raise ConfigError(f"{flag} is now called {renamed[flag]}. `lamina run --help` lists all flags.")


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
    del version
    # Read by the OpenMP runtime when torch is imported, which no command has done yet. Threads that wait would otherwise spin,
    # and stall other processes on the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
