"""Mixture: routed adapters of one linear layer, selected or weighted per example.

Shape letters: o outputs, i inputs, r rank, b batch, t tokens, e routed adapters.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lamina.adapters.low_rank import OutputRange

Router = Tensor | Callable[[Tensor], Tensor]
"""How routed adapters are selected: one per example, as positions (b,) with -1 for none; or a function from the layer's
input (b, t, i) to a gate for every example and adapter (b, e)."""


class Mixture(NamedTuple):
    """The active routed adapters of one layer. The factors are in the compute precision."""

    outputs: OutputRange
    ups_eor: Tensor
    downs_eri: Tensor
    router: Router

    def gates(self, x_bti: Tensor) -> Tensor:
        """Returns the factor of every adapter for every example, (b, e)."""
        if isinstance(self.router, Tensor):
            adapter_e = torch.arange(len(self.ups_eor), device=self.router.device)
            return (self.router[:, None] == adapter_e).to(x_bti.dtype)
        return self.router(x_bti).to(x_bti.dtype)

    def update(self, x_bti: Tensor) -> Tensor:
        """Returns what the adapters add to these outputs, (b, t, o). With one adapter per example only that is computed."""
        if isinstance(self.router, Tensor):
            any_b, adapter_b = (self.router >= 0).to(x_bti.dtype), self.router.clamp_min(0)
            inner_btr = x_bti @ (self.downs_eri[adapter_b] * any_b[:, None, None]).mT
            return inner_btr @ self.ups_eor[adapter_b].mT
        inner_bter = torch.einsum("bti,eri->bter", x_bti, self.downs_eri) * self.gates(x_bti)[:, None, :, None]
        return torch.einsum("bter,eor->bto", inner_bter, self.ups_eor)
