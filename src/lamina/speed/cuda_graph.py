"""CUDA graphs: training steps on a GPU from a recording.

A step of a small batch is a thousand short kernels, which the CPU launches more slowly than the GPU computes them. A CUDA
graph launches them once. For large batches there is nothing to gain, and a recording may choose slower kernels, so it is
timed before it is used. The loss and its gradients are recorded; optimiser and projections of methods are called as usual.

Within a task nothing but numbers in tensors may change in the computation of the loss. tests/conformance/test_recorded.py
checks this for every method.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor, nn

from lamina.engine.steps import Loss, backward
from lamina.learner import Learner
from lamina.types import Batch

ENOUGH = 50
"""Fewest full batches in a task for which a recording is made and timed, which costs about ten steps."""
FASTER = 0.9
"""A recording is used if its step takes at most this share of a plain step."""


def worth_recording(learner: Learner, full_batches: int) -> bool:
    """Returns whether steps are alike (images, not padded texts) and many enough, on a GPU."""
    return learner.device.type == "cuda" and learner.backbone.kind == "image" and full_batches >= ENOUGH


class GraphedGradients:
    """Computes the loss of batches, and leaves its gradients in the parameters.

    loss: of a batch. recorded: the size of the batches that are recorded; whether a recording is faster is found out with
    the first of them. note: called with a message if a recording cannot be made.
    """

    def __init__(
        self,
        loss: Loss,
        parameters: Sequence[nn.Parameter],
        recorded: int,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.loss, self.parameters, self.note = loss, parameters, note
        self.recorded: int | None = recorded
        self._recording: _Recording | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """Returns the loss, ()."""
        if len(batch) == self.recorded:
            try:
                self._recording = self._recording or self._record(batch)
            except RuntimeError as error:  # PyTorch also raises it where memory is short
                reason = str(error).partition("\n")[0]
                self.note(f"training steps cannot be recorded as a CUDA graph here and go on without one: {reason}")
            if self._recording is not None:
                return self._recording.replay(batch)
            self.recorded = None
            torch.cuda.empty_cache()
        return self._plain(batch)

    def _plain(self, batch: Batch) -> Tensor:
        return backward(self.loss, self.parameters, batch)

    def _record(self, batch: Batch) -> "_Recording | None":
        """Returns a recording if it is faster."""
        recording = _Recording(self._plain, self.parameters, batch)
        plain, replayed = (min(_seconds(way, batch) for _ in range(3)) for way in (self._plain, recording.replay))
        return recording if replayed <= FASTER * plain else None


class _Recording:
    def __init__(self, compute: Loss, parameters: Sequence[nn.Parameter], batch: Batch) -> None:
        self.inputs = {name: value.clone() for name, value in batch.inputs.items()}
        self.labels_b = batch.labels_b.clone()
        self.parameters = parameters
        static = replace(batch, inputs=self.inputs, labels_b=self.labels_b)
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries initialise in their first calls, which cannot be recorded
            for _ in range(2):
                compute(static)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        # Meanwhile another thread may move the next batches to the GPU.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.loss = compute(static)
        self.gradients = [parameter.grad for parameter in parameters]

    def replay(self, batch: Batch) -> Tensor:
        for name, value in batch.inputs.items():
            self.inputs[name].copy_(value, non_blocking=True)
        self.labels_b.copy_(batch.labels_b, non_blocking=True)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.loss


def _seconds(compute: Loss, batch: Batch) -> float:
    torch.cuda.synchronize()
    started = perf_counter()
    compute(batch)
    torch.cuda.synchronize()
    return perf_counter() - started
