"""`lamina export` and `lamina import`: a model in the formats of other libraries, and adapters that were trained elsewhere."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lamina.cli.predict import Where
from lamina.errors import ConfigError

if TYPE_CHECKING:
    from lamina.export import Exported

Format = Literal["peft", "peft-tasks", "merged", "onnx"]


def export(
    model: Where,
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
            help="Images (a file or folder), or a file with a text per line, to compare on. Default: the model's probes, else "
            "generated ones."
        ),
    ] = None,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="Write the base model beside the adapters, in transformers' layout.")
    ] = False,
) -> None:
    """Write a model in the format of another library. The files are read again by that library alone, and their scores
    compared with those of the model; nothing is written if they differ.

    Examples:

        lamina export groceries groceries-onnx --format onnx

        lamina export groceries groceries-peft --format peft --with-base
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


def _tell(done: "Exported") -> None:
    for one in done.differences:
        print(f"  {one}")
    for note in done.notes:
        print(f"note: {note}")
    size = sum(path.stat().st_size for path in done.path.rglob("*") if path.is_file())
    print(f"{done.path}: {done.format}, {size / 1e6:.1f} MB. Use it:\n")
    print("\n".join(f"    {line}" for line in done.code.splitlines()))
