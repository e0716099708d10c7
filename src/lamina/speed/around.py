"""accelerate: puts everything of `lamina.speed` around a learner."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import nn

from lamina.engine.steps import Loss, Planned, Steps
from lamina.engine.world import ALONE, World
from lamina.learner import Learner
from lamina.speed.attention import use_plain_attention
from lamina.speed.composed_weight import ComposedLinear
from lamina.speed.cuda_graph import GraphedGradients, worth_recording
from lamina.speed.fused_block import fuse
from lamina.speed.instance import replace
from lamina.speed.prefetch import prefetched
from lamina.speed.rms_norm import lean_norms
from lamina.speed.shard_backbone import is_sharded
from lamina.speed.share_batch import share
from lamina.speed.split_batch import SplitBatch, Workers
from lamina.types import Batch


class Accelerated(Steps):
    """Faster steps for one learner. They hold threads and must be closed."""

    def __init__(self, learner: Learner, undo: ExitStack, *, record: bool = True) -> None:
        """record: whether steps may be recorded as CUDA graphs."""
        self.learner, self._undo, self._record = learner, undo, record

    def batches(self, makers: Iterable[Callable[[], Batch]]) -> Iterator[Batch]:
        return prefetched(makers) if self.learner.device.type == "cuda" else super().batches(makers)

    def gradients(self, loss: Loss, parameters: Sequence[nn.Parameter], task: Planned) -> Loss:
        if self._record and worth_recording(self.learner, task.full_batches):
            return GraphedGradients(loss, parameters, task.batch_size, task.note)
        return super().gradients(loss, parameters, task)

    def close(self) -> None:
        """Stop the threads and undo everything: the learner computes the plain way afterwards. May be called twice."""
        self._undo.close()


def accelerate(learner: Learner, world: World = ALONE) -> Accelerated:
    """Make a learner faster until the result is closed. The result tells a loop how to make batches and gradients.

    Adapted layers compose their weights. On a CPU, bf16 backbones also get lean norms, fused blocks and, where it is
    differentiated, plain attention; float32 backbones compute the two halves of a batch in parallel if the number of threads,
    as it is now, is even. Of several processes each computes its part of a batch.
    Raises ValueError where the learner is accelerated already.
    """
    layers = [ComposedLinear(layer) for layer in learner.layers.values()]
    if any("with_live" in vars(one.layer) for one in layers):
        raise ValueError("the learner is accelerated already: close what accelerate() returned before")
    backbone, on_cpu = learner.backbone, learner.device.type == "cpu"
    with ExitStack() as undo:
        for one in layers:
            undo.callback(replace(one.layer, "with_live", one))
        if on_cpu and learner.dtype == torch.bfloat16:
            undo.callback(use_plain_attention(backbone.module))
            undo.callback(lean_norms(backbone.module))
            whole = world.size == 1 or not is_sharded(backbone.module)
            for path in backbone.stages[1:] if backbone.fusible and whole else ():
                undo.callback(fuse(backbone.module.get_submodule(path)))
        elif on_cpu and learner.dtype == torch.float32 and torch.get_num_threads() % 2 == 0 and world.size == 1:
            workers = Workers()
            undo.callback(workers.close)
            undo.callback(replace(backbone, "forward", SplitBatch(learner, layers, workers)))
        if world.size > 1:
            for name, shared in share(learner, layers, world).items():
                undo.callback(replace(backbone, name, shared))
        return Accelerated(learner, undo.pop_all(), record=world.size == 1)
