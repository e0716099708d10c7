"""AdaptedLinear: a frozen linear layer plus low-rank branches.

    y = W x + b + Σ_k up_k (down_k x)

Finished branches are folded into the weight, so only live ones cost anything. Routed adapters are finished branches that
are not folded; they have no effect unless a `Mixture` selects them per example. The pristine weight W_0 is kept. The folded
weight is W_0 plus one product after another, in float32 and in the order in which the branches were finished, so its bits
are the same whether it grows branch by branch or is recomputed, and folding can be undone.

Shape letters: o outputs, i inputs, r rank, b batch, t tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.adapters.low_rank import Branch, Finished, OutputRange, Update, float32_copy
from lamina.adapters.mixture import Mixture


class AdaptedLinear(nn.Module):
    """A frozen linear layer with branches. Its weight is held in the compute precision, its branches in float32.

    Names of branches are unique within a layer. `live` holds the branches in training, `finished` those whose training
    has ended, `mixtures` the routed adapters that are active now.
    """

    weight_oi: Tensor
    bias_o: Tensor | None

    def __init__(self, linear: nn.Linear, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.base_oi = linear.weight.detach().float().clone()
        self.register_buffer("weight_oi", self.base_oi.to(dtype), persistent=False)
        bias = None if linear.bias is None else linear.bias.detach().to(dtype).clone()
        self.register_buffer("bias_o", bias, persistent=False)
        self.finished: dict[str, Finished] = {}
        self.live = nn.ModuleDict()
        self.outputs: dict[str, OutputRange] = {}
        """Of every live branch."""
        self.mixtures: dict[str, Mixture] = {}
        self.folded_oi = self.base_oi
        """W_0 and all folded branches, float32."""
        self.live_apart = True
        """Whether live branches are computed beside the weight, not folded into it."""

    @property
    def d_out(self) -> int:
        return self.base_oi.shape[0]

    @property
    def d_in(self) -> int:
        return self.base_oi.shape[1]

    @property
    def device(self) -> torch.device:
        return self.base_oi.device

    def forward(self, x: Tensor) -> Tensor:
        y = self.with_live(x)
        for mixture in self.mixtures.values():
            y = y + F.pad(mixture.update(x), self._padding(mixture.outputs))
        return y

    def with_live(self, x: Tensor) -> Tensor:
        """Returns W x + b and the live branches, computed in the precision of x."""
        y = F.linear(x, self.weight_oi, self.bias_o)
        for outputs, up_or, down_ri in self.live_updates():
            y = y + F.pad(x @ down_ri.to(x.dtype).T @ up_or.to(x.dtype).T, self._padding(outputs))
        return y

    def live_updates(self) -> list[Update]:
        """Returns the updates of the live branches, with gradients; none while they are folded."""
        if not self.live_apart:
            return []
        return [Update(self.outputs[n], *b.factors()) for n, b in self.live.items() if isinstance(b, Branch)]

    def effective(self) -> Tensor:
        """Returns the weight (o, i) in use, live branches included, folded or not. Routed adapters are not part of it."""
        updates = self.live_updates()
        return plus(self.folded_oi, updates).to(self.weight_oi.dtype) if updates else self.weight_oi

    def add(self, name: str, branch: Branch, outputs: OutputRange | None = None) -> None:
        """Add a live branch for these outputs (all of them by default), on the device of the layer.

        Raises ValueError on a name in use or factors of the wrong shape.
        """
        outputs = outputs or OutputRange(0, self.d_out)
        if name in self.live or name in self.finished:
            raise ValueError(f"branch {name!r} exists already")
        up_or, down_ri = branch.to(self.device).factors()
        wanted = (outputs.stop - outputs.start, self.d_in)
        if (up_or.shape[0], down_ri.shape[1]) != wanted or up_or.shape[1] != down_ri.shape[0]:
            raise ValueError(f"branch {name!r} maps {tuple(up_or.shape)} x {tuple(down_ri.shape)}, the layer {wanted}")
        self.live[name] = branch
        self.outputs[name] = outputs

    def finish(self, name: str, *, fold: bool = True) -> None:
        """End the training of a live branch. Its factors are folded, or kept as a routed adapter."""
        branch = self.live.pop(name)
        assert isinstance(branch, Branch)
        up_or, down_ri = (float32_copy(factor) for factor in branch.factors())
        self.finished[name] = Finished(self.outputs.pop(name), up_or, down_ri, fold)
        if fold:
            self.folded_oi = plus(self.folded_oi, [self.finished[name].update])
        self.unfold_live()

    def drop(self, name: str) -> None:
        """Remove a branch, live or finished. Raises KeyError where there is none of this name."""
        if name in self.live:
            self.live.pop(name)
            self.outputs.pop(name)
            self.unfold_live()
        else:
            del self.finished[name]
            self.refold()

    def refold(self) -> None:
        """Recompute the weight from the pristine weight and the factors: W_0 + Σ_k up_k down_k in float32, then rounded."""
        self.folded_oi = plus(self.base_oi, [part.update for part in self.finished.values() if part.folded])
        self.unfold_live()

    def fold_live(self) -> None:
        """Fold the live branches as well. No gradients reach them until `unfold_live`."""
        self.weight_oi = self.effective()
        self.live_apart = False

    def unfold_live(self) -> None:
        self.weight_oi = self.folded_oi.to(self.weight_oi.dtype)
        self.live_apart = True

    def _padding(self, outputs: OutputRange) -> tuple[int, int]:
        return outputs.start, self.d_out - outputs.stop


def plus(weight_oi: Tensor, updates: Sequence[Update]) -> Tensor:
    """Returns a new matrix, one update added after another, without gradients; the same matrix if there are none."""
    if not updates:
        return weight_oi
    with torch.no_grad():
        sum_oi = weight_oi.clone()
        for outputs, up_or, down_ri in updates:
            sum_oi[outputs.start : outputs.stop] += up_or @ down_ri
    return sum_oi


@contextmanager
def all_folded(layers: Mapping[str, AdaptedLinear]) -> Iterator[None]:
    """Within the context live branches are folded too, so a forward costs what the bare backbone costs. Layers whose live
    branches are folded already are left as they are."""
    apart = [layer for layer in layers.values() if layer.live_apart]
    for layer in apart:
        layer.fold_live()
    try:
        yield
    finally:
        for layer in apart:
            layer.unfold_live()


@contextmanager
def bare(layers: Mapping[str, AdaptedLinear]) -> Iterator[None]:
    """Within the context the layers are those of the pre-trained model. Afterwards they are as before, folded or not."""
    before = [(layer, layer.weight_oi, layer.live_apart) for layer in layers.values()]
    for layer in layers.values():
        layer.weight_oi, layer.live_apart = layer.base_oi.to(layer.weight_oi.dtype), False
    try:
        yield
    finally:
        for layer, weight_oi, live_apart in before:
            layer.weight_oi, layer.live_apart = weight_oi, live_apart


def inject(module: nn.Module, path: str, dtype: torch.dtype = torch.float32) -> AdaptedLinear:
    """Replace the linear layer at this path (as in `module.get_submodule`) by an adapted one, and return that.

    Raises TypeError where the path does not lead to an nn.Linear.
    """
    linear = module.get_submodule(path)
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{path} is a {type(linear).__name__}, only nn.Linear can be adapted")
    adapted = AdaptedLinear(linear, dtype)
    parent, _, leaf = path.rpartition(".")
    setattr(module.get_submodule(parent), leaf, adapted)
    return adapted
