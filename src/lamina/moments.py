"""Second moments of what goes into linear layers, in one pass and without keeping any input.

Shape letters: b batch, t tokens, d width.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class SecondMoment:
    """A running sum of x x^T over tokens. The sum is kept in float64, each batch is one float32 matrix product."""

    sum_dd: Tensor | None = None
    count: int = 0

    def add(self, inputs_btd: Tensor, mask_bt: Tensor | None) -> None:
        rows_nd = (
            inputs_btd.detach().reshape(-1, inputs_btd.shape[-1]) if mask_bt is None else inputs_btd[mask_bt.bool()]
        )
        rows_nd = rows_nd.detach().float()
        product_dd = (rows_nd.T @ rows_nd).double()
        self.sum_dd = product_dd if self.sum_dd is None else self.sum_dd + product_dd
        self.count += len(rows_nd)

    @property
    def mean_dd(self) -> Tensor:
        """The uncentred second moment E[x x^T], (d, d) float64."""
        if self.sum_dd is None:
            raise ValueError("no input was seen: the pass over the data was empty")
        return self.sum_dd / self.count


@dataclass
class Recording:
    moments: dict[str, SecondMoment]
    mask_bt: Tensor | None = field(default=None)
    """Which tokens of the batch under way are real (text is padded); None where all are."""


@contextmanager
def recording(modules: Mapping[str, nn.Module]) -> Iterator[Recording]:
    """While open, every forward through one of these modules adds its input to the moment of the same name."""
    record = Recording({name: SecondMoment() for name in modules})

    def hook_for(name: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            record.moments[name].add(inputs[0], record.mask_bt)

        return hook

    handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            yield record
    finally:
        for handle in handles:
            handle.remove()
