"""Frozen weights shared out over the processes of a run (PyTorch's FSDP2): each process holds a part of every block, and
gathers the whole block only while it computes with it, in the forward and again in the backward.

Adapted layers stay whole in every process, and so do weights that two parts of the model share (tied embeddings): methods read
the first, and the second are needed at both ends of a forward. Adapters, head and optimiser are small, and whole as well.
"""

from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lamina.backbones import Backbone
from lamina.engine.world import World
from lamina.errors import ConfigError
from lamina.learner import Learner


class Held(NamedTuple):
    """Bytes of frozen weights."""

    here: int
    """In this process, while it computes nothing."""
    total: int


def shard(backbone: Backbone, adapted: Collection[str], world: World, device: torch.device) -> None:
    """Leave this process its part of the frozen weights, on the device. All processes must call it. It cannot be undone.

    adapted: paths of the linear layers that have adapters, or will have them.
    Raises ConfigError for a backbone that does not name its blocks.
    """
    if not backbone.stages:
        raise ConfigError(
            f"backbone.shard = true: backbone {backbone.name!r} does not name its blocks. Give `stages` to from_module(), or "
            f"leave backbone.shard at false."
        )
    from torch.distributed.device_mesh import init_device_mesh  # takes most of a second, which few runs need
    from torch.distributed.fsdp import fully_shard

    paths = [*backbone.stages, *([] if backbone.language is None else [backbone.language.head])]
    parts = [backbone.module.get_submodule(path) for path in paths]
    # By number: a name for a whole weight here would keep it in memory.
    uses = Counter(id(parameter) for part in parts for parameter in part.parameters())
    whole = {number for number, count in uses.items() if count > 1}
    whole |= {id(one) for path in adapted for one in backbone.module.get_submodule(path).parameters()}
    mesh = init_device_mesh(device.type, (world.size,))
    for part in parts:
        if any(id(one) not in whole for one in part.parameters()):
            ignored = {one for one in part.parameters() if id(one) in whole}
            fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)


def is_sharded(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in module.modules())


def held(learner: Learner) -> Held:
    """Returns the bytes of frozen weights in this process, and in one that shards nothing. Both count the float32 copies of
    adapted layers."""
    from torch.distributed.tensor import DTensor

    frozen = [one for one in learner.backbone.module.parameters() if not one.requires_grad]
    copies = [
        weight for layer in learner.layers.values() for weight in (layer.base_oi, layer.folded_oi, layer.weight_oi)
    ]
    distinct: dict[int, Tensor] = {copy.data_ptr(): copy for copy in copies}
    whole = sum(copy.nbytes for copy in distinct.values())
    here = sum((one.to_local() if isinstance(one, DTensor) else one).nbytes for one in frozen)
    return Held(whole + here, whole + sum(one.nbytes for one in frozen))
