"""C-LoRA: one adapter for all tasks, with a routing matrix in its middle (Zhang et al., 2025, arXiv 2502.17920).

    ΔW = A R B,   R = R_old + R_δ                               one adapter, whatever the number of tasks     (eqs. 11, 12)
    y = W x + [A] R_old [B] x + A R_δ B x                       [.]: A and B learn nothing through the old path
    ∂A = G B^T R_δ^T,  ∂B = R_δ^T A^T G,  ∂R_δ = A^T G B^T      G: gradient of the loss by the weight        (to eq. 17)
    L = CE of the task's own rows + λ Σ ‖R_old^T R_δ‖²          over all adapted maps, from the second task on    (eq. 26)
    when a task ends: R_old becomes R_old + R_δ, and R_δ starts again from 0

    paper   here                                                              shape
    A, B    a, b (trained)                                                    (o, r), (r, i)
    R_old   old (frozen); `begun` where its path is not stopped               (r, r)
    R_δ     delta (trained); between tasks there is none                      (r, r)
    λ       penalty

No code of the authors and no full text of the paper could be had. The parametrisation, the stop, its gradients and the
form of the penalty are established; R_old as the "old basis" in the penalty, how it accumulates, the start, λ, the rank
and where the adapter goes are inferred. See `CLoRA.paper.departures` and docs/papers/clora.md.

Shape letters: o outputs, i inputs, r rank, k columns of a basis.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lamina.adapters import Branch, LowRank
from lamina.errors import MethodError
from lamina.learner import AdapterSite, Learner
from lamina.maths.linalg import remove_span, steps_to_reach
from lamina.methods.base import Departure, Method, MethodConfig, Needs, Paper, Pass, Step, local_cross_entropy
from lamina.rng import seed_of
from lamina.types import Batch, Task

SHARED = "shared"
Sides = Literal["one", "two"]


class CLoRAConfig(MethodConfig):
    rank: int = Field(10, ge=1)
    """r: rank of the one adapter in every adapted map. The tasks share its r directions."""
    penalty: float = Field(1.0, ge=0)
    """λ: weight of the overlap of the new routing with the old. 0: none."""
    sides: Sides = "one"
    """What counts as overlap: ‖R_old^T R_δ‖² (one, eq. 26), or ‖R_old R_δ^T‖² besides, which protects B as well (two)."""
    stop_gradient: bool = True
    """A and B learn through R_δ only. Otherwise R is not divided: they learn through R_old too."""
    shared: Literal["trained", "frozen after first", "frozen"] = "trained"
    """A and B learn in every task, in the first one only, or never."""
    projection: float | None = Field(None, gt=0, le=1)
    """Keep R_δ out of R_old altogether: out of the fewest directions with this share of its energy, 1 being all of it.
    With 1 nothing more is learnt once R_old is of full rank. Not set: the penalty alone."""
    start: Literal["kaiming", "lora"] = "kaiming"
    """In the first task: A and B drawn, R_δ = 0 (kaiming); or A = 0, B drawn, R_δ = I, which is LoRA's start (lora)."""


class Routed(Branch):
    """A R B. While a task is learnt R is `delta` beside `old`, whose path trains nothing, or `begun`, whose path trains
    A and B. Between tasks R is `old`."""

    def factors(self) -> tuple[Tensor, Tensor]:
        parts = parts_of(self)
        a_or, b_ri = parts["a"], parts["b"]
        if "delta" not in parts:
            return a_or @ parts["old"], b_ri
        if "begun" in parts:
            return a_or @ (parts["begun"] + parts["delta"]), b_ri
        # The stop is on the factors and not on x, whose gradient the layers below need from the old path too.
        return torch.cat([a_or.detach() @ parts["old"], a_or @ parts["delta"]], 1), torch.cat([b_ri.detach(), b_ri])


class CLoRA(Method[CLoRAConfig]):
    name = "clora"
    advice = "Constant size, no stored samples, no passes over the data: one adapter whose old routing is kept apart."
    paper = Paper(
        title="C-LoRA: Continual Low-Rank Adaptation for Pre-trained Models",
        authors="Zhang et al.",
        venue="arXiv 2025",
        link="https://arxiv.org/abs/2502.17920",
        departures=(
            Departure(
                what="the text and code of the paper could not be had: where sources are silent this is a reconstruction",
                whose="ours",
            ),
            Departure(what="the old basis in the penalty is R_old itself", whose="ours", switch="penalty, projection"),
            Departure(what="R_old is the sum of every task's R_δ, which starts from exactly 0", whose="ours"),
            Departure(what="A and B go on learning after the first task", whose="ours", switch="shared"),
            Departure(
                what="A and B start drawn, as LoRA's down is, with R_δ = 0; the paper's start is not known",
                whose="ours",
                switch="start",
            ),
            Departure(
                what="the rank, λ and the places of the adapter are not those of the paper, which are not known",
                whose="ours",
                switch="rank, penalty",
            ),
            Departure(what="each task has rows of the head of its own, which later tasks do not train", whose="ours"),
        ),
    )
    needs = Needs(
        growth="the adapter not at all, the head by a row per class", operations="a step and an answer not at all"
    )
    config_type = CLoRAConfig
    branch_type = Routed

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        config = self.config
        if config.start == "lora" and config.shared == "frozen":
            raise MethodError(
                "method 'clora' with start = 'lora' and shared = 'frozen' would keep A = 0 for ever and learn nothing. Set "
                "method.start to kaiming, or method.shared to trained or frozen after first."
            )
        learner.head.freeze()
        learner.head.add(task.name, task.classes)
        for site in learner.sites.values():
            first = SHARED not in site.live()
            parts = self.drawn(site) if first else parts_of(site.live()[SHARED])
            delta_rr = torch.eye(config.rank) if first and config.start == "lora" else torch.zeros_like(parts["old"])
            trained, frozen = {"delta": delta_rr}, {"old" if config.stop_gradient else "begun": parts["old"]}
            learns = config.shared == "trained" or (config.shared == "frozen after first" and first)
            (trained if learns else frozen).update(a=parts["a"], b=parts["b"])
            put(site, Routed(trained=trained, frozen=frozen))

    def drawn(self, site: AdapterSite) -> dict[str, Tensor]:
        """A and B as they start, and R_old = 0."""
        rank = self.config.rank
        generator = torch.Generator().manual_seed(seed_of("clora", torch.initial_seed(), site.name))
        b_ri = LowRank.fresh(site.d_out, site.d_in, rank, generator).down
        a_or = torch.zeros(site.d_out, rank)
        if self.config.start == "kaiming":
            a_or.uniform_(-(rank**-0.5), rank**-0.5, generator=generator)
        return {"a": a_or, "b": b_ri, "old": torch.zeros(rank, rank)}

    def loss(self, learner: Learner, batch: Batch, task: Task) -> Tensor:
        fitting = local_cross_entropy(learner, batch, task)
        if self.config.penalty == 0:
            return fitting
        overlaps = [overlap(*routing(site), self.config.sides) for site in learner.sites.values()]
        return fitting + self.config.penalty * torch.stack(overlaps).sum()

    def after_step(self, learner: Learner, step: Step) -> None:
        if self.config.projection is not None:
            for site in learner.sites.values():
                old_rr, delta_rr = routing(site)
                with torch.no_grad():
                    delta_rr.copy_(kept_out(old_rr, delta_rr, self.config.projection, self.config.sides))

    def end(self, learner: Learner, task: Task, batches: Pass) -> None:
        learner.head.freeze()
        for site in learner.sites.values():
            parts, (old_rr, delta_rr) = parts_of(site.live()[SHARED]), routing(site)
            put(site, Routed(trained={}, frozen={"a": parts["a"], "b": parts["b"], "old": old_rr + delta_rr}))

    def memory_bound(self, learner: Learner) -> int:
        return 0


def parts_of(branch: Branch) -> dict[str, Tensor]:
    return branch.trained() | branch.frozen()


def put(site: AdapterSite, branch: Branch) -> None:
    """The adapter in its new form, in the place of the one there was."""
    if SHARED in site.live():
        site.drop(SHARED)
    site.add(SHARED, branch)


def routing(site: AdapterSite) -> tuple[Tensor, Tensor]:
    """R_old and R_δ of the task being learnt."""
    parts = parts_of(site.live()[SHARED])
    return parts["old" if "old" in parts else "begun"], parts["delta"]


def overlap(old_rr: Tensor, delta_rr: Tensor, sides: Sides) -> Tensor:
    """‖R_old^T R_δ‖² (eq. 26), and ‖R_old R_δ^T‖² besides."""
    left = (old_rr.T @ delta_rr).square().sum()
    return left if sides == "one" else left + (old_rr @ delta_rr.T).square().sum()


def kept_out(old_rr: Tensor, delta_rr: Tensor, share: float, sides: Sides) -> Tensor:
    """(I - U U^T) R_δ with U the main directions of R_old's columns; with two sides also R_δ (I - V V^T), of its rows."""
    delta_rr = remove_span(delta_rr, column_space(old_rr, share))
    return delta_rr if sides == "one" else remove_span(delta_rr.T, column_space(old_rr.T, share)).T


def column_space(matrix_rr: Tensor, share: float) -> Tensor:
    """The fewest orthonormal directions (r, k) with this share of the energy of the columns; never one that is rounding."""
    vectors_rr, values_r, _ = torch.linalg.svd(matrix_rr)
    alive = int((values_r > len(values_r) * torch.finfo(values_r.dtype).eps * values_r[0]).sum())
    shares_r = values_r[:alive].double().square() / values_r.double().square().sum()
    basis_rk: Tensor = vectors_rr[:, : steps_to_reach(shares_r, 0.0, share)]
    return basis_rk
