"""`lamina demo`: five tasks of handwritten digits, learnt in several ways and compared in one report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamina.cli.progress import Watcher
from lamina.cli.run import stoppable
from lamina.cli.tables import print_records

if TYPE_CHECKING:
    from lamina.config import RunConfig
    from lamina.record import Record

SETTINGS: dict[str, Any] = {
    "data.source": "digits",
    "data.augment": "crop",
    "data.crop_scale": [0.6, 1.0],
    "stream.tasks": 5,
    "backbone.image_size": 32,
    "training.epochs": 15,
    "training.batch_size": 32,
    "training.head_lr": 3e-3,
}
METHODS: dict[str, dict[str, Any]] = {
    "finetune": {"training.lr": 5e-4},
    "prototype": {},
    "inflora": {"training.lr": 2e-3, "method.epsilon": 0.99},
    "lamina": {},
}


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the runs and the report.")] = Path("demo"),
) -> None:
    """Learn handwritten digits, two at a time, with four methods, and compare them in one report. Works offline.

    It takes one to three minutes on two cores. A demo that was interrupted continues where it was; a finished one is shown
    again (remove its directory to start anew).
    """
    from lamina import report, runs

    print(
        "Digits of scikit-learn: 5 tasks of 2 digits, on the embedded backbone. Earlier digits are never seen again.\n"
        f"{len(METHODS)} methods, one to three minutes on two cores.",
        flush=True,
    )
    records = []
    for number, (name, tuned) in enumerate(METHODS.items(), 1):
        config = runs.load_config(None, [*SETTINGS.items(), *tuned.items()])
        record = _run_or_resume(config, out / name.replace(" + ", "-").lower(), name).model_copy(update={"name": name})
        print(
            f"{number}/{len(METHODS)} {name}: final accuracy {record.metrics.final_accuracy:.1%}, "
            f"{record.cost.total_seconds or 0.0:.0f} s",
            flush=True,
        )
        records.append(record)
    page = report.write(records, out / "report.html", title="lamina demo: handwritten digits, two at a time")
    print_records(records)
    print(f"\nOpen the report: {page.resolve()}")


def _run_or_resume(config: "RunConfig", where: Path, name: str) -> "Record":
    from lamina import runs

    with Watcher(name, brief=True) as watch:
        if (where / "config.json").exists():
            return stoppable(where, lambda: runs.resume(where, watch))
        return stoppable(where, lambda: runs.create(config, where, watch))
