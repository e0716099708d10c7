"""SD-LoRA: scalable decoupled low-rank adaptation (Wu et al., ICLR 2025, arXiv 2501.13198).

    W_t = W_0 + Σ_{k<t} α_k D_k / ‖D_k‖ + α_t D_t,  D_k = A_k B_k

    trained in task t: A_t, B_t and all the scales α_1 ... α_t; the directions D_k of finished tasks are frozen

    paper        here                                                          shape
    A_t, B_t     up (trained, starts 0), down (trained)                        (o, r), (r, i)
    α_1 ... α_t  scale (trained): a copy in every site, all equal              (t,)
    D_k / ‖D_k‖  `up1`, `down1`, `up2`, ... (frozen), up divided by the norm   (o, r_k), (r_k, i)

There is one scale per task for the whole model. Every site holds a copy, and each copy's gradient is replaced by the sum
over all of them, which is the gradient of the one: equal copies with equal gradients stay equal to the bit.

What the released code (WuYichen-97/SD-Lora-CL, 8bacded) does decides the published numbers, so it is the default here:
see `SDLoRA.paper.departures`.

Shape letters: o outputs, i inputs, r rank, t tasks.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from lamina.adapters import Branch, LowRank
from lamina.learner import Learner
from lamina.methods.base import Departure, Method, MethodConfig, Needs, Paper, Pass, Refusal
from lamina.rng import seed_of
from lamina.types import Task

SHARED = "shared"
Positive = Annotated[int, Field(ge=1)]
Norm = Literal["released", "paper"]


class SDLoRAConfig(MethodConfig):
    rank: Positive = 10
    """r: rank of the direction each task adds to every adapted map."""
    falling: tuple[tuple[Positive, Positive], ...] | None = None
    """Reduced rank (SD-LoRA-RR), pairs of task and rank: from that task on, the first being 1, directions have that rank.
    The released code's comment is [[5, 8], [9, 6]]. Not set: `rank` throughout."""
    scale: float = 0.8
    """Value every α_k has when a task starts."""
    carry: bool = False
    """Old α_k go on from what they were learnt to be; otherwise every task starts all of them anew (released code)."""
    norm: Norm = "released"
    """What a finished direction is divided by: the product of its factors' norms (released), or its own norm (paper)."""


class Directions(Branch):
    """A trained direction beside frozen ones of norm at most 1, each times its scale. `up1`, `down1` are the first task's."""

    up: Tensor
    down: Tensor
    scale: Tensor

    def factors(self) -> tuple[Tensor, Tensor]:
        ups, downs = [*self.old("up"), self.up], [*self.old("down"), self.down]
        return torch.cat([a * up for a, up in zip(self.scale, ups, strict=True)], 1), torch.cat(downs)

    def old(self, part: Literal["up", "down"]) -> list[Tensor]:
        """This factor of the finished directions, the oldest first."""
        return [self.get_buffer(f"{part}{k}") for k in range(1, len(self.scale))]


class SDLoRA(Method[SDLoRAConfig]):
    name = "sdlora"
    advice = "No stored samples: what old tasks learnt stays as fixed directions, and only their sizes go on learning."
    paper = Paper(
        title="SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning",
        authors="Wu et al.",
        venue="ICLR 2025",
        link="https://arxiv.org/abs/2501.13198",
        departures=(
            Departure(
                what="a finished direction is divided by ‖A‖‖B‖, not by ‖AB‖", whose="released code", switch="norm"
            ),
            Departure(what="every task starts all scales at 0.8 anew", whose="released code", switch="carry, scale"),
            Departure(
                what="the evaluation from saved files drops the old directions; the published numbers do not use it",
                whose="released code",
            ),
            Departure(
                what="every map holds a copy of the scales; a limit on the gradient's norm counts each copy",
                whose="ours",
            ),
            Departure(what="new rows of the head start as in PyTorch, the bias too", whose="ours"),
            Departure(what="the variant that drops a direction near the span of old ones is left out", whose="ours"),
        ),
    )
    needs = Needs(
        growth="a direction of rank r in every adapted map, and a scale, with every task",
        operations="a step by a branch of rank r in every adapted map with every task; an answer not at all; folding, before "
        "answers, by a product of rank r, and the beginning of a task by a copy, per adapted map with every task",
    )
    config_type = SDLoRAConfig
    refuses = (Refusal("init", "its old directions go on learning, so they must be there"),)
    branch_type = Directions

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        config = self.config
        learner.head.freeze()
        learner.head.add(task.name, task.classes)
        for site in learner.sites.values():
            before = site.live().get(SHARED)
            number = 1 if before is None else len(before.trained()["scale"]) + 1
            rank = rank_of_task(number, config.rank, config.falling or ())
            generator = torch.Generator().manual_seed(seed_of("sdlora", torch.initial_seed(), site.name))
            trained = LowRank.fresh(site.d_out, site.d_in, rank, generator).trained()
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

    def end(self, learner: Learner, task: Task, batches: Pass) -> None:
        learner.head.freeze()

    def memory_bound(self, learner: Learner) -> int:
        return 0


def rank_of_task(number: int, rank: int, falling: tuple[tuple[int, int], ...]) -> int:
    """The rank of this task's direction (the first task is 1): that of the last milestone it has reached."""
    return max([(0, rank), *(pair for pair in falling if pair[0] <= number)])[1]


def norm_of(up_or: Tensor, down_ri: Tensor, norm: Norm) -> Tensor:
    """What a direction is divided by, never 0: a direction that has not moved stays 0."""
    size = torch.linalg.matrix_norm
    length: Tensor = size(up_or) * size(down_ri) if norm == "released" else size(up_or @ down_ri)
    return length.clamp_min(torch.finfo(length.dtype).tiny)


def share_gradient(copies: list[Tensor]) -> None:
    """Give every copy of one shared value the gradient of that value: the sum of the copies' gradients."""
    total = torch.stack([copy.grad for copy in copies if copy.grad is not None]).sum(0)
    for copy in copies:
        copy.grad = total.clone()
