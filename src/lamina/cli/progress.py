"""What a person sees while runs work: live lines on a terminal, otherwise a plain line now and then."""

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
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


class Watcher:
    """Called with every event of a run; a context manager that tidies the terminal. interval: seconds between plain
    lines while something is under way. A line at the end of every task is printed in any case."""

    def __init__(self, label: str, console: Console | None = None, interval: float = 10.0) -> None:
        self.label, self.interval = label, interval
        self.console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._last = time.monotonic()
        self._loss: float | None = None
        self._bar: Progress | None = None
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[facts]}"))
            self._bar = Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True)
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
        if event.note:
            self.console.print(f"{self.label}: {event.note}", style="yellow")
            return
        self._loss = event.loss if event.loss is not None else self._loss
        where = f"task {event.task + 1}/{len(stream)} " if stream and event.workers is None else ""
        if event.accuracy is not None:
            loss = f", last loss {self._loss:.3f}" if self._loss is not None else ""
            self.console.print(f"{self.label}: {where}learnt; accuracy on tasks so far {event.accuracy:.1%}{loss}")
            self._loss = None
            return
        facts = f"{event.done}/{event.total}" + (f" loss {event.loss:.3f}" if event.loss is not None else "")
        facts += f", at work: {event.workers}" if event.workers else ""
        if self._bar:
            total, done = (event.total or None), event.done
            described = f"{self.label}: {where}{DOING[event.phase]}"
            self._bar.update(self._line, description=described, total=total, completed=done, facts=facts)
        elif time.monotonic() - self._last >= self.interval:
            self._last = time.monotonic()
            self.console.print(f"{self.label}: {where}{DOING[event.phase]} {facts}")


class GridWatcher:
    """Shows a comparison: a line for every cell that ends and, on a terminal, a bar and what each run at work said last."""

    def __init__(self, label: str, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[facts]}"))
        self._bar = Progress(*columns, TimeElapsedColumn())
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
        """left: seconds, if known. at_work: the name of each cell and the last line of its log."""
        if self._live:
            guess = f", about {left / 60:.0f} min left" if left is not None else ""
            self._bar.update(self._line, completed=done, total=total, facts=f"{done}/{total}{guess}")
            lines = [Text(f"  {name}  {said}", no_wrap=True, overflow="ellipsis") for name, said in at_work]
            self._live.update(Group(self._bar, *lines))
