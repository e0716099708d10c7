"""Watchers of the inputs of linear layers, and second moments of these, accumulated in one pass without storing any input.

Shape letters: b batch, t tokens, n tokens of all examples, d width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lamina.errors import TrainingError


class Watcher:
    """A forward pre-hook that shows the input of a module to a function, without gradients, and changes nothing."""

    def __init__(self, show: Callable[[Tensor], None]) -> None:
        self.show = show

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            self.show(inputs[0])


@dataclass
class SecondMoment:
    """A running sum of x x^T over tokens. The sum is float64, each batch one float32 matrix product."""

    sum_dd: Tensor | None = None
    count: int = 0

    def add(self, inputs_btd: Tensor, mask_bt: Tensor | None) -> None:
        """mask_bt: which tokens are real (texts are padded); None if all are."""
        tokens_nd = inputs_btd.reshape(-1, inputs_btd.shape[-1]) if mask_bt is None else inputs_btd[mask_bt.bool()]
        with _exact_product(tokens_nd):
            tokens_nd = tokens_nd.detach().float()
            product_dd = (tokens_nd.T @ tokens_nd).double()
        self.sum_dd = product_dd if self.sum_dd is None else self.sum_dd + product_dd
        self.count += len(tokens_nd)

    @property
    def mean_dd(self) -> Tensor:
        """The uncentred second moment E[x x^T], (d, d) float64. Raises ValueError where no input was seen."""
        if self.sum_dd is None:
            raise ValueError("no input was seen: the pass over the data was empty")
        return self.sum_dd / self.count


def check_moment(moment: Tensor, what: str) -> None:
    """Raises TrainingError for a moment that is not finite. what: the name of its vectors, for the message."""
    if not torch.isfinite(moment).all():
        raise TrainingError(
            f"the second moment of the {what} is not finite (NaN, infinity or overflow). An example is not finite, or training "
            f"diverged: check the data, and use a smaller training.lr."
        )


@contextmanager
def _exact_product(tokens: Tensor) -> Iterator[None]:
    """Within the context the CPU may multiply numbers that were bf16 as bf16, which is exact. Sums stay float32."""
    before = torch.get_float32_matmul_precision()
    if tokens.dtype == torch.bfloat16 and tokens.device.type == "cpu":
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass
class Recording:
    """The moments of several layers during a pass."""

    moments: dict[str, SecondMoment]
    mask_bt: Tensor | None = None
    """Which tokens of the current batch are real; None if all are."""


@contextmanager
def recording(modules: Mapping[str, nn.Module]) -> Iterator[Recording]:
    """Within the context every forward through one of these modules adds its input to the moment of the same name."""
    record = Recording({name: SecondMoment() for name in modules})

    def add(name: str, inputs_btd: Tensor) -> None:
        record.moments[name].add(inputs_btd, record.mask_bt)

    handles = [module.register_forward_pre_hook(Watcher(partial(add, name))) for name, module in modules.items()]
    try:
        with torch.no_grad():
            yield record
    finally:
        for handle in handles:
            handle.remove()
