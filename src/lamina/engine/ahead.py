"""Batches made while a card computes: decoding and augmenting them is the processor's work, and it would wait otherwise."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from lamina.types import Batch

DEPTH = 2
"""Batches that lie ready at most. The next ones are few, or they fill a card's memory."""


def ahead(makers: Iterable[Callable[[], Batch]], device: torch.device) -> Iterator[Batch]:
    """The batches, in order. For a card, the next ones are made in a thread of their own; on the processor, which is busy
    anyway, each is made when it is asked for. What a maker raises is raised where its batch would have come."""
    if device.type == "cpu":
        for make in makers:
            yield make()
        return
    with ThreadPoolExecutor(1, thread_name_prefix="lamina-ahead") as pool:
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
