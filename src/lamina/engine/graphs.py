"""Training steps on a card from a recording.

A step of a small batch is a thousand short kernels, and the processor needs longer to ask for them than the card to compute
them. A CUDA graph asks once. Where a step is not short there is nothing to win, and slower kernels may be recorded than would
be called: so a recording is timed before it is used. What is recorded is the loss and its gradients; what stands around them
(optimiser, projections of methods) is called as ever. Between two steps of a task nothing but numbers in tensors may change
for what a method computes as its loss: that is a law for methods, to which tests/conformance/test_recorded.py holds them all.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter

import torch
from torch import Tensor, nn

from lamina.types import Batch

WORTH_IT = 50
"""Steps of one kind from which on a recording is made and timed, which costs about ten."""
FASTER = 0.9
"""A recording is used where a step from it takes at most this much of a step without."""


class Gradients:
    """Computes the loss of batches, and leaves its gradients in the parameters.

    compute: the loss of a batch. recorded: the size of the batches that are computed from a recording, if that is faster, which
    is found out with the first of them; None: no recording. note: told where a recording cannot be made.
    """

    def __init__(
        self,
        compute: Callable[[Batch], Tensor],
        parameters: Sequence[nn.Parameter],
        recorded: int | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.compute, self.parameters, self.recorded, self.note = compute, parameters, recorded, note
        self._recording: _Recording | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """The loss, ()."""
        if len(batch) == self.recorded:
            try:
                self._recording = self._recording or self._record(batch)
            except RuntimeError as error:  # also what PyTorch says where memory is short
                reason = str(error).partition("\n")[0]
                self.note(f"training steps cannot be recorded as a CUDA graph here, and go on without one: {reason}")
            if self._recording is not None:
                return self._recording.replay(batch)
            self.recorded = None
            torch.cuda.empty_cache()
        return self._plain(batch)

    def _record(self, batch: Batch) -> "_Recording | None":
        """A recording, if it is faster."""
        recording = _Recording(self._plain, self.parameters, batch)
        plain, replayed = (min(_seconds(way, batch) for _ in range(3)) for way in (self._plain, recording.replay))
        return recording if replayed <= FASTER * plain else None

    def _plain(self, batch: Batch) -> Tensor:
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.compute(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


class _Recording:
    def __init__(self, compute: Callable[[Batch], Tensor], parameters: Sequence[nn.Parameter], batch: Batch) -> None:
        self.inputs = {name: value.clone() for name, value in batch.inputs.items()}
        self.labels_b = batch.labels_b.clone()
        self.parameters = parameters
        static = replace(batch, inputs=self.inputs, labels_b=self.labels_b)
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries set themselves up in their first calls, which cannot be recorded
            for _ in range(2):
                compute(static)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
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


def _seconds(compute: Callable[[Batch], Tensor], batch: Batch) -> float:
    torch.cuda.synchronize()
    started = perf_counter()
    compute(batch)
    torch.cuda.synchronize()
    return perf_counter() - started
