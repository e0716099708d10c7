"""Progress of runs: a bar on a terminal, otherwise a plain line now and then. Names are never read as rich's markup."""

import os
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

if TYPE_CHECKING:
    from lamina.data.streams import Stream
    from lamina.engine.loop import Event

DOING = {
    "load": "decoding images",
    "begin": "preparing",
    "parallel": "tasks trained",
    "train": "training",
    "end": "consolidating",
    "evaluate": "evaluating",
    "done": "done",
}


MOST_TASKS, MOST_CLASSES = 12, 8
"""Tasks, and classes of each, that are named at the start of a run."""


def speaks() -> bool:
    """Returns whether this process tells the user anything. Of several that `torchrun` started, the first does."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1 or os.environ.get("RANK", "0") == "0"


def _columns() -> tuple[ProgressColumn, ...]:
    plain = (TextColumn("{task.description}", markup=False), TextColumn("{task.fields[facts]}", markup=False))
    return plain[0], BarColumn(bar_width=24), plain[1], TimeElapsedColumn()


class Watcher:
    """A context manager that shows the events of a run and restores the terminal.

    interval: seconds between plain lines where there is no terminal. A line at the end of every task comes in any case.
    brief: nothing but the bar, and warnings. listing: show the tasks of the stream at the start.
    """

    def __init__(
        self,
        label: str,
        console: Console | None = None,
        interval: float = 10.0,
        *,
        brief: bool = False,
        listing: bool = True,
    ) -> None:
        self.label, self.interval, self.brief = label, interval, brief
        self.console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True, quiet=not speaks())
        self._last = time.monotonic()
        self._loss: float | None = None
        self._bar: Progress | None = None
        self._shown_tasks = not listing
        if self.console.is_terminal:
            self._bar = Progress(*_columns(), console=self.console, transient=True)
            self._line = self._bar.add_task(label, total=None, facts="starting")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, stream: "Stream | None", event: "Event") -> None:
        if event.note and event.phase == "load":  # what was found in the data
            self._say(event.note)
            return
        if event.note:
            self.console.print(Text(f"{self.label}: {event.note}"), style="yellow")
            return
        if stream and not self._shown_tasks:
            self._show_tasks(stream)
        self._loss = event.loss if event.loss is not None else self._loss
        where = f"task {event.task + 1}/{len(stream)} " if stream and event.workers is None else ""
        if event.accuracy is not None:
            loss = f", last loss {self._loss:.3f}" if self._loss is not None else ""
            self._say(f"{where}learnt; mean accuracy on the tasks so far {event.accuracy:.1%}{loss}")
            self._loss = None
            return
        facts = f"{event.done}/{event.total}" + (f" loss {event.loss:.3f}" if event.loss is not None else "")
        facts += f", in progress: {event.workers}" if event.workers else ""
        if self._bar:
            total, done = (event.total or None), event.done
            described = f"{self.label}: {where}{DOING[event.phase]}"
            self._bar.update(self._line, description=described, total=total, completed=done, facts=facts)
        elif time.monotonic() - self._last >= self.interval:
            self._last = time.monotonic()
            self._say(f"{where}{DOING[event.phase]} {facts}")

    def _show_tasks(self, stream: "Stream") -> None:
        self._shown_tasks = True
        for number, task in enumerate(stream.tasks[:MOST_TASKS], 1):
            names = [stream.class_names[c] for c in task.classes]
            more = f" and {len(names) - MOST_CLASSES} more" if len(names) > MOST_CLASSES else ""
            classes = f"{', '.join(names[:MOST_CLASSES])}{more}"
            self._say(f"task {number}/{len(stream)} {task.name}: {classes} ({len(task.train)} training examples)")
        if len(stream) > MOST_TASKS:
            self._say(f"and {len(stream) - MOST_TASKS} more tasks")

    def _say(self, text: str) -> None:
        if not self.brief:
            self.console.print(Text(f"{self.label}: {text}"))


class GridWatcher:
    """Shows a comparison: a line for every finished cell and, on a terminal, a bar and the last line of every active run."""

    def __init__(self, label: str, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._bar = Progress(*_columns())
        self._line = self._bar.add_task(label, total=None, facts="")
        self._live = Live(console=self.console, transient=True) if self.console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def show(self, done: int, total: int, left: float | None, at_work: Sequence[tuple[str, str]]) -> None:
        """left: seconds, if known. at_work: the name of each active cell and the last line of its log."""
        if self._live:
            guess = (
                ""
                if left is None
                else f", about {left:.0f} s left"
                if left < 90
                else f", about {left / 60:.0f} min left"
            )
            self._bar.update(self._line, completed=done, total=total, facts=f"{done}/{total}{guess}")
            lines = [Text(f"  {name}  {said}", no_wrap=True, overflow="ellipsis") for name, said in at_work]
            self._live.update(Group(self._bar, *lines))
