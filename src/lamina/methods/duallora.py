"""DualLoRA: orthogonal and residual adapters in parallel, with a dynamic memory (Chen et al., arXiv 2411.00623).

    K = X (W_k + O_k + R_k)^T,   V = X (W_v + O_v + R_v)^T           Q is not adapted
    O_t leaves the reads of old tasks alone:      O_v z = 0,   q^T O_k = 0        for z, q in span Φ_{t-1}
    Φ_t = [Φ_{t-1}, Ψ_t]          Ψ_t: the fewest new directions of task t with which Φ_t holds a share ε of its energy
    R_t lives on a fixed basis. Its gate for an input is the share of the input in that basis          (dynamic memory)
    the same similarities infer the task of an input, and lower the scores of other tasks              (calibration)

In each head, z = X^T a is the pooled input of the class token's attention a, and q its query: the probes of
`maths/attention.py`. O_v changes the class token by O_v z, and O_k its logits by q^T O_k x_j, so protecting these two spaces
suffices. V is protected on its inputs (rows of down), K on the outputs of each head (columns of up).

    paper           here                                                                               shape
    O = B_o A_o     branch `orthogonal:<task>`, both factors trained; folded when finished             (o, r), (r, i)
    R = B_r A_r     branch `residual:<task>`, one factor frozen; a routed adapter when finished        (o, r), (r, i)
    Φ               in memory as `<site>/bases`, the Ψ_t side by side                                  (d, k)
    Ψ_t             as many of its columns as `<site>/sizes` says                                      (d, k_t)
    similarity      s_j = |Ψ_j^T p|^2 / |p|^2, summed over heads; p is z (V) or q (K)                   (b, j)
    its mean        in memory as `<site>/shares`: of s_t and of s_{t-1} on task t's own data           (j, 2)

The text of the paper was not available: this is a reconstruction from its abstracts and notes by others. The parts and their
purpose are the paper's; every formula is inferred. See docs/papers/duallora.md.

Shape letters: b batch, p probes, g blocks (1 for V, heads for K), e size of a block, d = g e, k columns of a basis, j tasks,
r rank, c outputs of the head, o outputs and i inputs of a layer.
"""

from contextlib import nullcontext
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lamina.adapters import LowRank
from lamina.learner import AdapterSite, Learner
from lamina.learner.probes import blocks, check_sites, probe_moments, watchers
from lamina.maths.block_subspaces import first_directions, main_directions, new_directions, share, similarity
from lamina.maths.linalg import remove_span
from lamina.methods.base import Departure, Method, MethodConfig, Needs, Paper, Pass, Refusal, Step, growing_threshold
from lamina.types import Batch, Task

ROW_NORM = 3**-0.5
"""Length of the frozen directions of R: that of the rows of LoRA's initialisation."""
LEAST = 1e-6
"""Share of the energy below which float32 cannot compare inputs."""


class DualLoRAConfig(MethodConfig):
    rank: int = Field(10, ge=1)
    """Rank of each of the two updates that a task adds to every adapted layer."""
    epsilon: float = Field(0.95, gt=0, le=1)
    """ε: share of the energy of a task's probes that counts as its space."""
    growing_threshold: bool = True
    """Raise ε linearly towards 1 over the stream. Without a known task count it stays at epsilon."""
    residual: Literal["own", "previous", "none"] = "own"
    """Basis of R_t: the task's own main new directions; the previous task's, which O may not use; or no R."""
    dynamic_memory: bool = True
    """Scale each R per input by similarity. Otherwise all are added in full."""
    calibration: float = Field(0.0, ge=0)
    """Upper bound of what is subtracted from the scores of tasks that an input is not assigned to. 0: nothing."""
    temperature: float = Field(0.1, gt=0)
    """Of the softmax that turns the tasks' similarities into the confidence of the calibration."""


class DualLoRA(Method[DualLoRAConfig]):
    name = "duallora"
    advice = "To study orthogonal updates with an extra adapter that is scaled per input."
    paper = Paper(
        title="Dual Low-Rank Adaptation for Continual Learning with Pre-Trained Models",
        authors="Chen et al.",
        venue="arXiv 2024",
        link="https://arxiv.org/abs/2411.00623",
        departures=(
            Departure(
                "the paper's formulas are unknown: the probes z and q, bases, similarity, gates, confidence and "
                "calibration are reconstructions",
                "ours",
                "residual, dynamic_memory, calibration, temperature",
            ),
            Departure("sources disagree on whether R uses the task's own bases or old ones", "ours", "residual"),
            Departure(
                "rank, ε and its growth are those of InfLoRA's experiments", "ours", "rank, epsilon, growing_threshold"
            ),
            Departure("older residuals are not active while a task is trained", "ours"),
            Departure("every task adds at least one direction, as long as one is free", "ours"),
            Departure("if the feature is a mean over tokens, all of them are readers", "ours"),
        ),
    )
    needs = Needs(
        task_count=True,
        per_task="two adapters",
        storage="Two adapters of rank r and 16 bytes per adapted layer and task. At most d directions of d numbers per adapted "
        "layer, whatever the number of tasks.",
        prediction="linear",
        extra="A step projects out of at most d directions per adapted layer. A prediction computes a routed adapter of rank r "
        "per adapted layer and task. Two passes over the data around every task.",
    )
    config_type = DualLoRAConfig
    refuses_language = (
        "it needs attention without rotated queries and keys, and one reader per example: the class token"
    )
    refuses = (
        Refusal("init", "its memory describes the updates it has made"),
        Refusal("merging", "residuals are scaled per input, so there is no single weight to merge"),
    )

    # -- training -----------------------------------------------------------------------------------------------------

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        check_sites(learner, self.name)
        learner.add_outputs(task)
        rank, own = self.config.rank, self.config.residual == "own"
        moments = probe_moments(learner, batches(augmented=False)) if own else {}
        for site in learner.sites.values():
            bases_dk = self.bases(site)
            site.add(orthogonal(task.name), site.fresh_lora(rank, "duallora"))
            if own:
                basis_dr = main_directions(moments[site.name], bases_dk, rank).float()
                site.add(residual(task.name), on_basis(site, basis_dr))
            elif self.config.residual == "previous" and self.learnt(site):
                last_dk = bases_dk[:, bases_dk.shape[1] - int(self.memory[f"{site.name}/sizes"][-1]) :]
                basis_dr = first_directions(last_dk, blocks(learner, site), rank)
                site.add(residual(task.name), on_basis(site, basis_dr))
        self.project(learner)

    def after_step(self, learner: Learner, step: Step) -> None:
        self.project(learner)

    def project(self, learner: Learner) -> None:
        """Project the live O out of Φ: its factor, not the gradient, which is exact with any optimiser."""
        for site in learner.sites.values():
            bases_dk = self.bases(site)
            for name, branch in site.live().items():
                if name.startswith(orthogonal("")) and bases_dk.shape[1]:
                    factor_dr = branch.trained()["up"] if site.role == "k" else branch.trained()["down"].T
                    with torch.no_grad():
                        factor_dr.copy_(remove_span(factor_dr, bases_dk))

    def end(self, learner: Learner, task: Task, batches: Pass) -> None:
        moments = probe_moments(learner, batches(augmented=False))
        learner.finish(orthogonal(task.name))
        learner.finish(residual(task.name), fold=False)
        learner.head.freeze()
        for site in learner.sites.values():
            self.remember(site, moments[site.name])

    def remember(self, site: AdapterSite, moment_gee: Tensor) -> None:
        """Append Ψ_t to Φ, and the shares of the task's own energy in Ψ_t and in Ψ_{t-1}."""
        bases_dk, learnt, name = self.bases(site).double(), self.learnt(site), site.name
        task_count = self.task_count if self.config.growing_threshold else None
        new_dk = new_directions(moment_gee, bases_dk, growing_threshold(self.config.epsilon, learnt, task_count))
        sizes_j = self.memory.get(f"{name}/sizes", torch.zeros(0, dtype=torch.int64, device=site.device))
        shares_j2 = self.memory.get(f"{name}/shares", torch.zeros(0, 2, device=site.device))
        last_dk = bases_dk[:, bases_dk.shape[1] - int(sizes_j[-1:].sum()) :]
        shares_2 = torch.stack([share(moment_gee, new_dk), share(moment_gee, last_dk)])
        self.memory[f"{name}/bases"] = torch.cat([bases_dk, new_dk], 1).float()
        self.memory[f"{name}/sizes"] = torch.cat([sizes_j, sizes_j.new_tensor([new_dk.shape[1]])])
        self.memory[f"{name}/shares"] = torch.cat([shares_j2, shares_2[None].float()])

    # -- prediction ---------------------------------------------------------------------------------------------------

    def features(self, learner: Learner, batch: Batch) -> Tensor:
        return self.routed(learner, batch)[0]

    def routed(self, learner: Learner, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns features (b, d) with every residual gated, and the similarities (b, j) by site, if they were needed."""
        config, similar = self.config, dict[str, Tensor]()
        learnt = min(self.learnt(site) for site in learner.sites.values())
        first = {"own": 0, "previous": 1, "none": learnt}[config.residual]
        names = [residual(task) for task in learner.head.tasks[first:learnt]]

        def compare(site: AdapterSite, probes_bpd: Tensor) -> None:
            similar[site.name] = similarity(probes_bpd, self.bases(site), self.memory[f"{site.name}/sizes"])

        def gates(site: AdapterSite, x_bti: Tensor) -> Tensor:
            return (
                self.gates(site, similar[site.name])
                if config.dynamic_memory
                else x_bti.new_ones(len(x_bti), len(names))
            )

        needed = learnt and (config.calibration or (names and config.dynamic_memory))
        routers = {site.name: partial(gates, site) for site in learner.sites.values()}
        active = learner.routing(names, routers) if names else nullcontext()
        with learner.watching(watchers(learner, batch, compare) if needed else {}), active:
            return learner.features(batch), similar

    def predict(self, learner: Learner, batch: Batch) -> Tensor:
        features_bd, similar = self.routed(learner, batch)
        scores_bc: Tensor = learner.head(features_bd)
        if not similar or not self.config.calibration:
            return scores_bc
        relative = [s_bj / self.memory[f"{name}/shares"][:, 0].clamp_min(LEAST) for name, s_bj in similar.items()]
        confidence_bj = (torch.stack(relative).mean(0) / self.config.temperature).softmax(1)
        lowered_bj = self.config.calibration * (confidence_bj.amax(1, keepdim=True) - confidence_bj)
        position = {task: j for j, task in enumerate(learner.head.tasks[: lowered_bj.shape[1]])}
        task_c = [position.get(output.task, -1) for output in learner.outputs]
        return scores_bc - F.pad(lowered_bj, (0, 1))[:, task_c]  # 0 for outputs of a task that has not ended

    def predict_task_aware(self, learner: Learner, batch: Batch, task: str) -> Tensor:
        """With a dynamic memory: the task's own residual in full and no other."""
        if not self.config.dynamic_memory:
            return self.predict(learner, batch)
        with learner.routing([residual(task)], torch.zeros(len(batch), dtype=torch.int64, device=learner.device)):
            scores_bc: Tensor = learner.head(learner.features(batch))
        return scores_bc

    def gates(self, site: AdapterSite, similar_bj: Tensor) -> Tensor:
        """Returns the gate of each residual, (b, residuals), at most 1, its value in training."""
        gates_of = own_gates if self.config.residual == "own" else previous_gates
        return gates_of(similar_bj, self.memory[f"{site.name}/shares"])

    # -- memory -------------------------------------------------------------------------------------------------------

    def learnt(self, site: AdapterSite) -> int:
        """Returns the number of tasks that have ended."""
        return len(self.memory.get(f"{site.name}/sizes", ()))

    def bases(self, site: AdapterSite) -> Tensor:
        """Returns Φ, orthonormal columns (d, k)."""
        return self.memory.get(f"{site.name}/bases", torch.zeros(width(site), 0, device=site.device))

    def memory_bound(self, learner: Learner) -> int:
        return sum(4 * width(site) ** 2 + 16 * len(learner.head.tasks) for site in learner.sites.values())


def orthogonal(task: str) -> str:
    return f"orthogonal:{task}"


def residual(task: str) -> str:
    return f"residual:{task}"


def width(site: AdapterSite) -> int:
    """Returns d, the size of the protected space."""
    return site.d_out if site.role == "k" else site.d_in


def on_basis(site: AdapterSite, basis_dr: Tensor) -> LowRank:
    """Returns R: zero at first, and always in the span of the basis, of the inputs of V or of the outputs of K."""
    basis_dr, rank = ROW_NORM * basis_dr, basis_dr.shape[1]
    if site.role == "k":
        return LowRank(trained={"down": torch.zeros(rank, site.d_in)}, frozen={"up": basis_dr})
    return LowRank(trained={"up": torch.zeros(site.d_out, rank)}, frozen={"down": basis_dr.T})


def own_gates(similar_bj: Tensor, shares_j2: Tensor) -> Tensor:
    """Returns s_j relative to its mean on task j's own data, at most 1, (b, j)."""
    return (similar_bj / shares_j2[:, 0].clamp_min(LEAST)).clamp_max(1)


def previous_gates(similar_bj: Tensor, shares_j2: Tensor) -> Tensor:
    """Returns the gates (b, j - 1) of residuals R_j in Ψ_{j-1}: 0 for inputs like task j-1's own there, 1 for task j's."""
    old_j, own_j = shares_j2[:-1, 0].clamp_min(LEAST), shares_j2[1:, 1]
    # If the two tasks hardly differ in Ψ_{j-1}, the gate falls from 1 to 0 over a tenth of the share.
    return ((1 - similar_bj[:, :-1] / old_j) / (1 - own_j / old_j).clamp_min(0.1)).clamp(0, 1)
