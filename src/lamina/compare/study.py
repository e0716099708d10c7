"""Study: a comparison with its finished and remaining cells, the choices of its search, and its tables."""

import fnmatch
import math
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from lamina import config as configuration
from lamina.compare import guards, lease, table
from lamina.compare.cells import Place, State, Store
from lamina.compare.grid import Cell, Grid, Row
from lamina.compare.rows import RowRuns, Run, Trial
from lamina.compare.runners import LOST, Local, Runner
from lamina.compare.work import MOST_LOST, Job, Watch, work
from lamina.data.leaks import Leaks
from lamina.errors import ConfigError, LaminaError
from lamina.record import Record
from lamina.report.text import count
from lamina.runs import with_whole_paths
from lamina.runs.side_by_side import why
from lamina.runs.tracking import check_trackers

K = TypeVar("K", bound=Hashable)
MOST_SHOWN = 12
"""Most running cells whose progress is shown."""


class Viewer(Protocol):
    """Shows progress."""

    def say(self, text: str) -> None: ...

    def show(self, done: int, total: int, left: float | None, at_work: Sequence[tuple[str, str]]) -> None:
        """left: remaining seconds, if known. at_work: name and last line of the log of each running cell."""
        ...


class Listed(NamedTuple):
    """A cell as `--dry-run` lists it. place: None where the search must choose its settings first."""

    state: State | None
    name: str
    place: Place | None


@dataclass(frozen=True)
class Failure:
    name: str
    why: str
    log: Path


@dataclass(frozen=True)
class Outcome:
    """Cells that failed or were not started."""

    failures: list[Failure] = field(default_factory=list)
    not_started: list[str] = field(default_factory=list)
    """Because the code of lamina changed meanwhile."""


class Study:
    """A grid and its cells."""

    def __init__(
        self, file: Path, *, out: Path | None = None, cells: Path | None = None, only: str | None = None,
        keep_code: bool = False, records: Path | None = None,
    ) -> None:  # fmt: skip
        """only: a pattern of cell names. keep_code: accept finished runs of older code. records: a file of finished runs, which
        are read from it; `content` adds to it.

        Raises ConfigError naming every error of the grid, and all data and backbones that are missing.
        """
        self.grid, self.only, self.keep_code = Grid(file), only, keep_code
        self.say: Callable[[str], None] = lambda _: None
        settings = self.grid.settings
        self.out = out or Path(settings.out or Path("runs") / self.grid.name)
        _refuse_files({"out": self.out, "cells": cells or Path(settings.cells)})
        self.store = Store(cells or Path(settings.cells), records)
        problems = []
        for row in self.grid.rows:
            for cell in self.grid.trials(row) or self.grid.cells(row, {}):
                try:
                    self.place(cell)
                    self.store.check_stream(cell.config)
                    check_trackers(cell.config)
                except LaminaError as error:
                    problems.append(str(error))
        if problems:
            raise ConfigError(configuration.listed(list(dict.fromkeys(problems)), file))
        if only is not None and not any(self._wanted(name) for name in self._names()):
            raise ConfigError(
                f"--only {only!r} fits no cell. `--dry-run` lists their names, such as {self._names()[0]!r}."
            )

    @cached_property
    def leaks(self) -> dict[str, Leaks]:
        """Test examples among the training examples, by stream."""
        first = {row.stream: self.grid.cells(row, {})[0].config for row in reversed(self.grid.rows)}
        return {
            stream: guards.look(first[stream], self.store.folder / ".data", self.say) for stream in self.grid.streams
        }

    # -- cells ------------------------------------------------------------------------------------------------------

    def place(self, cell: Cell) -> Place:
        """Returns the directory of a cell; if it is not done and older code is accepted, one that was done with that."""
        config = with_whole_paths(cell.config)
        place = self.store.place(config)
        if self.keep_code and place.state != "done":
            place = self.store.of_older_code(config) or place
        return place

    def chosen(self, row: Row) -> Mapping[str, Any] | None:
        """Returns the settings that the search has chosen for a row; None while a trial is not yet done. A trial that
        failed, for example because its learning rate was too large, is not chosen."""
        trials = self.grid.trials(row)
        if not trials:
            return {}
        places = [self.place(cell) for cell in trials]
        if not all(place.state in ("done", "failed") for place in places):
            return None
        scores = [score(place.record()) if place.state == "done" else -math.inf for place in places]
        best = max(range(len(trials)), key=lambda k: scores[k])  # the first of equals
        return trials[best].tried if math.isfinite(scores[best]) else None

    def table_cells(self, row: Row) -> list[Cell]:
        """Returns the cells of the table; none while the search is not done."""
        chosen = self.chosen(row)
        return [] if chosen is None else self.grid.cells(row, chosen)

    def listing(self) -> Iterator[Listed]:
        """Yields every selected cell, in the order of work."""
        for cell in self._wanted_trials():
            yield Listed(self.place(cell).state, cell.name, self.place(cell))
        for row in self.grid.rows:
            known = self.table_cells(row)
            for cell in known or self.grid.cells(row, {}):
                if self._wanted(cell.name):
                    place = self.place(cell) if known else None
                    yield Listed(place.state if place else None, cell.name, place)

    def _names(self) -> list[str]:
        return [c.name for row in self.grid.rows for c in (*self.grid.cells(row, {}), *self.grid.trials(row))]

    def _wanted(self, name: str) -> bool:
        if self.only is None:
            return True
        return fnmatch.fnmatchcase(name, self.only if any(c in self.only for c in "*?[") else f"*{self.only}*")

    def _wanted_trials(self) -> list[Cell]:
        """Returns the selected trials, and the trials that a selected cell of the table needs."""
        found = []
        for row in self.grid.rows:
            needed = any(self._wanted(cell.name) for cell in self.grid.cells(row, {}))
            found += [cell for cell in self.grid.trials(row) if needed or self._wanted(cell.name)]
        return found

    # -- work -------------------------------------------------------------------------------------------------------

    def work(self, viewer: Viewer, runner: Runner | None = None) -> Outcome:
        """Runs what is not done: first the search, then the table. runner: where; by default, on this machine.

        Raises Interrupted when asked to stop, after the active runs have saved.
        """
        outcome = Outcome()
        self.say = viewer.say
        for stream, found in self.leaks.items():
            for warning in guards.warnings(stream, found, {}):
                viewer.say(warning)
        progress = _Progress(self, runner or Local(self.grid.settings.jobs), viewer, outcome)
        progress.go(self._wanted_trials(), "the search")
        for row in self.grid.rows:
            wanted = any(self._wanted(cell.name) for cell in self.grid.cells(row, {}))
            if wanted and self.chosen(row) is None:
                viewer.say(
                    f"{row.stream}/{row.method}: no trial of its search was finished, so it has no settings to run"
                )
        cells = [cell for row in self.grid.rows for cell in self.table_cells(row)]
        progress.go([cell for cell in cells if self._wanted(cell.name)], "the table")
        return outcome

    # -- tables -----------------------------------------------------------------------------------------------------

    def content(self, command: str) -> table.Content:
        """Returns the content of the tables from the finished runs."""
        rows, done = {}, list[Place]()
        for row in self.grid.rows:
            cells = [(cell, self.place(cell)) for cell in self.table_cells(row)]
            trials = [(cell, self.place(cell)) for cell in self.grid.trials(row)]
            rows[row] = RowRuns(
                runs=[self._run(c, p) for c, p in cells if p.state == "done"],
                planned=len(self.grid.settings.runs),
                trials=[self._trial(c, p) for c, p in trials],
                chosen=self.chosen(row),
            )
            done += [place for _, place in (*cells, *trials) if place.state == "done"]
        if self.store.records is not None:
            self.store.note(done)
        return table.content(self.grid, rows, command, self.leaks)

    def _run(self, cell: Cell, place: Place) -> Run:
        return Run(cell.seed, cell.order, place.record(), str(place.folder), self._is_older(cell, place))

    def _trial(self, cell: Cell, place: Place) -> Trial:
        found = score(place.record()) if place.state == "done" else None
        return Trial(dict(cell.tried or {}), found, place.state == "failed", self._is_older(cell, place))

    def _is_older(self, cell: Cell, place: Place) -> bool:
        return self.store.place(with_whole_paths(cell.config)).folder != place.folder


def _refuse_files(folders: Mapping[str, Path]) -> None:
    """Raises ConfigError for a folder that is a file, or lies in one."""
    for option, folder in folders.items():
        file = next((one for one in (folder, *folder.parents) if one.exists()), folder)
        if file.exists() and not file.is_dir():
            raise ConfigError(f"--{option} {folder}: {file} is a file. Give a folder.")


class _Progress:
    """Counts finished cells, estimates the remaining time, and reports to the viewer."""

    def __init__(self, study: Study, runner: Runner, viewer: Viewer, outcome: Outcome) -> None:
        self.study, self.runner, self.viewer, self.outcome = study, runner, viewer, outcome
        self.seconds: dict[tuple[Row, bool], list[float]] = {}
        """Seconds of every finished run, by row and whether it is a trial."""

    def go(self, cells: Sequence[Cell], part: str) -> None:
        self.cells: dict[Path, Cell] = {}
        self.part = part
        self.seconds.clear()  # a trial takes less time than a run of the table
        todo: list[Job] = []
        for cell in cells:
            place = self.study.place(cell)
            if place.folder in self.cells:
                continue
            self.cells[place.folder] = cell
            if place.state == "done":
                self._note(cell, place)
            else:
                resources = self.study.grid.resources(cell.row)
                prepare = partial(self._prepare, cell, place)
                todo.append(Job(cell.name, place, prepare, resources))
        self.left = {job.place.folder for job in todo}
        self.running = max(1, len(todo))
        """Cells that run at a time, as far as is known: a cluster takes more than it runs."""
        if todo:
            number = len(self.cells)
            self.viewer.say(f"{count(number, 'cell')} of {part}: {number - len(todo)} done, {len(todo)} to do")
            work(todo, self.runner, Watch(self._ended, self._held, self._lost, self._look))

    def _prepare(self, cell: Cell, place: Place) -> bool:
        config, store = with_whole_paths(cell.config), self.study.store
        if store.code_changed(config):
            return False
        place.begin(config, store.identity(config))
        return True

    def _ended(self, job: Job, code: int | None) -> None:
        self.left.discard(job.place.folder)
        self.running = 1 + sum(lease.holder(folder) is not None for folder in self.left)
        done = f"[{len(self.cells) - len(self.left)}/{len(self.cells)}] {job.name}: "
        if job.place.state == "done":
            cell, record = self.cells[job.place.folder], job.place.record()
            self._note(cell, job.place)
            what, value = "average accuracy on validation", score(record)
            if cell.tried is None:
                joint, metrics = record.stream.joint, record.metrics
                what, value = (
                    ("micro accuracy", metrics.final_accuracy_micro)
                    if joint
                    else ("final accuracy", metrics.final_accuracy)
                )
            self.viewer.say(f"{done}{what} {value:.1%}, {duration(record.cost.total_seconds or 0.0)}{self._still()}")
        elif code is None:
            self.outcome.not_started.append(job.name)
        else:
            reason = why(code) if code != LOST else f"its process or machine was lost {MOST_LOST + 1} times"
            if code == LOST and (told := self.runner.reason(job.place)):
                reason += f": {told}"
            job.place.fail(reason)
            self.outcome.failures.append(Failure(job.name, job.place.failure, job.place.log))
            self.viewer.say(f"{done}FAILED, {reason}{self._still()}")

    def _held(self, job: Job) -> None:
        self.viewer.say(f"{job.name}: {job.place.holder()} is still at work on it; waiting for that")

    def _lost(self, job: Job) -> None:
        self.viewer.say(f"{job.name}: its process or machine was lost; it continues elsewhere from its last checkpoint")

    def _look(self, at_work: Sequence[Job]) -> None:
        lines = [(job.name, job.place.last_lines(1)) for job in at_work[:MOST_SHOWN]]
        self.viewer.show(len(self.cells) - len(self.left), len(self.cells), self.remaining(), lines)

    def _note(self, cell: Cell, place: Place) -> None:
        if (spent := place.record().cost.total_seconds) is not None:
            self.seconds.setdefault((cell.row, cell.tried is not None), []).append(spent)

    def remaining(self) -> float | None:
        keys = [(cell.row, cell.tried is not None) for folder, cell in self.cells.items() if folder in self.left]
        return seconds_left(keys, self.seconds, min(self.runner.side_by_side, self.running))

    def _still(self) -> str:
        left = self.remaining()
        return f"; about {duration(left)} left of {self.part}" if left else ""


def seconds_left(left: Sequence[K], known: Mapping[K, Sequence[float]], side_by_side: int) -> float | None:
    """Returns an estimate for the remaining cells: the mean of the finished ones of the same kind, or of all. None where none
    is finished."""
    seconds = [value for values in known.values() for value in values]
    if not seconds:
        return None
    each = [statistics.fmean(known[kind]) if known.get(kind) else statistics.fmean(seconds) for kind in left]
    # No less than the longest one, however many run side by side.
    return max([sum(each) / side_by_side, *each]) if each else 0.0


def duration(seconds: float) -> str:
    """Returns a duration in words, rounded as an estimate should be."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def score(record: Record) -> float:
    """Returns what the search compares: the average accuracy, which is the final accuracy in joint training."""
    return record.metrics.average_accuracy
