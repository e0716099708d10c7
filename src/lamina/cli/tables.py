"""Tables on the terminal. Names of tasks and classes are printed as they are, never as rich's markup."""

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from lamina.model import Evaluation
    from lamina.record import Record

WIDTH = 100
"""Columns where there is no terminal."""


def print_table(
    titles: Sequence[str], rows: Iterable[Sequence[str]], *, title: str | None = None, left: int = 1, gap: int = 0
) -> None:
    """Print a table. left: number of columns that are aligned left, from the first; the others are numbers. gap: empty lines
    between rows."""
    table = Table(box=None, pad_edge=False, header_style="", title=Text(title) if title else None, title_justify="left")
    for number, name in enumerate(titles):
        table.add_column(name, justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
        for _ in range(gap):
            table.add_row()
    Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDTH).print(table)


def print_records(records: "Iterable[Record]") -> None:
    """Print the figures of finished runs, a row each."""
    rows = [
        (
            record.name,
            f"{record.metrics.final_accuracy:.1%}",
            f"{record.metrics.average_accuracy:.1%}",
            f"{record.metrics.forgetting:.1%}",
            _share(record.metrics.task_aware_accuracy),
            f"{record.cost.total_seconds or 0.0:.0f}",
            f"{record.cost.trainable_parameters or 0:,}",
        )
        for record in records
    ]
    print()
    print_table(("method", "final accuracy", "average", "forgetting", "task-aware", "seconds", "trained"), rows)


def _share(value: float) -> str:
    """Returns a share as text; a dash where it was not measured."""
    return "–" if math.isnan(value) else f"{value:.1%}"


def print_summary(record: "Record", where: Path) -> None:
    """Print the figures of a finished run, and where its record and report lie."""
    print_records([record])
    if record.cost.kept_examples:
        print(
            f"\nTraining examples kept: {record.cost.kept_examples} (at most {record.cost.kept_per_class} per class and task)"
        )
    print(f"\nRecord: {where / 'results.json'}\nOpen the report: {(where / 'report.html').resolve()}")


def size_of(count: int) -> str:
    """Returns a number of bytes in the unit that suits it."""
    for unit, factor in (("GB", 2**30), ("MB", 2**20), ("kB", 2**10)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count} bytes"


def print_evaluation(found: "Evaluation") -> None:
    """Print what a model predicts for labelled data, class by class."""
    from lamina.maths.metrics import wilson_interval

    rows = []
    for name, counts in found.figures.classes.items():
        low, high = wilson_interval(counts.correct, counts.total)
        rows.append((name, f"{counts.correct / counts.total:.1%}", f"{low:.1%} to {high:.1%}", str(counts.total)))
    print_table(("class", "accuracy", "95 % interval", "examples"), rows)
    total = sum(counts.total for counts in found.figures.classes.values())
    error, rouge = found.figures.calibration_error, found.figures.rouge_l
    more = f", calibration error {error:.3f}" if error is not None else ""
    more += f", ROUGE-L of generated texts {rouge:.3f}" if rouge is not None else ""
    print(f"\naccuracy {found.figures.accuracy:.1%} on {total} examples{more}")
    if error is None:
        print("correct: the best option, or exactly the text that is wanted; calibration does not apply")
    if found.unknown:
        print(f"not measured, since the model does not know them: {', '.join(found.unknown)}")
    if found.skipped:
        print(f"damaged and left out: {', '.join(found.skipped)}")
