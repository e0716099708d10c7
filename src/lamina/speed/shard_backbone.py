"""Frozen weights shared out over the processes of a run (PyTorch's FSDP2): each process holds a part of every block, and
gathers the whole block only while it computes with it, in the forward and again in the backward.

Adapted layers stay whole in every process, and so do weights that two parts of the model share (tied embeddings): methods read
the first, and the second are needed at both ends of a forward. Adapters, head and optimiser are small, and whole as well.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import nn

from lamina.backbones import Backbone
from lamina.engine.world import World
from lamina.errors import ConfigError


class Held(NamedTuple):
    """Bytes of frozen weights."""

    here: int
    """In this process, while it computes nothing."""
    total: int


def shard(backbone: Backbone, adapted: Collection[str], world: World, device: torch.device) -> Held:
    """Leave this process its part of the frozen weights, on the device. All processes must call it. It cannot be undone.

    adapted: paths of the linear layers that have adapters, or will have them.
    Raises ConfigError for a backbone that does not name its blocks.
    """
    if not backbone.stages:
        raise ConfigError(
            f"backbone.shard = true: backbone {backbone.name!r} does not name its blocks. Give `stages` to from_module(), or "
            f"leave backbone.shard at false."
        )
    module = backbone.module
    paths = [*backbone.stages, *([] if backbone.language is None else [backbone.language.head])]
    held_by: dict[nn.Parameter, int] = {}
    for path in paths:
        for parameter in module.get_submodule(path).parameters():
            held_by[parameter] = held_by.get(parameter, 0) + 1
    shared = {parameter for parameter, count in held_by.items() if count > 1}
    kept = shared.union(*(module.get_submodule(path).parameters() for path in adapted))
    from torch.distributed.device_mesh import init_device_mesh  # takes most of a second, which few runs need
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh(device.type, (world.size,))
    for path in paths:
        part = module.get_submodule(path)
        if not kept.issuperset(part.parameters()):
            fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=kept & {*part.parameters()})
    parameters = [*module.parameters()]
    here = sum((one.to_local() if isinstance(one, DTensor) else one).nbytes for one in parameters)
    return Held(here, sum(one.nbytes for one in parameters))


def is_sharded(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in module.modules())
