"""Branch, LowRank: a trainable low-rank update of one linear layer, and what stays of it after training.

    ΔW = up down            up (o, r), down (r, i)

Shape letters: o outputs, i inputs, r rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class OutputRange(NamedTuple):
    """The output units of a linear layer that a branch updates: start (included) to stop (excluded)."""

    start: int
    stop: int


class Update(NamedTuple):
    """A low-rank update of part of a weight: up_or @ down_ri is added to these outputs."""

    outputs: OutputRange
    up_or: Tensor
    down_ri: Tensor


class Finished(NamedTuple):
    """The float32 factors of a branch that is no longer trained."""

    outputs: OutputRange
    up_or: Tensor
    down_ri: Tensor
    folded: bool = True
    """False for a routed adapter, which has no effect until a Mixture selects it."""

    @property
    def update(self) -> Update:
        return Update(self.outputs, self.up_or, self.down_ri)


class Branch(nn.Module, ABC):
    """A parametrised low-rank update of one linear layer. A subclass defines how the two factors arise.

    A branch is built from named tensors, trained ones and frozen ones. Saving and restoring it is therefore the same
    code for every subclass.
    """

    undecayed: ClassVar[tuple[str, ...]] = ()
    """Trained tensors that are excluded from weight decay."""

    def __init__(self, *, trained: Mapping[str, Tensor], frozen: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        for name, value in trained.items():
            self.register_parameter(name, nn.Parameter(float32_copy(value)))
        for name, value in (frozen or {}).items():
            self.register_buffer(name, float32_copy(value))

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """Returns up (o, r) and down (r, i), float32. The weight update is up @ down."""

    def trained(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())

    def frozen(self) -> dict[str, Tensor]:
        return dict(self.named_buffers())


class LowRank(Branch):
    """LoRA (Hu et al., ICLR 2022) without a scale. Its tensors, trained or frozen, are `up` (o, r) and `down` (r, i)."""

    up: Tensor
    down: Tensor

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.up, self.down

    @classmethod
    def fresh(cls, d_out: int, d_in: int, rank: int, generator: torch.Generator) -> "LowRank":
        """Returns LoRA's initialisation: up zero, down uniform with variance 1 / (3 d_in) (Kaiming-uniform, a = √5)."""
        bound = d_in**-0.5
        down_ri = torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator)
        return cls(trained={"up": torch.zeros(d_out, rank), "down": down_ri})


def float32_copy(value: Tensor) -> Tensor:
    """Returns a contiguous float32 copy. Matrix products of other memory layouts may differ in their last bits."""
    return value.detach().float().clone(memory_format=torch.contiguous_format)
