"""C-LoRA: one adapter for all tasks, with a routing matrix in its middle (Zhang et al., 2025, arXiv 2502.17920).

    ΔW = A R B,   R = R_old + R_δ                               one adapter, whatever the number of tasks     (eqs. 11, 12)
    y = W x + [A] R_old [B] x + A R_δ B x                       [.]: stop-gradient on A and B in the old path
    ∂A = G B^T R_δ^T,  ∂B = R_δ^T A^T G,  ∂R_δ = A^T G B^T      G: gradient of the loss by the weight        (to eq. 17)
    L = CE of the task's own outputs + λ Σ ‖R_old^T R_δ‖²       over all adapted layers, from the second task on  (eq. 26)
    when a task ends: R_old becomes R_old + R_δ, and R_δ restarts from 0

    paper   here                                                              shape
    A, B    a, b (trained)                                                    (o, r), (r, i)
    R_old   old (frozen); `begun` without the stop-gradient                   (r, r)
    R_δ     delta (trained); absent between tasks                             (r, r)
    λ       penalty

Neither the authors' code nor the full text of the paper was available. The parametrisation, the stop-gradient and the form of
the penalty are established. R_old as the "old basis" of the penalty, its accumulation, the initialisation, λ, the rank and
the adapted layers are inferred. See `CLoRA.paper.departures` and docs/papers/clora.md.

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
from lamina.methods.base import SHARED, Departure, Method, MethodConfig, Needs, Paper, Pass, Step
from lamina.types import Batch, Task

Sides = Literal["one", "two"]


class CLoRAConfig(MethodConfig):
    rank: int = Field(10, ge=1)
    """r: rank of the one adapter in every adapted layer. The tasks share its r directions."""
    penalty: float = Field(1.0, ge=0)
    """λ: weight of the overlap of the new routing with the old. 0: none."""
    sides: Sides = "one"
    """The overlap: ‖R_old^T R_δ‖² (one, eq. 26), or ‖R_old R_δ^T‖² as well, which protects B too (two)."""
    stop_gradient: bool = True
    """A and B learn through R_δ only. Otherwise R is undivided: they learn through R_old too."""
    shared: Literal["trained", "frozen after first", "frozen"] = "trained"
    """A and B are trained in every task, in the first one only, or never."""
    projection: float | None = Field(None, gt=0, le=1)
    """Project R_δ out of R_old: out of the fewest directions with this share of its energy, 1 being all of it. With 1,
    nothing more is learnt once R_old has full rank. Not set: the penalty alone."""
    start: Literal["kaiming", "lora"] = "kaiming"
    """In the first task: A and B drawn, R_δ = 0 (kaiming); or A = 0, B drawn, R_δ = I, LoRA's initialisation (lora)."""


class Routed(Branch):
    """A R B. During a task R is `delta` plus `old`, whose path trains nothing, or plus `begun`, whose path trains A and B.
    Between tasks R is `old`."""

    def factors(self) -> tuple[Tensor, Tensor]:
        parts = parts_of(self)
        a_or, b_ri = parts["a"], parts["b"]
        if "delta" not in parts:
            return a_or @ parts["old"], b_ri
        if "begun" in parts:
            return a_or @ (parts["begun"] + parts["delta"]), b_ri
        # The stop-gradient is on the factors, not on x: the layers below need the gradient of the old path too.
        return torch.cat([a_or.detach() @ parts["old"], a_or @ parts["delta"]], 1), torch.cat([b_ri.detach(), b_ri])


class CLoRA(Method[CLoRAConfig]):
    name = "clora"
    advice = "For constant size without extra passes over the data: one adapter, with a penalty on its routing."
    paper = Paper(
        title="C-LoRA: Continual Low-Rank Adaptation for Pre-trained Models",
        authors="Zhang et al.",
        venue="arXiv 2025",
        link="https://arxiv.org/abs/2502.17920",
        departures=(
            Departure(
                "the text and code of the paper were not available: a reconstruction where sources are silent", "ours"
            ),
            Departure("the old basis in the penalty is R_old itself", "ours", "penalty, projection"),
            Departure("R_old is the sum of every task's R_δ, which starts from exactly 0", "ours"),
            Departure("A and B keep learning after the first task", "ours", "shared"),
            Departure(
                "A and B start drawn, like LoRA's down, with R_δ = 0; the paper's initialisation is unknown",
                "ours",
                "start",
            ),
            Departure("rank, λ and the adapted layers of the paper are unknown", "ours", "rank, penalty"),
            Departure(
                "each task has its own outputs of the head, which later tasks do not train", "ours", of_classifiers=True
            ),
        ),
    )
    needs = Needs(per_task="nothing", storage="One adapter, whatever the number of tasks.")
    config_type = CLoRAConfig
    branch_type = Routed

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        config = self.config
        if config.start == "lora" and config.shared == "frozen":
            raise MethodError(
                "method 'clora' with start = 'lora' and shared = 'frozen' keeps A = 0 and learns nothing. Set "
                "method.start to kaiming, or method.shared to trained or frozen after first."
            )
        learner.add_outputs(task)
        for site in learner.sites.values():
            first = SHARED not in site.live()
            parts = self.drawn(site) if first else parts_of(site.live()[SHARED])
            delta_rr = torch.eye(config.rank) if first and config.start == "lora" else torch.zeros_like(parts["old"])
            trained, frozen = {"delta": delta_rr}, {"old" if config.stop_gradient else "begun": parts["old"]}
            learns = config.shared == "trained" or (config.shared == "frozen after first" and first)
            (trained if learns else frozen).update(a=parts["a"], b=parts["b"])
            (site.add if first else site.replace)(SHARED, Routed(trained=trained, frozen=frozen))

    def drawn(self, site: AdapterSite) -> dict[str, Tensor]:
        """Returns the initial A and B, and R_old = 0."""
        rank, generator = self.config.rank, site.generator("clora")
        b_ri = LowRank.fresh(site.d_out, site.d_in, rank, generator).down
        a_or = torch.zeros(site.d_out, rank)
        if self.config.start == "kaiming":
            a_or.uniform_(-(rank**-0.5), rank**-0.5, generator=generator)
        return {"a": a_or, "b": b_ri, "old": torch.zeros(rank, rank)}

    def loss(self, learner: Learner, batch: Batch, task: Task) -> Tensor:
        fitting = learner.loss(batch, task)
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
            done = {"a": parts["a"], "b": parts["b"], "old": old_rr + delta_rr}
            site.replace(SHARED, Routed(trained={}, frozen=done))


def parts_of(branch: Branch) -> dict[str, Tensor]:
    """Returns all tensors of a branch by name."""
    return branch.trained() | branch.frozen()


def routing(site: AdapterSite) -> tuple[Tensor, Tensor]:
    """Returns R_old and R_δ of the current task."""
    parts = parts_of(site.live()[SHARED])
    return parts["old" if "old" in parts else "begun"], parts["delta"]


def overlap(old_rr: Tensor, delta_rr: Tensor, sides: Sides) -> Tensor:
    """Returns ‖R_old^T R_δ‖² (eq. 26), with two sides plus ‖R_old R_δ^T‖²."""
    left = (old_rr.T @ delta_rr).square().sum()
    return left if sides == "one" else left + (old_rr @ delta_rr.T).square().sum()


def kept_out(old_rr: Tensor, delta_rr: Tensor, share: float, sides: Sides) -> Tensor:
    """Returns (I - U U^T) R_δ, U the main directions of R_old's columns; with two sides also times (I - V V^T), of its rows."""
    delta_rr = remove_span(delta_rr, column_space(old_rr, share))
    return delta_rr if sides == "one" else remove_span(delta_rr.T, column_space(old_rr.T, share)).T


def column_space(matrix_rr: Tensor, share: float) -> Tensor:
    """Returns the fewest orthonormal directions (r, k) with this share of the columns' energy, none of them rounding noise."""
    vectors_rr, values_r, _ = torch.linalg.svd(matrix_rr)
    alive = int((values_r > len(values_r) * torch.finfo(values_r.dtype).eps * values_r[0]).sum())
    shares_r = values_r[:alive].double().square() / values_r.double().square().sum()
    basis_rk: Tensor = vectors_rr[:, : steps_to_reach(shares_r, 0.0, share)]
    return basis_rk
