"""What a person sees while a run works: a live line on a terminal, otherwise a plain line now and then."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from lamina.engine.loop import Event
    from lamina.streams import Stream

DOING = {
    "load": "decoding images",
    "begin": "preparing",
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
        where = f"task {event.task + 1}/{len(stream)} " if stream else ""
        if event.accuracy is not None:
            loss = f", last loss {self._loss:.3f}" if self._loss is not None else ""
            self.console.print(f"{self.label}: {where}learnt; accuracy on tasks so far {event.accuracy:.1%}{loss}")
            self._loss = None
            return
        facts = f"{event.done}/{event.total}" + (f" loss {event.loss:.3f}" if event.loss is not None else "")
        if self._bar:
            total, done = (event.total or None), event.done
            described = f"{self.label}: {where}{DOING[event.phase]}"
            self._bar.update(self._line, description=described, total=total, completed=done, facts=facts)
        elif time.monotonic() - self._last >= self.interval:
            self._last = time.monotonic()
            self.console.print(f"{self.label}: {where}{DOING[event.phase]} {facts}")
