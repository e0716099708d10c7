"""`lamina export` and `lamina import`: a model in the formats of other libraries, and adapters that were trained elsewhere."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lamina.cli.model import print_gate
from lamina.cli.predict import Where
from lamina.errors import ConfigError

if TYPE_CHECKING:
    from lamina.export import Exported

Format = Literal["peft", "peft-tasks", "merged", "onnx"]


def export(
    model: Annotated[
        Path,
        typer.Argument(help="Directory of a model, or of a finished run of a language model.", metavar="MODEL"),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write. It must not exist.", metavar="OUT")],
    format: Annotated[
        Format,
        typer.Option(
            "--format",
            "-f",
            help="peft: one adapter of everything. peft-tasks: one per task. merged: a whole checkpoint of transformers. "
            "onnx: a graph for onnxruntime.",
        ),
    ],
    inputs: Annotated[
        Path | None,
        typer.Option(
            help="Images (a file or folder), or a file with a text or prompt per line, to compare on. Default: the model's "
            "probes or the run's test examples, else generated ones."
        ),
    ] = None,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="Write the base model beside the adapters, in transformers' layout.")
    ] = False,
) -> None:
    """Write a model in the format of another library. The files are read again by that library alone, and their scores,
    and the text that a language model generates, compared with those of the model; nothing is written if they differ.

    Examples:

        lamina export groceries groceries-onnx --format onnx

        lamina export groceries groceries-tasks --format peft-tasks --with-base

        lamina export runs/instructions-olora-seed0 instructions --format merged
    """
    from lamina.export import export_merged, export_onnx, export_peft, export_tasks

    if with_base and format not in ("peft", "peft-tasks"):
        raise ConfigError(
            f"--with-base goes with adapters, and --format {format} holds the base already. Leave it out."
        )
    print(f"comparing {model} with what is written ...", flush=True)
    if format == "peft":
        done = export_peft(model, out, inputs=inputs, with_base=with_base)
    elif format == "peft-tasks":
        done = export_tasks(model, out, inputs=inputs, with_base=with_base)
    else:
        done = (export_merged if format == "merged" else export_onnx)(model, out, inputs=inputs)
    _tell(done)


def import_(
    model: Where,
    adapter: Annotated[Path, typer.Argument(help="Folder of a PEFT LoRA adapter.", metavar="ADAPTER")],
    name: Annotated[str, typer.Option("--name", "-n", help="Name of the task.")],
    classes: Annotated[
        str, typer.Option("--classes", help="Its classes, in the order of the adapter's outputs: a,b,...")
    ],
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="Labelled data of these classes, where the model needs their statistics."),
    ] = None,
    same_base: Annotated[
        bool, typer.Option("--same-base", help="The adapter's base is that of the model, whatever its name.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Accept the adapter whatever the gate finds. It is recorded.")
    ] = False,
) -> None:
    """Make a PEFT LoRA adapter that was trained elsewhere a task of a model.

    It takes the place of that task's training; everything before and after it is as for any task, the gate included.

    Exit code 0: imported. 1: the gate refused. 2: an error.

    Example:

        lamina import groceries adapters/tools --name tools --classes hammer,saw,drill --data tools/
    """
    from lamina.export import import_adapter
    from lamina.model import GateRefused

    try:
        names = [one.strip() for one in classes.split(",")]
        learnt = import_adapter(model, adapter, name=name, classes=names, data=data, same_base=same_base, force=force)
    except GateRefused as refused:
        print_gate(refused.gate)
        print(f"refused: {model} is as it was before. --force accepts the adapter anyway.", file=sys.stderr)
        sys.exit(1)
    if learnt.gate is not None:
        print_gate(learnt.gate)
    measured = learnt.card.figures.accuracy
    told = "" if measured is None else f", accuracy {measured:.1%} on held-out examples"
    print(f"{model}: version {learnt.card.version}, task {name!r} with {len(names)} classes from {adapter}{told}")
    print(
        f"Next: lamina predict {shlex.quote(str(model))} FILE, or lamina rollback {shlex.quote(str(model))} to undo it"
    )


def _tell(done: "Exported") -> None:
    for one in done.differences:
        print(f"  {one}")
    for note in done.notes:
        print(f"note: {note}")
    size = sum(path.stat().st_size for path in done.path.rglob("*") if path.is_file())
    print(f"{done.path}: {done.format}, {size / 1e6:.1f} MB. Use it:\n")
    print("\n".join(f"    {line}" for line in done.code.splitlines()))
