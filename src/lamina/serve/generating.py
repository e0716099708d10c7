"""Completes the prompts of concurrent requests.

One thread generates. Prompts that wait when it is free make one batch, in their order; those that arrive meanwhile make the
next. A text that has ended, or whose client has gone, ends alone, and the batch with its last text.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from lamina.model import Asked, Completion
from lamina.serve.limits import Limits, Refusal, beyond, flag
from lamina.serve.versions import Version

T = TypeVar("T")
BATCH_TOKENS = 2**14
"""Most prompt tokens of a batch, padding included."""
SHORT = 512
"""Tokens up to which prompts share a batch whatever their lengths."""
RATIO = 4
"""A longer prompt shares a batch with those of at least this fraction of its length: the others would wait for it."""


@dataclass(eq=False)
class Job:
    """A prompt on its way to its completion. due: time.monotonic() of its deadline. texts: new text, as it comes; None at the
    end."""

    version: Version
    asked: Asked
    due: float
    done: "asyncio.Future[Completion]" = field(repr=False)
    texts: "asyncio.Queue[str | None]" = field(default_factory=asyncio.Queue, repr=False)
    cancelled: bool = False
    """Whether nobody waits for it."""
    late: bool = False
    began: float = field(default_factory=time.monotonic)
    first: bool = False
    """Whether its first token has come."""


def fits(sizes: Sequence[int]) -> bool:
    """Returns whether prompts of these sizes, in tokens, may make one batch."""
    longest = max(sizes)
    return len(sizes) * longest <= BATCH_TOKENS and (longest <= SHORT or RATIO * min(sizes) >= longest)


class Generator:
    """Completes prompts. Its methods are called on the event loop; `run` must be running.

    on_batch: is called with the number of prompts of every batch. on_first: with the seconds to the first token of a prompt.
    """

    def __init__(
        self,
        limits: Limits,
        on_batch: Callable[[int], None] = lambda _: None,
        on_first: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.limits, self.on_batch, self.on_first = limits, on_batch, on_first
        self.admitted = 0
        """Prompts that are read, wait, or are completed."""
        self._queue: deque[Job] = deque()
        self._arrived = asyncio.Event()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="lamina-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="lamina-generate")
        self._closing = False

    def admit(self) -> None:
        """Take one more prompt in. `leave` lets it go. Raises Refusal where there is no room."""
        if self.admitted >= self.limits.queue:
            message = f"{self.admitted} prompts are waiting or being completed; try again in a moment ({flag('queue')})"
            raise Refusal(429, message, "queue", retry=True)
        self.admitted += 1

    def leave(self) -> None:
        self.admitted -= 1

    async def read(self, work: Callable[[], T]) -> T:
        """Returns the result of some work on a prompt, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, work)

    def put(self, version: Version, asked: Asked, due: float) -> Job:
        """Returns the job that completes a prompt."""
        job = Job(version, asked, due, asyncio.get_running_loop().create_future())
        self._queue.append(job)
        self._arrived.set()
        return job

    def drop(self, job: Job) -> None:
        """Nobody waits for a job any more. It leaves the queue at once, or ends with its next token."""
        job.cancelled = True
        if job in self._queue:
            self._queue.remove(job)
            job.done.cancel()

    def late(self) -> Refusal:
        """Returns the refusal of a completion that took too long."""
        seconds = self.limits.deadline_seconds
        return beyond(
            "deadline_seconds", f"no whole completion within {seconds:g} s; ask for fewer tokens, or later", 503
        )

    # -- computing ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Complete batch after batch, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            while not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
            jobs = self._next_batch()
            if not jobs:
                continue
            self.on_batch(len(jobs))
            try:
                found = await loop.run_in_executor(self._writer, self._complete, loop, jobs)
            except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to these requests
                for job in jobs:
                    self._fail(job, error)
                continue
            for job, completion in zip(jobs, found, strict=True):
                if job.late:
                    self._fail(job, self.late())
                elif not job.done.done():
                    job.done.set_result(completion)
                    job.texts.put_nowait(None)

    def _next_batch(self) -> list[Job]:
        """Returns the first jobs of the queue that make one batch. Those that nobody waits for, or that are late, are
        dropped."""
        jobs: list[Job] = []
        sizes: list[int] = []
        while self._queue and len(jobs) < self.limits.batch:
            job = self._queue[0]
            size = len(job.asked.prompt.ids)
            if jobs and (job.version is not jobs[0].version or not fits([*sizes, size])):
                break
            self._queue.popleft()
            if job.cancelled:
                job.done.cancel()
            elif job.due < time.monotonic():
                self._fail(job, self.late())
            else:
                jobs.append(job)
                sizes.append(size)
        return jobs

    def _fail(self, job: Job, error: Exception) -> None:
        if not job.done.done():
            job.done.set_exception(error)
            job.done.exception()  # noted, also where nobody asks for it any more
        job.texts.put_nowait(None)

    def _complete(self, loop: asyncio.AbstractEventLoop, jobs: Sequence[Job]) -> list[Completion]:
        """Returns the completions of a batch. Runs in the generating thread."""

        def each(k: int, text: str) -> bool:
            job = jobs[k]
            if not job.first:
                job.first = True
                loop.call_soon_threadsafe(self.on_first, time.monotonic() - job.began)
            if text:
                loop.call_soon_threadsafe(job.texts.put_nowait, text)
            job.late = job.late or time.monotonic() > job.due
            return job.cancelled or job.late or self._closing

        return jobs[0].version.language.generate([job.asked for job in jobs], each)

    def close(self) -> None:
        """Break off what is generated, at its next token."""
        self._closing = True
        self._reader.shutdown(wait=False, cancel_futures=True)
        self._writer.shutdown(wait=True, cancel_futures=True)
