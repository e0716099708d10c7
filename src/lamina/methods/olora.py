"""O-LoRA: orthogonal low-rank adaptation (Wang et al., Findings of EMNLP 2023, arXiv 2310.14152).

    W_t = W_0 + s Σ_{k<t} B_k A_k + s B_t A_t                   all adapters work together, those of old tasks are frozen
    L = CE + λ_1 Σ Σ_ij |A_old A_t^T|_ij + λ_2 Σ (‖A_t‖ + ‖B_t‖)       over the adapted maps
    A_old = the rows of A_1 ... A_{t-1}, one below another

The rows of A span what an adapter reads of its input. New tasks are kept to other rows, so that they change less of what
old ones rely on. The penalty is soft: rows become nearly orthogonal, not exactly; and it looks at parameters, not at data.

    released code    here                                                    shape
    A_t              down (trained), LoRA's start                            (r, i)
    B_t              up (trained, starts 0)                                  (o, r)
    A_old            downs of the map's finished branches                    (p, i)
    s = α / r        scale (frozen)                                          ()
    λ_1, λ_2         orthogonality, shrinkage

Names are those of the released code (cmnfriend/O-LoRA, 07117e1), whose equations these are; the paper's A is its B.

Shape letters: o outputs, i inputs, r rank, p = (t - 1) r rows of all old downs.
"""

import torch
from pydantic import Field
from torch import Tensor

from lamina.adapters import Branch, LowRank
from lamina.learner import Learner
from lamina.methods.base import Departure, Method, MethodConfig, Needs, Paper, Pass, Refusal, local_cross_entropy
from lamina.rng import seed_of
from lamina.types import Batch, Task


class OLoRAConfig(MethodConfig):
    rank: int = Field(8, ge=1)
    """r: rank of the adapter each task adds to every adapted map."""
    orthogonality: float = Field(0.5, ge=0)
    """λ_1: weight of the overlap of the new downs with the old ones. 0: a plain adapter per task."""
    shrinkage: float = Field(0.0, ge=0)
    """λ_2: weight of the norms (not squared) of the new factors."""
    alpha: float | None = Field(None, gt=0)
    """Adapters are multiplied by alpha / rank (released code: 32 / 8). Not set: by 1."""


class Scaled(Branch):
    """LoRA with a scale."""

    up: Tensor
    down: Tensor
    scale: Tensor

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.scale * self.up, self.down


class OLoRA(Method[OLoRAConfig]):
    name = "olora"
    advice = (
        "No stored samples and no passes over the data: an adapter per task, pushed to be orthogonal to the old ones."
    )
    paper = Paper(
        title="Orthogonal Subspace Learning for Language Model Continual Learning",
        authors="Wang et al.",
        venue="Findings of EMNLP 2023",
        link="https://arxiv.org/abs/2310.14152",
        departures=(
            Departure(
                what="a classifier with rows for each task; the paper's model writes its answer in words", whose="ours"
            ),
            Departure(
                what="the equations are those of the released code; the paper's text could not be read here",
                whose="released code",
            ),
            Departure(what="the scale is 1, not 32 / 8", whose="ours", switch="alpha"),
            Departure(what="no dropout before the adapter", whose="ours"),
            Departure(
                what="λ_1 is the same for all tasks; the long runs of the released code raise it by hand",
                whose="ours",
                switch="orthogonality",
            ),
            Departure(
                what="finished adapters are folded into the weight instead of being computed beside it", whose="ours"
            ),
        ),
    )
    needs = Needs(
        growth="an adapter of rank r in every adapted map with every task",
        operations="a step by the overlap with r more old rows per adapted map with every task; an answer not at all",
    )
    config_type = OLoRAConfig
    refuses = (Refusal("init", "its penalty is about its own old adapters, which must be there"),)
    branch_type = Scaled

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        rank, alpha = self.config.rank, self.config.alpha
        learner.head.freeze()
        learner.head.add(task.name, task.classes)
        for site in learner.sites.values():
            generator = torch.Generator().manual_seed(seed_of("olora", torch.initial_seed(), site.name))
            start = LowRank.fresh(site.d_out, site.d_in, rank, generator).trained()
            site.add(task.name, Scaled(trained=start, frozen={"scale": torch.tensor(alpha / rank if alpha else 1.0)}))

    def loss(self, learner: Learner, batch: Batch, task: Task) -> Tensor:
        config, total = self.config, local_cross_entropy(learner, batch, task)
        for site in learner.sites.values():
            new, old = site.live()[task.name].trained(), site.finished()
            if config.orthogonality and old:
                total = total + config.orthogonality * overlap(
                    torch.cat([f.down_ri for f in old.values()]), new["down"]
                )
            if config.shrinkage:
                total = total + config.shrinkage * torch.stack([factor.norm() for factor in new.values()]).sum()
        return total

    def end(self, learner: Learner, task: Task, batches: Pass) -> None:
        learner.finish(task.name)
        learner.head.freeze()

    def memory_bound(self, learner: Learner) -> int:
        return 0


def overlap(old_pi: Tensor, new_ri: Tensor) -> Tensor:
    """Σ_ij |A_old A_t^T|_ij: 0 where every new row is orthogonal to every old one."""
    return (old_pi @ new_ri.T).abs().sum()
