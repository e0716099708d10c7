"""Second moments of what goes into linear layers, in one pass and without keeping any input.

Shape letters: b batch, t tokens, d width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident

import torch
from torch import Tensor, nn

Look = Callable[[nn.Module, tuple[Tensor, ...]], None]
"""A forward pre-hook that changes nothing."""


def only_looks(hook: Look) -> Look:
    """Says so of a hook, which is then called by maps that are computed together with others, too (`lamina.block`)."""
    hook.only_looks = True  # type: ignore[attr-defined]
    return hook


def looks_only(hook: object) -> bool:
    return getattr(hook, "only_looks", False)


@dataclass
class SecondMoment:
    """A running sum of x x^T over tokens. The sum is kept in float64, each batch is one float32 matrix product."""

    sum_dd: Tensor | None = None
    count: int = 0

    def add(self, inputs_btd: Tensor, mask_bt: Tensor | None) -> None:
        rows_nd = inputs_btd.reshape(-1, inputs_btd.shape[-1]) if mask_bt is None else inputs_btd[mask_bt.bool()]
        with _nothing_lost(rows_nd):
            rows_nd = rows_nd.detach().float()
            self.include(SecondMoment((rows_nd.T @ rows_nd).double(), len(rows_nd)))

    def include(self, other: "SecondMoment") -> None:
        if other.sum_dd is not None:
            self.sum_dd = other.sum_dd if self.sum_dd is None else self.sum_dd + other.sum_dd
            self.count += other.count

    @property
    def mean_dd(self) -> Tensor:
        """The uncentred second moment E[x x^T], (d, d) float64."""
        if self.sum_dd is None:
            raise ValueError("no input was seen: the pass over the data was empty")
        return self.sum_dd / self.count


@contextmanager
def _nothing_lost(rows: Tensor) -> Iterator[None]:
    """While open, float32 products of what were these bf16 numbers may read them as bf16 again, which is exact, and faster
    where a processor has instructions for it. Sums are float32 in any case."""
    before = torch.get_float32_matmul_precision()
    if rows.dtype == torch.bfloat16 and rows.device.type == "cpu":
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass
class Recording:
    moments: dict[str, SecondMoment]
    _seen: dict[str, dict[int, SecondMoment]] = field(default_factory=dict)
    """Of the batch under way, by thread."""
    _mask_bt: Tensor | None = None

    @contextmanager
    def batch(self, mask_bt: Tensor | None = None) -> Iterator[None]:
        """Around what is computed of one batch, in one piece or by two threads: which of them is first changes no bit, for
        the sum of two numbers does not depend on their order. mask_bt: which tokens are real (text is padded); None where
        all are, as it must be with two threads."""
        self._seen, self._mask_bt = {name: {} for name in self.moments}, mask_bt
        yield
        for name, seen in self._seen.items():
            of_batch = SecondMoment()
            for of_thread in seen.values():
                of_batch.include(of_thread)
            self.moments[name].include(of_batch)

    def see(self, name: str, inputs_btd: Tensor) -> None:
        self._seen[name].setdefault(get_ident(), SecondMoment()).add(inputs_btd, self._mask_bt)


@contextmanager
def recording(modules: Mapping[str, nn.Module]) -> Iterator[Recording]:
    """While open, every forward through one of these modules adds its input to the moment of the same name, batch by batch."""
    record = Recording({name: SecondMoment() for name in modules})

    def hook_for(name: str) -> Look:
        return only_looks(lambda _, inputs: record.see(name, inputs[0]))

    handles = [module.register_forward_pre_hook(hook_for(name)) for name, module in modules.items()]
    try:
        with torch.no_grad():
            yield record
    finally:
        for handle in handles:
            handle.remove()
