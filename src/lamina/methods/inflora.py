"""InfLoRA: interference-free low-rank adaptation (Liang & Li, CVPR 2024, arXiv 2404.00228).

    e = W_{t-1} h + A_t B_t h                               only A_t learns                                   (eq. 1)
    B_t = the r main directions of the new task's inputs, projected out of the old tasks' inputs        (eqs. 6 to 8)
    DualGPM stores those old inputs, as a basis of their span or of its complement, whichever is smaller

A step on A_t alone is the full-weight step projected onto the rows of B_t (proposition 1). These rows are orthogonal to
the inputs of old tasks, so A_t B_t h = 0 for every old input h in the stored span.

    paper   here                          shape
    B_t     down_ri (frozen)              (r, i)      the released code calls it lora_A
    A_t     up_or   (trained, starts 0)   (o, r)      the released code calls it lora_B
    H_t     not stored; moment_dd = H_t H_t^T / n     (d, d)
    M_t     Subspace.basis_dk, kind "old"             (d, k)      in memory as `<group>/old`
    M_t^⊥   Subspace.basis_dk, kind "free"            (d, k)      in memory as `<group>/free`
    ε       epsilon

Equation numbers are the paper's. The released code (liangyanshuo/InfLoRA, e08b00e) decides the published numbers, so its
differences are the default, each with a switch: see `InfLoRA.paper.departures`.

Shape letters: d = i inputs of a layer, o outputs, r rank, k columns of a basis.
"""

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from lamina.adapters import LowRank
from lamina.learner import Learner
from lamina.maths.linalg import complement, keep_span, remove_span, sorted_eigh, steps_to_reach, top_eigenvectors
from lamina.methods.base import Departure, Method, MethodConfig, Needs, Paper, Pass, growing_threshold
from lamina.types import Task

Source = Literal["released", "paper"]
Design = Literal["freed", "not freed", "random"]
ROUNDING: dict[Source, float] = {"released": 1e-12, "paper": 1e-6}
"""Share of the energy below which a direction is rounding noise. Moments are sums of float32 products; P C C P squares them."""


class InfLoRAConfig(MethodConfig):
    rank: int = Field(10, ge=1)
    """r: rank of the update that each task adds to every adapted layer."""
    design: Design = "freed"
    """What B_t spans: main directions of the new task's inputs, freed of the old tasks' (the method); those not freed; or
    random ones, freed (the two controls of the paper's ablation)."""
    epsilon: float = Field(0.95, gt=0, le=1)
    """ε: share of the inputs' energy that counts as the old tasks' space after the first task."""
    growing_threshold: bool = True
    """Raise ε linearly towards 1 over the stream. Without a known task count it stays at epsilon."""
    task_count: int | None = Field(None, ge=1)
    """The number of tasks ε grows over. Not set: the length of the stream; an open-ended stream keeps ε constant."""
    row_norm: float = Field(3**-0.5, gt=0)
    """Length of the rows of B_t. 1/sqrt(3) is the released code's, 1 the paper's; it scales the step by its square."""
    spectrum: Source = "released"
    """Main directions of the freed inputs from P C C P (released) or P C P (paper, eq. 8). C = moment, P = projector."""
    criterion: Source = "released"
    """Energy that ε is a share of: squared eigenvalues of the moment, and one direction fewer after the first task
    (released); or the eigenvalues (paper, after GPM)."""
    augmented_moments: bool = True
    """Take the moments over randomly augmented training images, like the released code; otherwise over plain ones."""


class Subspace(NamedTuple):
    """The input space of the old tasks. kind: whether the orthonormal columns of basis_dk (d, k) span it or its complement."""

    kind: Literal["old", "free"]
    basis_dk: Tensor

    @property
    def old_dimension(self) -> int:
        d, k = self.basis_dk.shape
        return k if self.kind == "old" else d - k

    def project_out_old(self, matrix_do: Tensor) -> Tensor:
        """Returns the part of the columns of X (d, o) outside the old tasks' space (eq. 6 for "old", eq. 7 for "free")."""
        return (remove_span if self.kind == "old" else keep_span)(matrix_do, self.basis_dk)


class InfLoRA(Method[InfLoRAConfig]):
    name = "inflora"
    advice = "For bounded memory without stored examples: new tasks leave the old tasks' input space alone."
    paper = Paper(
        title="InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning",
        authors="Liang & Li",
        venue="CVPR 2024",
        link="https://arxiv.org/abs/2404.00228",
        departures=(
            Departure(
                "ε is a share of the squared eigenvalues of the moment, not of the inputs' energy",
                "released code",
                "criterion",
            ),
            Departure(
                "after the first task one direction fewer than ε requires is stored, but at least one",
                "released code",
                "criterion",
            ),
            Departure(
                "ε grows linearly with the task, which needs the task count",
                "released code",
                "growing_threshold, task_count",
            ),
            Departure("rows of B_t have length 1/sqrt(3)", "released code", "row_norm"),
            Departure(
                "B_t from the singular vectors of the projected moment, not of the projected inputs",
                "released code",
                "spectrum",
            ),
            Departure(
                "moments over randomly augmented images, so B_t and M_t are random",
                "released code",
                "augmented_moments",
            ),
            Departure(
                "finished branches are folded into the weight, as in the paper; the released code keeps them all",
                "ours",
            ),
            Departure(
                "if no input direction is free, rows of B_t are zero; the released code takes arbitrary directions, "
                "which may lie in the old space",
                "ours",
            ),
            Departure(
                "a first task that needs over half of all directions is stored by its complement; the released code "
                "labels it so but stores the span",
                "ours",
            ),
        ),
    )
    needs = Needs(
        task_count=True,
        per_task="an adapter",
        storage="One adapter of rank r per adapted layer and task. A basis of at most d/2 directions per layer input, whatever "
        "the number of tasks.",
        extra="Two passes over the data around every task.",
    )
    config_type = InfLoRAConfig

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        config = self.config
        learner.add_outputs(task)
        moments = learner.input_moments(batches(augmented=config.augmented_moments))
        for group, sites in learner.groups().items():
            old = None if config.design == "not freed" else self.old(group)
            moment_dd = random_moment(moments[group]) if config.design == "random" else moments[group]
            down_ri = config.row_norm * main_directions(moment_dd, old, config.rank, config.spectrum).T
            for site in sites:
                up_or = torch.zeros(site.d_out, config.rank)
                site.add(task.name, LowRank(trained={"up": up_or}, frozen={"down": down_ri}))  # eq. 1

    def end(self, learner: Learner, task: Task, batches: Pass) -> None:
        learner.finish(task.name)
        learner.head.freeze()
        learnt = int(self.memory.get("tasks", torch.tensor(0)))
        epsilon = self.threshold(learnt)
        for group, moment_dd in learner.input_moments(batches(augmented=self.config.augmented_moments)).items():
            space = extend(self.old(group), moment_dd, epsilon, self.config.criterion)
            self.memory.pop(f"{group}/old", None)
            self.memory.pop(f"{group}/free", None)
            self.memory[f"{group}/{space.kind}"] = space.basis_dk.float().contiguous()
        self.memory["tasks"] = torch.tensor(learnt + 1)

    def old(self, group: str) -> Subspace | None:
        """Returns the old tasks' input space of this group; None before the first task has ended."""
        if f"{group}/old" in self.memory:
            return Subspace("old", self.memory[f"{group}/old"].double())
        if f"{group}/free" in self.memory:
            return Subspace("free", self.memory[f"{group}/free"].double())
        return None

    def threshold(self, learnt: int) -> float:
        task_count = self.config.task_count or self.task_count
        return growing_threshold(self.config.epsilon, learnt, task_count if self.config.growing_threshold else None)

    def memory_bound(self, learner: Learner) -> int:
        widths = [sites[0].d_in for sites in learner.groups().values()]
        return sum(4 * d * ((d + 1) // 2) for d in widths) + 8


def random_moment(moment_dd: Tensor) -> Tensor:
    """Returns the moment (d, d) of d Gaussian inputs, in place of this one."""
    noise_dn = torch.randn(moment_dd.shape, dtype=moment_dd.dtype).to(moment_dd.device)
    return noise_dn @ noise_dn.T / len(noise_dn)


def main_directions(moment_dd: Tensor, old: Subspace | None, rank: int, spectrum: Source) -> Tensor:
    """Returns the r main directions of the new task's inputs outside the old space, orthonormal columns (d, r) (eqs. 6 to
    8). Columns for which no direction is free are zero."""
    energy_dd = moment_dd @ moment_dd if spectrum == "released" else moment_dd
    if old is None:
        return top_eigenvectors(energy_dd, rank, ROUNDING[spectrum])
    freed_dd = old.project_out_old(old.project_out_old(energy_dd).T)
    floor = ROUNDING[spectrum] * energy_dd.diagonal().max().item()
    directions_dr = top_eigenvectors(freed_dd, rank)
    return directions_dr * (torch.einsum("dr,de,er->r", directions_dr, freed_dd, directions_dr) > floor)


def extend(old: Subspace | None, moment_dd: Tensor, epsilon: float, criterion: Source) -> Subspace:
    """Returns the old space after one more task with this input moment: DualGPM (section 3.3, released update_DualGPM).

    It adds the fewest directions with which the span holds a share ε of the energy (released criterion: one fewer after
    the first task, but at least one). The smaller of the span and its complement is stored; a complement stays one.
    """
    d = len(moment_dd)
    energy_dd = moment_dd @ moment_dd if criterion == "released" else moment_dd
    total = energy_dd.trace().item()
    if old is None:
        values_d, vectors_dd = sorted_eigh(energy_dd)
        short = int((values_d.cumsum(0) / total < epsilon).sum())
        basis_dk = vectors_dd[:, : max(1, short) if criterion == "released" else short + 1]
    elif old.kind == "old":
        rest_dd = old.project_out_old(old.project_out_old(energy_dd).T)
        values_d, vectors_dd = sorted_eigh(rest_dd)
        room = d - old.basis_dk.shape[1]
        added = steps_to_reach(values_d[:room] / total, 1 - rest_dd.trace().item() / total, epsilon)
        basis_dk = torch.cat([old.basis_dk, vectors_dd[:, :added]], 1)
    else:
        # In the coordinates of the free space: directions that the new task fills leave it.
        free_kk = old.basis_dk.T @ energy_dd @ old.basis_dk
        values_k, vectors_kk = sorted_eigh(free_kk)
        taken = steps_past(values_k / total, free_kk.trace().item() / total, 1 - epsilon)
        return Subspace("free", old.basis_dk @ vectors_kk[:, taken:])
    return Subspace("old", basis_dk) if basis_dk.shape[1] <= d / 2 else Subspace("free", complement(basis_dk))


def steps_past(shares_k: Tensor, free_share: float, allowed: float) -> int:
    """Returns how many values must leave the free space until the energy left in it is below `allowed`."""
    if free_share < allowed:
        return 0
    left_k = free_share - torch.cumsum(shares_k, 0)
    return min(int((left_k >= allowed).sum().item()) + 1, len(shares_k))
