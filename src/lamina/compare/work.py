"""Runs several cells at a time. One loop without threads polls them, on whatever machines they run."""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

from lamina.compare.cell_run import HELD, OTHER_CODE
from lamina.compare.cells import Place
from lamina.compare.runners import LOST, Resources, Runner, Started
from lamina.engine.loop import Interrupted
from lamina.runs import stop_on_signals
from lamina.runs.side_by_side import Process, stop

ONE_CORE = Resources()
MOST_LOST = 3
"""How often a cell is started anew after its process or machine was lost."""


@dataclass(frozen=True, eq=False)
class Job:
    """A cell to run. prepare: called while its lock is held, just before it starts; False where it must not start."""

    name: str
    place: Place
    prepare: Callable[[], bool]
    resources: Resources = ONE_CORE


@dataclass(frozen=True)
class Watch:
    """Callbacks. ended: a run with its exit code, or None where it must not start. held: a cell that another process holds.
    lost: a run that will be started again. look: at every poll, the runs at work."""

    ended: Callable[[Job, int | None], None]
    held: Callable[[Job], None]
    lost: Callable[[Job], None]
    look: Callable[[Sequence[Job]], None]


def work(jobs: Sequence[Job], runner: Runner, watch: Watch) -> None:
    """Runs every job in this order. Raises Interrupted when asked to stop, once its runs have saved and stopped; with a runner
    whose runs go on, at once, saying so.

    A cell that another process holds is waited for: it is a run that outlived a killed comparison, or another
    comparison's run.
    """
    waiting = deque(jobs)
    held: list[Job] = []
    at_work: dict[Job, tuple[Process, IO[str]]] = {}
    lost: Counter[Job] = Counter()

    def prepared(job: Job) -> tuple[bool, IO[str] | None]:
        """Returns whether the cell is free, and its lock where it is to start."""
        lock = job.place.lock()
        if lock is None:
            return False, None
        done = job.place.state == "done"
        if done or not job.prepare():
            lock.close()
            watch.ended(job, 0 if done else None)
            return True, None
        return True, lock

    def collect() -> None:
        for job, (process, lock) in list(at_work.items()):
            code = process.poll()
            if code is None:
                continue
            del at_work[job]
            lock.close()
            if job.place.state == "done" or code not in (HELD, LOST):
                watch.ended(job, None if code == OTHER_CODE else code)
            elif code == HELD:  # another process is at work on it
                held.append(job)
                watch.held(job)
            elif lost[job] < MOST_LOST:
                lost[job] += 1
                watch.lost(job)
                held.append(job)
            else:
                watch.ended(job, code)

    with stop_on_signals() as should_stop:
        try:
            while waiting or held or at_work:
                if should_stop():
                    raise Interrupted(runner.leave() or "")
                collect()
                batch: list[tuple[Job, IO[str]]] = []
                for job in list(held):
                    free, lock = prepared(job)
                    if free:
                        held.remove(job)
                    if lock is not None:
                        batch.append((job, lock))
                while waiting and len(at_work) + len(batch) + len(held) < runner.side_by_side:
                    job = waiting.popleft()
                    free, lock = prepared(job)
                    if lock is not None:
                        batch.append((job, lock))
                    elif not free:
                        held.append(job)
                        watch.held(job)
                if batch:
                    processes = runner.start([Started(job.place, lock, job.resources) for job, lock in batch])
                    at_work |= {job: (process, lock) for (job, lock), process in zip(batch, processes, strict=True)}
                watch.look([*at_work, *held])
                time.sleep(runner.pause if at_work or held else 0)
        finally:
            if runner.leave() is None:
                stop([process for process, _ in at_work.values()])
            for _, lock in at_work.values():
                lock.close()
