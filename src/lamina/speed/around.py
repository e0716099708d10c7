"""accelerate: puts everything of `lamina.speed` around a learner."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from lamina.engine.steps import Loss, Steps
from lamina.learner import Learner
from lamina.speed.attention import use_plain_attention
from lamina.speed.composed_weight import ComposedLinear
from lamina.speed.cuda_graph import GraphedGradients, worth_recording
from lamina.speed.fused_block import fuse
from lamina.speed.prefetch import prefetched
from lamina.speed.split_batch import SplitBatch
from lamina.types import Batch


class Accelerated(Steps):
    """What a loop is given instead of the plain `Steps`. It must be closed."""

    def __init__(self, learner: Learner, split: SplitBatch | None) -> None:
        self.learner, self.split = learner, split

    def batches(self, makers: Iterable[Callable[[], Batch]]) -> Iterator[Batch]:
        return prefetched(makers) if self.learner.device.type == "cuda" else super().batches(makers)

    def gradients(
        self,
        loss: Loss,
        parameters: Sequence[nn.Parameter],
        *,
        batch_size: int,
        full_batches: int,
        note: Callable[[str], None],
    ) -> Loss:
        if worth_recording(self.learner, full_batches):
            return GraphedGradients(loss, parameters, batch_size, note)
        return super().gradients(loss, parameters, batch_size=batch_size, full_batches=full_batches, note=note)

    def close(self) -> None:
        """Stop the threads. The learner computes the plain way afterwards."""
        if self.split is not None:
            self.learner.backbone.forward = self.split.plain
            self.split.close()
            self.split = None


def accelerate(learner: Learner) -> Accelerated:
    """Make a new learner faster, and return how a loop makes its batches and gradients.

    Adapted layers compose their weights. On a CPU, bf16 backbones get plain attention and fused blocks, and float32
    backbones compute a batch in two halves if the number of threads is even.
    """
    layers = [ComposedLinear(layer) for layer in learner.layers.values()]
    for composed in layers:
        vars(composed.layer)["with_live"] = composed
    split = None
    if learner.device.type == "cpu" and learner.dtype == torch.bfloat16:
        use_plain_attention(learner.backbone)
        for path in learner.backbone.stages[1:] if learner.backbone.fusible else ():
            fuse(learner.backbone.module.get_submodule(path))
    elif learner.device.type == "cpu" and torch.get_num_threads() % 2 == 0:
        split = SplitBatch(learner, layers)
        learner.backbone.forward = split
    return Accelerated(learner, split)
