"""Branch, LowRank, AdaptedLinear, inject: a frozen linear map plus thin low-rank changes.

    y = W x + b + sum_k gain_k up_k (down_k x)

Finished branches are folded into the weight, so only the live ones cost anything; their gain is 1. Experts are finished
branches that are not folded: they are idle unless a `Mixture` gives each input gains of its own. The pristine base is
kept, and the folded weight is W_0 and one product after another, in float32 and in the order the branches were finished:
it has the same bits whether it grows branch by branch or is computed anew, and folding can be undone.

In training the live branches are computed beside the map, as the formula says, or within it where that is faster: see
`AdaptedLinear.forward`.

Shape letters: o outputs, i inputs, r rank, b batch, t tokens, e experts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Branch(nn.Module, ABC):
    """A parametrised low-rank change of one linear map. A subclass says only how its two factors arise.

    It is built from named tensors, those that are trained and those that are not; saving and restoring a branch is
    therefore the same code for all of them.
    """

    undecayed: ClassVar[tuple[str, ...]] = ()
    """Trained tensors that weight decay leaves alone."""

    def __init__(self, *, trained: Mapping[str, Tensor], frozen: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        for name, value in trained.items():
            self.register_parameter(name, nn.Parameter(_own(value)))
        for name, value in (frozen or {}).items():
            self.register_buffer(name, _own(value))

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor]:
        """up (o, r) and down (r, i), float32: the change of the weight is up @ down."""

    def trained(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())

    def frozen(self) -> dict[str, Tensor]:
        return dict(self.named_buffers())


def _own(value: Tensor) -> Tensor:
    """A float32 copy, laid out as a restored one would be: products of other layouts differ in their last bits."""
    return value.detach().float().clone(memory_format=torch.contiguous_format)


class LowRank(Branch):
    """LoRA (Hu et al., ICLR 2022) without a scale: its trained or frozen tensors are `up` (o, r) and `down` (r, i)."""

    up: Tensor
    down: Tensor

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.up, self.down

    @classmethod
    def fresh(cls, d_out: int, d_in: int, rank: int, generator: torch.Generator) -> "LowRank":
        """LoRA's start: up zero, down uniform with variance 1 / (3 d_in) (Kaiming-uniform, a = sqrt 5). Both trained."""
        bound = d_in**-0.5
        down_ri = torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator)
        return cls(trained={"up": torch.zeros(d_out, rank), "down": down_ri})


class Rows(NamedTuple):
    """Which outputs of a linear map a branch changes: start (included) to stop (excluded)."""

    start: int
    stop: int


Change = tuple[Rows, Tensor, Tensor]
"""What a branch adds to a weight: up (o, r) @ down (r, i), to these rows."""
THIN = 10
"""How many times as long as in square matrices an operation takes in thin ones: on two cores, with maps of 192 by 192 and rank
10, a step with the gradient of the whole weight takes as long as one with those of the factors."""


class Finished(NamedTuple):
    """The factors of a branch that is no longer trained, in float32."""

    rows: Rows
    up_or: Tensor
    down_ri: Tensor
    folded: bool = True
    """False for an expert, which changes nothing until a Mixture puts it to work."""


Choice = Tensor | Callable[[Tensor], Tensor]
"""How inputs choose experts: one expert each, positions (b,) with -1 for none; or a function of the layer's input
(b, t, i) that gives every input a gain for every expert, (b, e)."""


class Mixture(NamedTuple):
    """Experts of one layer at work, each input with its own gains. The factors are in the compute precision."""

    rows: Rows
    ups_eor: Tensor
    downs_eri: Tensor
    choice: Choice

    def gains(self, x_bti: Tensor) -> Tensor:
        """What each input multiplies each expert by, (b, e)."""
        if isinstance(self.choice, Tensor):
            expert_e = torch.arange(len(self.ups_eor), device=self.choice.device)
            return (self.choice[:, None] == expert_e).to(x_bti.dtype)
        return self.choice(x_bti).to(x_bti.dtype)

    def change(self, x_bti: Tensor) -> Tensor:
        """What the experts add to the output, (b, t, o). Of one expert per input only that one is computed."""
        if isinstance(self.choice, Tensor):
            any_b, expert_b = (self.choice >= 0).to(x_bti.dtype), self.choice.clamp_min(0)
            inner_btr = x_bti @ (self.downs_eri[expert_b] * any_b[:, None, None]).mT
            return inner_btr @ self.ups_eor[expert_b].mT
        inner_bter = torch.einsum("bti,eri->bter", x_bti, self.downs_eri) * self.gains(x_bti)[:, None, :, None]
        return torch.einsum("bter,eor->bto", inner_bter, self.ups_eor)


class AdaptedLinear(nn.Module):
    """A frozen linear map with branches. Its weight is held in the compute precision, its branches in float32.

    Names of branches are unique within one map. `live` are those in training, `finished` those that are not any more:
    folded, or experts. `mixtures` are the experts at work now.
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
        self.rows: dict[str, Rows] = {}
        self.mixtures: dict[str, Mixture] = {}
        self._folded_oi = self.base_oi
        self._live_apart = True
        self._summed_oi: Tensor | None = None

    @property
    def d_out(self) -> int:
        return self.base_oi.shape[0]

    @property
    def d_in(self) -> int:
        return self.base_oi.shape[1]

    @property
    def device(self) -> torch.device:
        return self.base_oi.device

    def add(self, name: str, branch: Branch, rows: Rows | None = None) -> None:
        """Put a branch to work on these output rows (all of them if not said), and on the device of the map, where it is
        moved. Raises ValueError on a name in use or factors of the wrong shape."""
        rows = rows or Rows(0, self.d_out)
        if name in self.live or name in self.finished:
            raise ValueError(f"branch {name!r} exists already")
        up_or, down_ri = branch.to(self.device).factors()
        wanted = (rows.stop - rows.start, self.d_in)
        if (up_or.shape[0], down_ri.shape[1]) != wanted or up_or.shape[1] != down_ri.shape[0]:
            raise ValueError(f"branch {name!r} maps {tuple(up_or.shape)} x {tuple(down_ri.shape)}, the layer {wanted}")
        self.live[name] = branch
        self.rows[name] = rows

    def finish(self, name: str, *, fold: bool = True) -> None:
        """End the training of a live branch: keep its factors, and fold them or keep them as an expert."""
        branch = self.live.pop(name)
        assert isinstance(branch, Branch)
        up_or, down_ri = (_own(factor) for factor in branch.factors())
        self.finished[name] = Finished(self.rows.pop(name), up_or, down_ri, fold)
        if fold:
            self._folded_oi = _plus(self._folded_oi, [self.finished[name][:3]])
        self.unfold_live()

    def drop(self, name: str) -> None:
        """Take a branch away, live or finished, as if it had never been. Raises KeyError where there is none."""
        if name in self.live:
            self.live.pop(name)
            self.rows.pop(name)
            self.unfold_live()
        else:
            del self.finished[name]
            self.refold()

    def refold(self) -> None:
        """Compute the weight in use anew from the base and the factors: W_0 + sum_k up_k down_k in float32, then rounded."""
        self._folded_oi = _plus(self.base_oi, [part[:3] for part in self.finished.values() if part.folded])
        self.unfold_live()

    def fold_live(self) -> None:
        """Put the live branches into the weight too. No gradients reach them there."""
        self.weight_oi = _plus(self._folded_oi, self._live_changes()).to(self.weight_oi.dtype)
        self._live_apart = False

    def unfold_live(self) -> None:
        self.weight_oi = self._folded_oi.to(self.weight_oi.dtype)
        self._live_apart = True

    def effective(self) -> Tensor:
        """The weight (o, i) at work now, live branches included, folded or not; experts are not in it. Not to be changed."""
        if not self._live_apart:
            return self.weight_oi
        return _plus(self._folded_oi, self._live_changes()).to(self.weight_oi.dtype)

    def within(self) -> tuple[Tensor, Tensor | None, list[Change]]:
        """The weight (o, i) at work now, live branches included, without gradients; the bias; and those branches, for
        `factor_gradients`."""
        changes = self._live_changes() if self._live_apart else []
        with torch.no_grad():
            return self._summed() if changes else self.weight_oi, self.bias_o, changes

    def forward(self, x: Tensor) -> Tensor:
        """Where a batch has as many tokens as the map has inputs, or more, its weight W' = W + sum_k up_k down_k is cheap to
        build, and the live branches are computed within the map: as a dense map, whose gradient autograd takes on to the
        factors, or as `_Within`, where the dense gradient would cost too much. Where it has fewer, they are computed beside
        the map: `_Beside`."""
        changes = self._live_changes() if self._live_apart else []
        if not changes:
            y = F.linear(x, self.weight_oi, self.bias_o)
        elif not self._within(x):
            y = _Beside.apply(x, self.weight_oi, self.bias_o, *_flat(changes))  # type: ignore[no-untyped-call]
        elif self._dense(changes):
            y = F.linear(x, self._summed() if self._summed_oi is None else self._summed_oi, self.bias_o)
        else:
            summed_oi = self.effective() if self._summed_oi is None else self._summed_oi
            y = _Within.apply(x, summed_oi, self.bias_o, *_flat(changes))  # type: ignore[no-untyped-call]
        for mixture in self.mixtures.values():
            y = y + F.pad(mixture.change(x), (mixture.rows.start, self.d_out - mixture.rows.stop))
        return y

    def _within(self, x: Tensor) -> bool:
        return self._summed_oi is not None or x.shape[:-1].numel() >= self.d_in

    def _dense(self, changes: Sequence[Change]) -> bool:
        rank = sum(len(down_ri) for _, _, down_ri in changes)
        return self.d_out * self.d_in <= THIN * rank * (self.d_out + self.d_in)

    def _summed(self) -> Tensor:
        """As `effective`, with gradients for the factors."""
        sum_oi = self._folded_oi
        for rows, up_or, down_ri in self._live_changes():
            if len(up_or) < self.d_out:
                up_or = F.pad(up_or, (0, 0, rows.start, self.d_out - rows.stop))
            sum_oi = torch.addmm(sum_oi, up_or, down_ri)
        return sum_oi.to(self.weight_oi.dtype)

    def _live_changes(self) -> list[Change]:
        return [
            (self.rows[name], *branch.factors()) for name, branch in self.live.items() if isinstance(branch, Branch)
        ]


def _flat(changes: Sequence[Change]) -> tuple[list[Rows], *tuple[Tensor, ...]]:
    """What a function of autograd takes: the rows of all, and up, down, up, down, ..."""
    return [rows for rows, _, _ in changes], *(factor for _, *pair in changes for factor in pair)


def _plus(weight_oi: Tensor, changes: Sequence[Change]) -> Tensor:
    """A new matrix, one change added after another; the same one where there are none."""
    if not changes:
        return weight_oi
    with torch.no_grad():
        sum_oi = weight_oi.clone()
        for rows, up_or, down_ri in changes:
            sum_oi[rows.start : rows.stop] += up_or @ down_ri
    return sum_oi


class _Within(torch.autograd.Function):
    """y = W' x + b, where W' = W + sum_k up_k down_k is given, with gradients for x and the factors, none for W' and b.

    What the branches cost beside the frozen map is then a thin product or two for each factor that is learnt, and no pass
    over y; where no down is learnt, x need not be kept. Thin matrices lie in few long rows: products of few long columns
    take up to twice as long on a processor.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, summed_oi: Tensor, bias_o: Tensor | None, rows: list[Rows], *factors: Tensor
    ) -> Tensor:
        _, _, _, _, *wanted = ctx.needs_input_grad
        x_ni = x.flatten(0, -2)
        ups_or, downs_ri = ([factor.to(x.dtype) for factor in each] for each in (factors[::2], factors[1::2]))
        inner_rn = [down_ri @ x_ni.T if up else None for up, down_ri in zip(wanted[::2], downs_ri, strict=True)]
        ctx.rows = rows
        ctx.save_for_backward(x_ni if any(wanted[1::2]) else None, summed_oi, *inner_rn, *ups_or)
        return F.linear(x, summed_oi, bias_o)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x_ni, summed_oi, *kept = ctx.saved_tensors
        wanted_x, _, _, _, *wanted = ctx.needs_input_grad
        grad_no = grad_y.flatten(0, -2)
        grads: list[Tensor | None] = []
        for number, (start, stop) in enumerate(ctx.rows):
            inner_rn, up_or = kept[number], kept[len(ctx.rows) + number]
            own_no = grad_no[:, start:stop]
            grads.append((inner_rn @ own_no).T.float() if wanted[2 * number] else None)
            grads.append((up_or.T.contiguous() @ own_no.T @ x_ni).float() if wanted[2 * number + 1] else None)
        grad_x = (grad_no @ summed_oi).view(*grad_y.shape[:-1], -1) if wanted_x else None
        return (grad_x, None, None, None, *grads)


def factor_gradients(
    x_ni: Tensor, grad_no: Tensor, changes: Sequence[Change], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """As `_Within` has them, for all branches of a map: of the up and the down of each, where wanted (up, down, up, down, ...).
    grad_no: the gradient of the output. All ups share one product with x, and so do all downs."""
    found: list[Tensor | None] = [None] * len(wanted)
    own = [grad_no[:, rows.start : rows.stop] for rows, _, _ in changes]
    ups, downs = ([n for n in range(len(changes)) if wanted[2 * n + which]] for which in (0, 1))
    ranks = [len(down_ri) for _, _, down_ri in changes]
    if ups:
        inner_rn = torch.cat([changes[n][2] for n in ups]).to(x_ni.dtype) @ x_ni.T
        for n, own_rn in zip(ups, torch.split(inner_rn, [ranks[n] for n in ups]), strict=True):
            found[2 * n] = (own_rn @ own[n]).T.float()
    if downs:
        back_rn = torch.cat(
            [changes[n][1].T.to(x_ni.dtype, memory_format=torch.contiguous_format) @ own[n].T for n in downs]
        )
        for n, grad_ri in zip(downs, torch.split((back_rn @ x_ni).float(), [ranks[n] for n in downs]), strict=True):
            found[2 * n + 1] = grad_ri
    return found


class _Beside(torch.autograd.Function):
    """The same where the branches are computed beside the map, in the precision of x: y = W x + b + sum_k up_k (down_k x).

    What they add to y and to the gradient for x is added in place, without a pass of its own over either. Here too x is kept
    only where a down is learnt.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_oi: Tensor, bias_o: Tensor | None, rows: list[Rows], *factors: Tensor
    ) -> Tensor:
        y = F.linear(x, weight_oi, bias_o)
        y_no, x_ni = y.flatten(0, -2), x.flatten(0, -2)
        kept: list[Tensor] = []
        for (start, stop), up_or, down_ri in zip(rows, factors[::2], factors[1::2], strict=True):
            spare = -len(down_ri) % _multiple(x)
            up_or, down_ri = F.pad(up_or, (0, spare)).to(x.dtype), F.pad(down_ri, (0, 0, 0, spare)).to(x.dtype)
            inner_nr = x_ni @ down_ri.T
            y_no[:, start:stop].addmm_(inner_nr, up_or.T)
            kept += [up_or, down_ri, inner_nr]
        ctx.rows, ctx.ranks = rows, [len(down_ri) for down_ri in factors[1::2]]
        _, _, _, _, *wanted = ctx.needs_input_grad
        ctx.save_for_backward(x_ni if any(wanted[1::2]) else None, weight_oi, *kept)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x_ni, weight_oi, *kept = ctx.saved_tensors
        wanted_x, _, _, _, *wanted = ctx.needs_input_grad
        grad_no = grad_y.flatten(0, -2)
        grad_x_ni = grad_no @ weight_oi if wanted_x else None
        grads: list[Tensor | None] = []
        for number, ((start, stop), rank) in enumerate(zip(ctx.rows, ctx.ranks, strict=True)):
            up_or, down_ri, inner_nr = kept[3 * number : 3 * number + 3]
            own_no = grad_no[:, start:stop]
            grad_inner_nr = own_no @ up_or
            if grad_x_ni is not None:
                grad_x_ni.addmm_(grad_inner_nr, down_ri)
            grads.append((own_no.T @ inner_nr)[:, :rank].float() if wanted[2 * number] else None)
            grads.append((grad_inner_nr.T @ x_ni)[:rank].float() if wanted[2 * number + 1] else None)
        grad_x = None if grad_x_ni is None else grad_x_ni.view(*grad_y.shape[:-1], -1)
        return (grad_x, None, None, None, *grads)


def _multiple(x: Tensor) -> int:
    """What ranks are filled up to with zeros: a card multiplies half-precision matrices of other sides on slower paths."""
    return 8 if x.is_cuda else 1


@contextmanager
def all_summed(layers: Mapping[str, AdaptedLinear]) -> Iterator[dict[Tensor, Tensor]]:
    """While open, all forwards share one sum of each weight and its live branches, of which no number may change meanwhile.

    Gradients reach `_Within`'s branches as ever. A dense map's end at its sum, so that forwards can be differentiated apart
    from one another; given are those sums, each with the same one as a function of its branches, for gradients to go on.
    """
    summed = [layer for layer in layers.values() if layer._live_apart and layer.live]
    found = dict[Tensor, Tensor]()
    for layer in summed:
        if layer._dense(layer._live_changes()):
            sum_oi = layer._summed()
            layer._summed_oi = sum_oi.detach()
            if sum_oi.requires_grad:
                found[layer._summed_oi.requires_grad_()] = sum_oi
        else:
            layer._summed_oi = layer.effective()
    try:
        yield found
    finally:
        for layer in summed:
            layer._summed_oi = None


@contextmanager
def all_folded(layers: Mapping[str, AdaptedLinear]) -> Iterator[None]:
    """While open, live branches are folded too, so that a forward costs what the bare backbone costs. No gradients. Layers
    that are folded, or replaced, already are left as they are."""
    apart = [layer for layer in layers.values() if layer._live_apart]
    for layer in apart:
        layer.fold_live()
    try:
        yield
    finally:
        for layer in apart:
            layer.unfold_live()


@contextmanager
def stripped(layers: Mapping[str, AdaptedLinear]) -> Iterator[None]:
    """While open, the layers are those of the pre-trained model; afterwards what they were before, folded or not."""
    with standing_in(layers, {path: layer.base_oi.to(layer.weight_oi.dtype) for path, layer in layers.items()}):
        yield


@contextmanager
def standing_in(layers: Mapping[str, AdaptedLinear], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, the layers compute with these weights (o, i) and no branch; afterwards with what they had before."""
    before = [(layer, layer.weight_oi, layer._live_apart) for layer in layers.values()]
    for path, layer in layers.items():
        layer.weight_oi, layer._live_apart = weights[path], False
    try:
        yield
    finally:
        for layer, weight_oi, live_apart in before:
            layer.weight_oi, layer._live_apart = weight_oi, live_apart


def inject(module: nn.Module, path: str, dtype: torch.dtype = torch.float32) -> AdaptedLinear:
    """Replace the linear map at this path (as in `module.get_submodule`) by an adapted one, and return that.

    Raises TypeError where the path does not lead to an nn.Linear.
    """
    linear = module.get_submodule(path)
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{path} is a {type(linear).__name__}, only nn.Linear can be adapted")
    adapted = AdaptedLinear(linear, dtype)
    parent, _, leaf = path.rpartition(".")
    setattr(module.get_submodule(parent), leaf, adapted)
    return adapted
