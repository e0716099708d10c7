"""SD-LoRA: scalable decoupled low-rank adaptation (Wu et al., ICLR 2025, arXiv 2501.13198).

    W_t = W_0 + Σ_{k<t} α_k D_k / ‖D_k‖ + α_t D_t,  D_k = A_k B_k

    trained in task t: A_t, B_t and all scales α_1 ... α_t; the directions D_k of finished tasks are frozen

    paper        here                                                          shape
    A_t, B_t     up (trained, starts 0), down (trained)                        (o, r), (r, i)
    α_1 ... α_t  scale (trained): a copy in every site, all equal              (t,)
    D_k / ‖D_k‖  `up1`, `down1`, `up2`, ... (frozen), up divided by the norm   (o, r_k), (r_k, i)

There is one scale per task for the whole model. Every site holds a copy. Each copy's gradient is replaced by the sum over all
copies, the gradient of the one scale, so equal copies stay equal to the bit.

The released code (WuYichen-97/SD-Lora-CL, 8bacded) decides the published numbers, so its choices are the default: see
`SDLoRA.paper.departures`.

Shape letters: o outputs, i inputs, r rank, t tasks.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from lamina.adapters import Branch
from lamina.learner import Learner
from lamina.methods.base import SHARED, Departure, Method, MethodConfig, Needs, Paper, Pass, Refusal
from lamina.types import Task

Positive = Annotated[int, Field(ge=1)]
Norm = Literal["released", "paper"]


class SDLoRAConfig(MethodConfig):
    rank: Positive = 10
    """r: rank of the direction that each task adds to every adapted layer."""
    falling: tuple[tuple[Positive, Positive], ...] | None = None
    """Reduced rank (SD-LoRA-RR), pairs of task and rank: from that task on, the first being 1, directions have that rank.
    The released code's comment is [[5, 8], [9, 6]]. Not set: `rank` throughout."""
    scale: float = 0.8
    """Value of every α_k at the start of a task."""
    carry: bool = False
    """Old α_k keep their learnt values; otherwise every task resets all of them (released code)."""
    norm: Norm = "released"
    """Divisor of a finished direction: the product of its factors' norms (released), or its own norm (paper)."""


class Directions(Branch):
    """A trained direction and frozen ones of norm at most 1, each times its scale. `up1`, `down1` are the first task's."""

    up: Tensor
    down: Tensor
    scale: Tensor

    def factors(self) -> tuple[Tensor, Tensor]:
        ups, downs = [*self.old("up"), self.up], [*self.old("down"), self.down]
        return torch.cat([a * up for a, up in zip(self.scale, ups, strict=True)], 1), torch.cat(downs)

    def old(self, part: Literal["up", "down"]) -> list[Tensor]:
        """Returns this factor of the finished directions, the oldest first."""
        return [self.get_buffer(f"{part}{k}") for k in range(1, len(self.scale))]


class SDLoRA(Method[SDLoRAConfig]):
    name = "sdlora"
    advice = "To keep the directions of old tasks fixed while their scales keep learning."
    paper = Paper(
        title="SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning",
        authors="Wu et al.",
        venue="ICLR 2025",
        link="https://arxiv.org/abs/2501.13198",
        departures=(
            Departure("a finished direction is divided by ‖A‖‖B‖, not by ‖AB‖", "released code", "norm"),
            Departure("every task resets all scales to 0.8", "released code", "carry, scale"),
            Departure(
                "evaluation from saved files drops the old directions; the published numbers do not use it",
                "released code",
            ),
            Departure("every adapted layer holds a copy of the scales; gradient clipping counts each copy", "ours"),
            Departure("new outputs of the head start as in PyTorch, the bias too", "ours", of_classifiers=True),
            Departure("the variant that drops a direction near the span of old ones is missing", "ours"),
        ),
    )
    needs = Needs(
        per_task="an adapter",
        storage="One direction of rank r and one scale per adapted layer and task.",
        step="linear",
        extra="A step computes one branch of rank r per adapted layer and task, and so does folding before evaluation.",
    )
    config_type = SDLoRAConfig
    refuses = (Refusal("init", "it needs its old directions, whose scales keep learning"),)
    branch_type = Directions

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        config = self.config
        learner.add_outputs(task)
        for site in learner.sites.values():
            before = site.live().get(SHARED)
            number = 1 if before is None else len(before.trained()["scale"]) + 1
            rank = rank_of_task(number, config.rank, config.falling or ())
            trained: dict[str, Tensor] = site.fresh_lora(rank, "sdlora").trained()
            trained["scale"] = torch.full((number,), config.scale)
            if not isinstance(before, Directions):
                site.add(SHARED, Directions(trained=trained))
                continue
            if config.carry:
                trained["scale"][:-1] = before.scale.detach()
            old = {
                f"up{number - 1}": before.up / norm_of(before.up, before.down, config.norm),
                f"down{number - 1}": before.down,
            }
            site.replace(SHARED, Directions(trained=trained, frozen=before.frozen() | old))

    def after_backward(self, learner: Learner) -> None:
        share_gradient([site.live()[SHARED].trained()["scale"] for site in learner.sites.values()])


def rank_of_task(number: int, rank: int, falling: tuple[tuple[int, int], ...]) -> int:
    """Returns the rank of this task's direction (the first task is 1): that of the last milestone it has reached."""
    return max([(0, rank), *(pair for pair in falling if pair[0] <= number)])[1]


def norm_of(up_or: Tensor, down_ri: Tensor, norm: Norm) -> Tensor:
    """Returns the divisor of a direction. It is never 0, so a direction that has not moved stays 0."""
    size = torch.linalg.matrix_norm
    length: Tensor = size(up_or) * size(down_ri) if norm == "released" else size(up_or @ down_ri)
    return length.clamp_min(torch.finfo(length.dtype).tiny)


def share_gradient(copies: list[Tensor]) -> None:
    """Set the gradient of every copy of one shared value to that of the value: the sum of the copies' gradients."""
    total = torch.stack([copy.grad for copy in copies if copy.grad is not None]).sum(0)
    for copy in copies:
        copy.grad = total.clone()
