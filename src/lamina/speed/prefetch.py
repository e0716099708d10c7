"""Prefetching: batches are made while a GPU computes. Decoding and augmenting them is the CPU's work."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from lamina.types import Batch

DEPTH = 2
"""Most batches that wait. More would fill the GPU's memory."""


def prefetched(makers: Iterable[Callable[[], Batch]]) -> Iterator[Batch]:
    """Yields the batches in order, and makes the next ones in a thread meanwhile. What a maker raises is raised where its
    batch would have come."""
    with ThreadPoolExecutor(1, thread_name_prefix="lamina-prefetch") as pool:
        waiting: deque[Future[Batch]] = deque()
        try:
            for make in makers:
                waiting.append(pool.submit(make))
                if len(waiting) > DEPTH:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
