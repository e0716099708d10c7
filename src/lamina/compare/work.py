"""Runs several cells at a time, each in a process. One loop without threads polls the processes."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

from lamina.compare.cells import Place, Start, note_holder
from lamina.engine.loop import Interrupted
from lamina.runs import stop_on_signals
from lamina.runs.side_by_side import Process, stop

PAUSE = 0.2


@dataclass(frozen=True, eq=False)
class Job:
    """A cell to run. prepare: called while its lock is held, just before it starts; False where it must not start."""

    name: str
    place: Place
    prepare: Callable[[], bool]


@dataclass(frozen=True)
class Watch:
    """Callbacks. ended: a run with its exit code, or None where it must not start. held: a cell that another process holds.
    look: at every poll, the runs at work."""

    ended: Callable[[Job, int | None], None]
    held: Callable[[Job], None]
    look: Callable[[Sequence[Job]], None]


def work(jobs: Sequence[Job], side_by_side: int, start: Start, watch: Watch) -> None:
    """Runs every job in this order. Raises Interrupted when asked to stop, once its runs have saved and stopped.

    A cell that another process holds is waited for: it is a run that outlived a killed comparison, or another
    comparison's run.
    """
    waiting = deque(jobs)
    held: list[Job] = []
    at_work: dict[Job, tuple[Process, IO[str]]] = {}

    def begin(job: Job) -> bool:
        """False where another process holds it."""
        lock = job.place.lock()
        if lock is None:
            return False
        done = job.place.state == "done"
        if done or not job.prepare():
            lock.close()
            watch.ended(job, 0 if done else None)
            return True
        process = start(job.place, lock)
        note_holder(lock, f"process {process.pid}")
        at_work[job] = process, lock
        return True

    with stop_on_signals() as should_stop:
        try:
            while waiting or held or at_work:
                if should_stop():
                    raise Interrupted
                for job, (process, lock) in list(at_work.items()):
                    code = process.poll()
                    if code is not None:
                        del at_work[job]
                        lock.close()
                        watch.ended(job, code)
                held = [job for job in held if not begin(job)]
                while waiting and len(at_work) + len(held) < side_by_side:
                    job = waiting.popleft()
                    if not begin(job):
                        held.append(job)
                        watch.held(job)
                watch.look([*at_work, *held])
                time.sleep(PAUSE if at_work or held else 0)
        finally:
            stop([process for process, _ in at_work.values()])
            for _, lock in at_work.values():
                lock.close()
