"""The low-rank updates of a learner, one per linear layer.

Shape letters: o outputs, i inputs of a linear layer, r rank.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.adapters import AdaptedLinear, Update
from lamina.learner import Learner
from lamina.maths.linalg import factors_of

ROUNDING = 1e-7
"""Share of the largest singular value below which a direction is rounding noise of float32."""


class Factors(NamedTuple):
    """ΔW = up down of a whole linear layer, float32."""

    up_or: Tensor
    down_ri: Tensor

    @property
    def rank(self) -> int:
        return len(self.down_ri)


def whole(learner: Learner) -> dict[str, Factors]:
    """Returns the sum of all branches of each linear layer, live or folded, by its path in the backbone. Layers without an
    update are left out."""
    return _gathered(learner, lambda _: True, live=True)


def of_branch(learner: Learner, name: str) -> dict[str, Factors]:
    """Returns the update of one finished branch, by the path of the linear layer."""
    return _gathered(learner, lambda branch: branch == name, live=False)


def _gathered(learner: Learner, wanted: Callable[[str], bool], *, live: bool) -> dict[str, Factors]:
    found: dict[str, list[Update]] = {}
    for site in learner.sites.values():
        parts = found.setdefault(site.where.path, [])
        parts += [part.update for name, part in site.finished().items() if wanted(name) and (part.folded or not live)]
        if live:
            parts += [Update(site.outputs, *(f.detach() for f in b.factors())) for b in site.live().values()]
    factors = {path: stacked(parts, learner.layers[path].d_out) for path, parts in found.items() if parts}
    return {path: one for path, one in factors.items() if one.rank}


def stacked(updates: list[Update], d_out: int) -> Factors:
    """Returns the sum of updates as one: downs above each other, ups side by side, padded with zeros to all outputs. Ranks of
    zero are left out. If the rank is more than the sum needs, it is factored again."""
    ups, downs = [], []
    for outputs, up_or, down_ri in updates:
        alive_r = (up_or.abs().amax(0) > 0) & (down_ri.abs().amax(1) > 0)
        ups.append(F.pad(up_or[:, alive_r], (0, 0, outputs.start, d_out - outputs.stop)))
        downs.append(down_ri[alive_r])
    up_or, down_ri = torch.cat(ups, 1).float().cpu(), torch.cat(downs).float().cpu()
    least = needed_rank(up_or, down_ri)
    if least < len(down_ri):
        up_or, down_ri = (part.float() for part in factors_of(up_or.double() @ down_ri.double()))
    return Factors(up_or.contiguous(), down_ri.contiguous())


def needed_rank(up_or: Tensor, down_ri: Tensor) -> int:
    """Returns the rank of up down to float32 precision."""
    if not len(down_ri):
        return 0
    left_rr = torch.linalg.qr(up_or.double())[1]
    right_rr = torch.linalg.qr(down_ri.double().T)[1]
    values_k = torch.linalg.svdvals(left_rr @ right_rr.T)
    return int((values_k > ROUNDING * values_k[0]).sum())


def plain_module(learner: Learner) -> nn.Module:
    """Returns the backbone's module with ordinary linear layers in place of the adapted ones, all updates folded in. The
    learner must not be used afterwards."""
    module = learner.backbone.module
    for path, layer in learner.layers.items():
        parent, _, leaf = path.rpartition(".")
        setattr(module.get_submodule(parent), leaf, plain_linear(layer))
    return module


def plain_linear(layer: AdaptedLinear) -> nn.Linear:
    """Returns an ordinary linear layer with the weight in use."""
    made = nn.Linear(layer.d_in, layer.d_out, bias=layer.bias_o is not None).requires_grad_(False)
    made.weight.copy_(layer.effective().float())
    if layer.bias_o is not None:
        made.bias.copy_(layer.bias_o.float())
    return made


def state_of(learner: Learner, *, folded: bool) -> dict[str, Tensor]:
    """Returns the tensors of the backbone as transformers names them, float32: with all updates folded in, or as they were
    before anything was learnt."""
    layers: Mapping[str, AdaptedLinear] = learner.layers
    found = {}
    for name, value in learner.backbone.module.state_dict().items():
        if not any(name.startswith(f"{path}.") for path in layers):
            found[name] = value.detach().float() if value.is_floating_point() else value.detach()
    for path, layer in layers.items():
        found[f"{path}.weight"] = (layer.effective() if folded else layer.base_oi).detach().float().clone()
        if layer.bias_o is not None:
            found[f"{path}.bias"] = layer.bias_o.detach().float().clone()
    return found
