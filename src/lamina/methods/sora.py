"""SoRA: sparse low-rank adaptation (Ding et al., EMNLP 2023, arXiv 2311.11696), one adapter per task of a stream.

    h = W x + s W_u (g ⊙ (W_d x))                                   W_u, W_d and the gate g are trained
    g <- T_ξ(g - step of the optimiser),  T_ξ(z) = sign(z) max(|z| - ξ, 0),  ξ = η λ       after every step
    end of a task: ranks with g = 0 are removed, the gate is multiplied into W_u, and the remaining plain LoRA is folded

T_ξ is the proximal step of λ ‖g‖₁ at learning rate η: a gate that the loss does not support reaches exactly 0.

    paper   here                                       shape
    W_d     down (trained)                             (r, i)
    W_u     up (trained, starts 0)                     (o, r)
    g       gate (trained, all start equal)            (r,)
    s       scale (frozen)                             ()       alpha / r, divided by the start of g
    r_max   rank
    η_t λ   the threshold of `soft_threshold`: the step's rate times `lam`

The paper fine-tunes on one task. On a stream, each task gets a new gated adapter, which is folded when the task ends. At the
start of a task up is 0, so no gradient reaches the gate and only the threshold acts: hence `warmup`.

Shape letters: o outputs, i inputs, r rank.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lamina.adapters import Branch, LowRank
from lamina.learner import Learner
from lamina.maths.linalg import soft_threshold
from lamina.methods.base import Departure, Method, MethodConfig, Needs, Paper, Pass, Step
from lamina.types import Batch, Task


class SoRAConfig(MethodConfig):
    rank: int = Field(8, ge=1)
    """r_max: rank of each task's adapter in every adapted layer, before ranks are removed."""
    scale: float = Field(2.0, gt=0)
    """s = alpha / r: factor of the adapter; 2 in the released scripts."""
    lam: float = Field(1.25, ge=0)
    """λ: strength of the sparsity. Without support from the loss, a gate falls by λ times the sum of the task's learning rates
    after the warm-up: with gate_start = task and no warm-up, 1 takes it to 0 by the end of the task."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of a task's steps before the threshold acts, so that up has left 0 and the loss can support gates."""
    levels: int = Field(1, ge=1)
    """The sparsifying schedule: after the warm-up λ rises to its full value in this many equal stages; 1 is none."""
    operator: Literal["prox", "released"] = "prox"
    """The soft threshold (prox), or the released code's operator, which also zeroes results below the threshold."""
    threshold: Literal["rate", "constant"] = "rate"
    """ξ is the step's learning rate times lam (rate), or lam itself as in the released code (constant; 3e-4 there)."""
    gate_start: Literal["task", "ones", "normal"] = "task"
    """Gates start at the sum of the task's learning rates, which the scale is divided by, so that loss and threshold move
    them equally far in short and long tasks; at 1; or at standard normal draws, as in the released code."""
    penalty: float = Field(0.0, ge=0)
    """Weight of the mean of |g| in the loss, which the released code adds to the threshold (10 there); 0 is none."""


class Gated(Branch):
    """A low-rank update with a gate per rank. Weight decay skips the gate, which has the threshold."""

    up: Tensor
    gate: Tensor
    down: Tensor
    scale: Tensor
    undecayed = ("gate",)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.up * (self.scale * self.gate), self.down


class SoRA(Method[SoRAConfig]):
    name = "sora"
    advice = "For adapters whose rank follows the task: unneeded ranks are removed when the task ends."
    paper = Paper(
        title="Sparse Low-rank Adaptation of Pre-trained Language Models",
        authors="Ding et al.",
        venue="EMNLP 2023",
        link="https://arxiv.org/abs/2311.11696",
        departures=(
            Departure(
                "a value shrunk into (-ξ, ξ) is then zeroed, so the dead zone is 2ξ", "released code", "operator"
            ),
            Departure("the threshold is constant, not multiplied by the learning rate", "released code", "threshold"),
            Departure("the loss contains the mean of |g| as well", "released code", "penalty"),
            Departure("gates start at standard normal draws", "released code", "gate_start"),
            Departure("gates start at the sum of the task's learning rates", "ours", "gate_start"),
            Departure("the learning rate is already 0 in the stages of the schedule", "released code"),
            Departure("zero gates are counted but not removed", "released code"),
            Departure("an adapter per task, folded when the task ends", "ours"),
            Departure("the threshold does not act in the first steps of a task", "ours", "warmup"),
            Departure("the schedule keeps the last model only, not one per stage", "ours", "levels"),
        ),
    )
    needs = Needs(
        per_task="an adapter, pruned",
        storage="One adapter per adapted layer and task, of the ranks that were not removed: at most `rank`.",
    )
    config_type = SoRAConfig
    branch_type = Gated

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        learner.add_outputs(task)
        for site in learner.sites.values():
            generator = site.generator("sora")
            fresh = LowRank.fresh(site.d_out, site.d_in, self.config.rank, generator)
            drawn_r = torch.randn(self.config.rank, generator=generator)
            unit = self.total_rate if self.config.gate_start == "task" else 1.0
            gate_r = drawn_r if self.config.gate_start == "normal" else torch.full_like(drawn_r, unit)
            scale = torch.tensor(self.config.scale / unit)
            site.add(task.name, Gated(trained=fresh.trained() | {"gate": gate_r}, frozen={"scale": scale}))

    def loss(self, learner: Learner, batch: Batch, task: Task) -> Tensor:
        fitting = learner.loss(batch, task)
        if self.config.penalty == 0:
            return fitting
        gates = torch.cat([branch.gate for branch in gated(learner)])
        return fitting + self.config.penalty * gates.abs().mean()

    def after_step(self, learner: Learner, step: Step) -> None:
        config = self.config
        lam = strength(config.lam, step.done, step.total, config.warmup, config.levels)
        threshold = lam * step.rate if config.threshold == "rate" else lam
        shrink = soft_threshold if config.operator == "prox" else released_threshold
        with torch.no_grad():
            for branch in gated(learner):
                branch.gate.copy_(shrink(branch.gate, threshold))

    def end(self, learner: Learner, task: Task, batches: Pass) -> None:
        for site in learner.sites.values():
            branch = site.live()[task.name]
            assert isinstance(branch, Gated)
            site.replace(task.name, pruned(branch))
        learner.finish(task.name)
        learner.head.freeze()


def gated(learner: Learner) -> list[Gated]:
    """Returns the gated branches in training, one per site."""
    return [b for site in learner.sites.values() for b in site.live().values() if isinstance(b, Gated)]


def strength(lam: float, done: int, total: int, warmup: float, levels: int) -> float:
    """Returns λ after `done` of `total` steps: 0 during the warm-up, then λ/k, 2λ/k, ..., λ in k stages of equal length."""
    start = int(warmup * total)
    if done < start:
        return 0.0
    stage = (done - start) * levels // (total - start)
    return lam * (stage + 1) / levels


def released_threshold(gate_r: Tensor, threshold: float) -> Tensor:
    """Returns the result of the released code's masks, applied in order: 0 where |g| < 2ξ, else the soft threshold."""
    shrunk_r = soft_threshold(gate_r, threshold)
    return torch.where(shrunk_r.abs() < threshold, 0, shrunk_r)


def pruned(branch: Gated) -> LowRank:
    """Returns the same update without the ranks whose gate is 0. None may be left."""
    up_or, down_ri = branch.factors()
    kept_r = branch.gate != 0
    return LowRank(trained={}, frozen={"up": up_or[:, kept_r], "down": down_ri[kept_r]})
