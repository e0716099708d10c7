"""O-LoRA: orthogonal low-rank adaptation (Wang et al., Findings of EMNLP 2023, arXiv 2310.14152).

    W_t = W_0 + s Σ_{k<t} B_k A_k + s B_t A_t                   all adapters are added; those of old tasks are frozen
    L = CE + λ_1 Σ Σ_ij |A_old A_t^T|_ij + λ_2 Σ (‖A_t‖ + ‖B_t‖)       over the adapted layers
    A_old = A_1 ... A_{t-1}, stacked

The rows of A span the input directions that an adapter reads. The penalty pushes new adapters to other directions, so that
they disturb old tasks less. It is soft: the rows become nearly orthogonal. It concerns parameters, not data.

    released code    here                                                    shape
    A_t              down (trained), LoRA's start                            (r, i)
    B_t              up (trained, starts 0)                                  (o, r)
    A_old            downs of the site's finished branches                    (p, i)
    s = α / r        scale (frozen)                                          ()
    λ_1, λ_2         orthogonality, shrinkage

Names are those of the released code (cmnfriend/O-LoRA, 07117e1), whose equations these are; the paper's A is its B.

Shape letters: o outputs, i inputs, r rank, p = (t - 1) r ranks of all old downs.
"""

import torch
from pydantic import Field
from torch import Tensor

from lamina.adapters import Branch
from lamina.learner import Learner
from lamina.methods.base import Departure, Method, MethodConfig, Needs, Paper, Pass, Refusal
from lamina.types import Batch, Task


class OLoRAConfig(MethodConfig):
    rank: int = Field(8, ge=1)
    """r: rank of the adapter that each task adds to every adapted layer."""
    orthogonality: float = Field(0.5, ge=0)
    """λ_1: weight of the overlap of the new downs with the old ones. 0 is a plain adapter per task."""
    shrinkage: float = Field(0.0, ge=0)
    """λ_2: weight of the norms (not squared) of the new factors."""
    alpha: float | None = Field(None, gt=0)
    """Adapters are multiplied by alpha / rank (released code: 32 / 8). Not set: 1."""


class Scaled(Branch):
    """LoRA with a frozen scale."""

    up: Tensor
    down: Tensor
    scale: Tensor

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.scale * self.up, self.down


class OLoRA(Method[OLoRAConfig]):
    name = "olora"
    advice = "To study a soft orthogonality penalty between the adapters of different tasks."
    paper = Paper(
        title="Orthogonal Subspace Learning for Language Model Continual Learning",
        authors="Wang et al.",
        venue="Findings of EMNLP 2023",
        link="https://arxiv.org/abs/2310.14152",
        departures=(
            Departure(
                "a classifier with outputs for each task; the paper's model writes its prediction in words",
                "ours",
                of_classifiers=True,
            ),
            Departure(
                "the equations are those of the released code; the paper's text could not be read", "released code"
            ),
            Departure("the scale is 1, not 32 / 8", "ours", "alpha"),
            Departure("no dropout before the adapter", "ours"),
            Departure(
                "λ_1 is the same for all tasks; the long runs of the released code raise it by hand",
                "ours",
                "orthogonality",
            ),
            Departure("finished adapters are folded into the weight", "ours"),
        ),
    )
    needs = Needs(
        per_task="an adapter",
        storage="One adapter of rank r per adapted layer and task.",
        step="linear",
        extra="A step computes the overlap with r old input directions per adapted layer and task.",
    )
    config_type = OLoRAConfig
    refuses = (Refusal("init", "its penalty needs its own old adapters"),)
    branch_type = Scaled

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        rank, alpha = self.config.rank, self.config.alpha
        scale = torch.tensor(alpha / rank if alpha else 1.0)
        learner.add_outputs(task)
        for site in learner.sites.values():
            start = site.fresh_lora(rank, "olora").trained()
            site.add(task.name, Scaled(trained=start, frozen={"scale": scale}))

    def loss(self, learner: Learner, batch: Batch, task: Task) -> Tensor:
        config, total = self.config, learner.loss(batch, task)
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


def overlap(old_pi: Tensor, new_ri: Tensor) -> Tensor:
    """Returns Σ_ij |A_old A_t^T|_ij, 0 if every new row is orthogonal to every old one."""
    return (old_pi @ new_ri.T).abs().sum()
