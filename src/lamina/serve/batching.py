"""Joins the inputs of concurrent requests into batches.

Images are decoded in a few threads; one thread computes. While it computes, requests gather and form the next batch. An idle
server starts at once: it waits, for a few milliseconds, only for inputs that are being decoded already.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TypeVar

import torch

from lamina.data.decoding import DAMAGE, full_size
from lamina.data.records import Payload
from lamina.errors import DataError
from lamina.model import Prediction
from lamina.serve.limits import Limits, Refusal, beyond
from lamina.serve.versions import Version
from lamina.types import Batch

T = TypeVar("T")
DECODERS = 2
"""Threads that decode."""
LARGE = 12_000_000
"""Pixels from which images are decoded one at a time, since one of 50 million pixels may take 1 GB meanwhile."""


@dataclass(eq=False)
class Job:
    """The inputs of one request, on their way to the predictions."""

    version: Version
    inputs: Batch | Sequence[Payload]
    """Decoded images, or texts, which the computing thread tokenises."""
    top: int
    due: float
    done: "asyncio.Future[list[Prediction]]" = field(repr=False)

    def __len__(self) -> int:
        return len(self.inputs)


class Batcher:
    """Predicts for the inputs of many requests at once. Its methods are called on the event loop; `run` must be running.

    on_batch: is called with the number of inputs of every batch.
    """

    def __init__(self, limits: Limits, on_batch: Callable[[int], None] = lambda _: None) -> None:
        self.limits, self.on_batch = limits, on_batch
        self.admitted = 0
        """Inputs that are being decoded, wait, or are computed."""
        self._queue: deque[Job] = deque()
        self._arrived = asyncio.Event()
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="lamina-decode")
        self._large = threading.Lock()
        self._computer = ThreadPoolExecutor(1, thread_name_prefix="lamina-compute")

    @property
    def queued(self) -> int:
        """Inputs that wait for the computing thread."""
        return sum(map(len, self._queue))

    def refuse_if_full(self, inputs: int = 1) -> None:
        """Raises Refusal where there is no room for so many inputs."""
        if self.admitted and self.admitted + inputs > self.limits.queue:
            raise beyond("queue", f"the queue is full ({self.admitted} inputs); try again in a moment", 503)

    async def take_apart(self, work: Callable[[], T], due: float, done: Callable[[], None]) -> T:
        """Returns the result of some work in a decoding thread. See `predict` for due and done."""
        loop = asyncio.get_running_loop()
        task = loop.run_in_executor(self._decoders, self._unless_late(work, due))
        return await self._in_time(self._counted(task, 1, done), due)

    async def predict(
        self, version: Version, payloads: Sequence[Payload], top: int, due: float, done: Callable[[], None]
    ) -> list[Prediction]:
        """Returns a prediction for each input; one that cannot be read has an error.

        due: time.monotonic() of the deadline. done: is called when nothing of the request is in use any more, which may be
        later than the deadline: a thread cannot be stopped. Raises Refusal where the deadline has passed.
        """
        task = asyncio.ensure_future(self._predict(version, payloads, top, due))
        return await self._in_time(self._counted(task, len(payloads), done), due)

    def _counted(self, task: "asyncio.Future[T]", inputs: int, done: Callable[[], None]) -> "asyncio.Future[T]":
        self.admitted += inputs

        def leave(_: object) -> None:
            self.admitted -= inputs
            self._arrived.set()
            done()

        task.add_done_callback(leave)
        return task

    def _unless_late(self, work: Callable[[], T], due: float) -> Callable[[], T]:
        def timely() -> T:
            if time.monotonic() > due:
                raise self._late()
            return work()

        return timely

    async def _in_time(self, work: "asyncio.Future[T]", due: float) -> T:
        try:
            async with asyncio.timeout(max(0.0, due - time.monotonic())):
                return await asyncio.shield(work)
        except TimeoutError:
            work.add_done_callback(_forget)
            raise self._late() from None

    def _late(self) -> Refusal:
        return beyond(
            "deadline_seconds", f"no prediction within {self.limits.deadline_seconds:g} s; try again later", 503
        )

    async def _predict(self, version: Version, payloads: Sequence[Payload], top: int, due: float) -> list[Prediction]:
        loop = asyncio.get_running_loop()
        if version.classifier.kind == "text":
            return await self._put(Job(version, payloads, top, due, loop.create_future()))
        read = [self._unless_late(partial(self._read, version, payload), due) for payload in payloads]
        parts = await loop.run_in_executor(self._decoders, lambda: [one() for one in read])
        errors = [error for _, part in parts for error in part]
        batches = [batch for batch, _ in parts if batch is not None]
        found = iter(await self._put(Job(version, joint(batches), top, due, loop.create_future())) if batches else ())
        return [Prediction(error=error) if error is not None else next(found) for error in errors]

    def _read(self, version: Version, payload: Payload) -> tuple[Batch | None, list[str | None]]:
        with self._large if is_large(payload) else nullcontext():
            return version.classifier.read([payload])

    async def _put(self, job: Job) -> list[Prediction]:
        self._queue.append(job)
        self._arrived.set()
        return await job.done

    # -- computing ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Compute batch after batch, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            while not self._queue:
                self._arrived.clear()
                await self._arrived.wait()
            await self._gather()
            jobs = self._next_batch()
            if not jobs:
                continue
            self.on_batch(sum(map(len, jobs)))
            work = partial(compute, jobs[0].version, [job.inputs for job in jobs], max(job.top for job in jobs))
            try:
                found = await loop.run_in_executor(self._computer, partial(work, self.limits.batch))
            except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to these requests
                for job in jobs:
                    if not job.done.done():
                        job.done.set_exception(error)
                continue
            for job, predictions in zip(jobs, found, strict=True):
                if not job.done.done():
                    job.done.set_result([cut(prediction, job.top) for prediction in predictions])

    async def _gather(self) -> None:
        """Wait for inputs that are being decoded, as long as there are any and the batch has room."""
        until = time.monotonic() + self.limits.wait_ms / 1000
        while (left := until - time.monotonic()) > 0:
            waiting = self.queued
            if waiting >= self.limits.batch or waiting >= self.admitted:
                return
            self._arrived.clear()
            try:
                async with asyncio.timeout(left):
                    await self._arrived.wait()
            except TimeoutError:
                return

    def _next_batch(self) -> list[Job]:
        """Returns the first jobs of the queue that make one batch. Those that are past their deadline are dropped."""
        jobs: list[Job] = []
        while self._queue:
            job = self._queue[0]
            late = job.due < time.monotonic()
            if not late and jobs and not self._fits(job, jobs):
                break
            self._queue.popleft()
            if late:
                job.done.set_exception(self._late())
            else:
                jobs.append(job)
        return jobs

    def _fits(self, job: Job, jobs: Sequence[Job]) -> bool:
        return job.version is jobs[0].version and sum(map(len, jobs)) + len(job) <= self.limits.batch

    def close(self) -> None:
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._computer.shutdown(wait=True, cancel_futures=True)


def compute(
    version: Version, inputs: Sequence[Batch | Sequence[Payload]], top: int, size: int
) -> list[list[Prediction]]:
    """Returns the predictions for each request's inputs, computed in batches of at most `size`."""
    if isinstance(inputs[0], Batch):
        whole = joint([part for part in inputs if isinstance(part, Batch)])
        found = [guess for piece in _pieces(whole, size) for guess in version.classifier.predictions(piece, top)]
    else:
        texts = [text for part in inputs if not isinstance(part, Batch) for text in part]
        found = []
        for start in range(0, len(texts), size):
            found += _predict_texts(version, texts[start : start + size], top)
    starts = [sum(map(len, inputs[:k])) for k in range(len(inputs) + 1)]
    return [found[start:end] for start, end in pairwise(starts)]


def is_large(payload: Payload) -> bool:
    """Whether an encoded image has so many pixels that no other such image should be decoded meanwhile."""
    try:
        return isinstance(payload, bytes) and math.prod(full_size(payload)) > LARGE
    except DAMAGE:
        return False


def cut(prediction: Prediction, top: int) -> Prediction:
    """Returns a prediction with its best `top` guesses only."""
    return Prediction(prediction.guesses[:top], prediction.error)


def joint(batches: Sequence[Batch]) -> Batch:
    """Returns batches of images as one."""
    if len(batches) == 1:
        return batches[0]
    inputs = {name: torch.cat([batch.inputs[name] for batch in batches]) for name in batches[0].inputs}
    return Batch(inputs=inputs, labels_b=torch.cat([batch.labels_b for batch in batches]))


def _pieces(whole: Batch, size: int) -> list[Batch]:
    return [
        Batch(
            inputs={name: value[start : start + size] for name, value in whole.inputs.items()},
            labels_b=whole.labels_b[start : start + size],
        )
        for start in range(0, len(whole), size)
    ]


def _predict_texts(version: Version, texts: Sequence[Payload], top: int) -> list[Prediction]:
    """Returns a prediction for each text. One that the tokenizer refuses has an error, and the others do not suffer."""
    predictor = version.classifier
    try:
        batch, errors = predictor.read(texts)
    except DataError as error:
        if len(texts) == 1:
            return [Prediction(error=str(error))]
        return [prediction for text in texts for prediction in _predict_texts(version, [text], top)]
    found = iter([] if batch is None else predictor.predictions(batch, top))
    return [Prediction(error=error) if error is not None else next(found) for error in errors]


def _forget(work: "asyncio.Future[T]") -> None:
    """Take note of a result that nobody waits for."""
    if not work.cancelled():
        work.exception()
