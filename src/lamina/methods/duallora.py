"""DualLoRA: orthogonal and residual adapters side by side, with a dynamic memory (arXiv 2411.00623).

    K = X (W_k + O_k + R_k)^T,   V = X (W_v + O_v + R_v)^T           Q is left alone
    O_t leaves alone what the class token reads for old tasks:        O_v z = 0,   q^T O_k = 0   for z, q in span Φ_{t-1}
    Φ_t = [Φ_{t-1}, Ψ_t]          Ψ_t: the new directions of task t, the fewest that make a share ε of its energy
    R_t lives on a fixed basis, and is scaled per input by how much of the input lies in it    (dynamic memory)
    the same similarities say which task an input is of, and lower the scores of the others    (calibration)

Per head, z = X^T a is what the class token's attention a takes from the input and q its query: see lamina/attention.py. A
change of V moves the class token by O_v z, one of K moves its logits by q^T O_k x_j: so these two spaces are all that
has to be kept. V is protected on its inputs (rows of down), K on the outputs of each head (columns of up).

    paper           here                                                                        shape
    O = B_o A_o     branch `orthogonal:<task>`, both factors trained; folded when finished      (o, r), (r, i)
    R = B_r A_r     branch `residual:<task>`, one factor frozen; an expert when finished        (o, r), (r, i)
    Φ               in memory as `<site>/bases`, the Ψ_t side by side                           (d, k)
    Ψ_t             as many of its columns as `<site>/sizes` says                               (d, k_t)
    similarity      s_j = |Ψ_j^T p|^2 / |p|^2, summed over heads; p is z (V) or q (K)            (b, j)
    its mean        in memory as `<site>/shares`: of s_t and of s_{t-1} on task t's own data    (j, 2)

The text of the paper could not be had: what is printed here is a reconstruction from its abstracts and notes on it. The
names of the parts and their purpose are the paper's; every formula is inferred. See docs/papers/duallora.md.

Shape letters: b batch, n readers, p probes (heads for V, readers for K), g blocks (1 for V, heads for K), e size of a
block, d = g e, k columns of a basis, j tasks or experts, r rank or rows of the head, o outputs, i inputs.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lamina.adapters import LowRank
from lamina.errors import MethodError
from lamina.learner import AdapterSite, Learner
from lamina.maths import attention
from lamina.maths.linalg import remove_span, sorted_eigh, steps_to_reach
from lamina.methods.base import Departure, Method, MethodConfig, Needs, Paper, Pass, Refusal, Step
from lamina.rng import seed_of
from lamina.types import Batch, Task

Residual = Literal["own", "previous", "none"]
ROUNDING = 1e-10
"""Share of the energy under which a direction is none."""
LEAST = 1e-6
"""Share of the energy under which float32 cannot compare inputs by it."""


class DualLoRAConfig(MethodConfig):
    rank: int = Field(10, ge=1)
    """Rank of each of the two changes a task adds to every adapted map."""
    epsilon: float = Field(0.95, gt=0, le=1)
    """ε: share of the energy of what a task reads that counts as its space."""
    growing_threshold: bool = True
    """Raise ε linearly towards 1 over the stream. Without a known number of tasks it stays at epsilon."""
    residual: Residual = "own"
    """Where R_t lives: the task's own main new directions; those the task before added, which O may not use; or no R."""
    basis_norm: float = Field(3**-0.5, gt=0)
    """Length of the frozen directions of R; 1/sqrt(3) is that of the rows LoRA starts from."""
    dynamic_memory: bool = True
    """Scale each R per input by similarity. Otherwise all are added in full."""
    calibration: float = Field(0.0, ge=0)
    """How far, at most, the scores of a task that an input is not taken to be of are lowered. 0: not at all."""
    temperature: float = Field(0.1, gt=0)
    """Of the softmax that turns the tasks' similarities into the confidence the calibration uses."""


class DualLoRA(Method[DualLoRAConfig]):
    name = "duallora"
    advice = "To study: old tasks are kept by orthogonality, new ones get a second adapter that is scaled per input."
    paper = Paper(
        title="Dual Low-Rank Adaptation for Continual Learning with Pre-Trained Models",
        authors="Chen et al.",
        venue="arXiv 2024",
        link="https://arxiv.org/abs/2411.00623",
        departures=(
            Departure(
                what="the paper's formulas are not known to us: what is read (z and q), the bases, the similarity and its "
                "scale, the confidence and the calibration are reconstructions",
                whose="ours",
                switch="residual, dynamic_memory, calibration, temperature",
            ),
            Departure(
                what="sources disagree on whether R uses the task's own bases or old ones",
                whose="ours",
                switch="residual",
            ),
            Departure(
                what="rank, ε and its growth are those of InfLoRA's experiments",
                whose="ours",
                switch="rank, epsilon, growing_threshold",
            ),
            Departure(what="older residuals are idle while a task is learnt", whose="ours"),
            Departure(what="every task adds at least one direction, as long as there is room", whose="ours"),
            Departure(what="where the feature is a mean over tokens, all of them are readers", whose="ours"),
        ),
    )
    needs = Needs(
        horizon=True,
        growth="two adapters of rank r and 16 bytes per task and adapted map; at most d directions of d numbers per adapted "
        "map, however many the tasks",
        operations="a step by the projection out of at most d directions per adapted map; an answer by an expert of rank r per "
        "adapted map with every task",
    )
    config_type = DualLoRAConfig
    refuses = (
        Refusal("init", "what it remembers is about the changes it has made"),
        Refusal("merging", "residuals are scaled per input, so the weights are not one matrix to average"),
    )

    # -- learning ---------------------------------------------------------------------------------------------------

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        check(learner)
        learner.head.freeze()
        learner.head.add(task.name, task.classes)
        own = self.config.residual == "own"
        moments = self.moments(learner, batches) if own else {}
        for site in learner.sites.values():
            bases_dk, blocks = self.bases(site), blocks_of(site, learner)
            generator = torch.Generator().manual_seed(seed_of("duallora", torch.initial_seed(), site.name))
            site.add(orthogonal(task.name), LowRank.fresh(site.d_out, site.d_in, self.config.rank, generator))
            if own:
                basis_dr = main_directions(moments[site.name], bases_dk, self.config.rank)
            elif self.config.residual == "previous" and self.learnt(site):
                last_dk = bases_dk[:, bases_dk.shape[1] - int(self.memory[f"{site.name}/sizes"][-1]) :]
                basis_dr = first_directions(last_dk, blocks, self.config.rank)
            else:
                continue
            site.add(residual(task.name), self.on_basis(site, basis_dr.float()))
        self.project(learner)

    def on_basis(self, site: AdapterSite, basis_dr: Tensor) -> LowRank:
        """A change that starts from zero and never leaves the basis: of the inputs of V, of the outputs of K."""
        basis_dr, rank = self.config.basis_norm * basis_dr, self.config.rank
        if site.role == "k":
            return LowRank(trained={"down": torch.zeros(rank, site.d_in)}, frozen={"up": basis_dr})
        return LowRank(trained={"up": torch.zeros(site.d_out, rank)}, frozen={"down": basis_dr.T})

    def after_step(self, learner: Learner, step: Step) -> None:
        self.project(learner)

    def project(self, learner: Learner) -> None:
        """Take out of the live O what would touch Φ. On the factors, not their gradients: exact with any optimiser."""
        for site in learner.sites.values():
            bases_dk = self.bases(site)
            for name, branch in site.live().items():
                if name.startswith(orthogonal("")) and bases_dk.shape[1]:
                    factor = branch.trained()["up" if site.role == "k" else "down"]
                    with torch.no_grad():
                        factor_dr = factor if site.role == "k" else factor.T
                        factor_dr.copy_(remove_span(factor_dr, bases_dk))

    def end(self, learner: Learner, task: Task, batches: Pass) -> None:
        moments = self.moments(learner, batches)
        learner.finish(orthogonal(task.name))
        learner.finish(residual(task.name), fold=False)
        learner.head.freeze()
        for site in learner.sites.values():
            epsilon = self.threshold(self.learnt(site))
            self.remember(site.name, moments[site.name], self.bases(site).double(), epsilon)

    def remember(self, name: str, moment_gee: Tensor, bases_dk: Tensor, epsilon: float) -> None:
        """Φ_t = [Φ_{t-1}, Ψ_t], and what share of the task's own energy lies in Ψ_t and in Ψ_{t-1}."""
        sizes_j = self.memory.get(f"{name}/sizes", torch.zeros(0, dtype=torch.int64, device=bases_dk.device))
        shares_j2 = self.memory.get(f"{name}/shares", bases_dk.new_zeros(0, 2, dtype=torch.float32))
        new_dk = new_directions(moment_gee, bases_dk, epsilon)
        last_dk = bases_dk[:, bases_dk.shape[1] - int(sizes_j[-1:].sum()) :]
        shares_2 = torch.stack([share(moment_gee, new_dk), share(moment_gee, last_dk)])
        self.memory[f"{name}/bases"] = torch.cat([bases_dk, new_dk], 1).float()
        self.memory[f"{name}/sizes"] = torch.cat([sizes_j, sizes_j.new_tensor([new_dk.shape[1]])])
        self.memory[f"{name}/shares"] = torch.cat([shares_j2, shares_2[None].float()])

    def moments(self, learner: Learner, batches: Pass) -> dict[str, Tensor]:
        """Sum of p p^T over the training data of what each site must not disturb, block by block, (g, e, e) float64."""
        sums: dict[str, Tensor] = {}

        def add(site: AdapterSite, probes_bpd: Tensor) -> None:
            blocks = blocks_of(site, learner)
            rows_gne = attention.by_head(probes_bpd.flatten(0, 1), blocks).transpose(0, 1)
            product_gee = (rows_gne.mT @ rows_gne).double()
            sums[site.name] = sums[site.name] + product_gee if site.name in sums else product_gee

        with learner.folded():
            for batch in batches(augmented=False):
                with learner.watching(watchers(learner, batch, add)):
                    learner.features(batch)
        return sums

    # -- predicting -------------------------------------------------------------------------------------------------

    def features(self, learner: Learner, batch: Batch) -> Tensor:
        return self.looked(learner, batch)[0]

    def looked(self, learner: Learner, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Features (b, d) with every residual scaled, and by site how near each input is to each task, (b, tasks), where
        that was looked at."""
        config, near = self.config, dict[str, Tensor]()
        learnt = min(self.learnt(site) for site in learner.sites.values())
        first = {"own": 0, "previous": 1, "none": learnt}[config.residual]
        experts = [residual(task) for task in learner.head.tasks[first:learnt]]

        def look(site: AdapterSite, probes_bpd: Tensor) -> None:
            near[site.name] = similarity(probes_bpd, self.bases(site), self.memory[f"{site.name}/sizes"])

        def gains(site: AdapterSite, x: Tensor) -> Tensor:
            return self.gains(site, near[site.name]) if config.dynamic_memory else x.new_ones(len(x), len(experts))

        needed = learnt and (config.calibration or (experts and config.dynamic_memory))
        choices = {site.name: partial(gains, site) for site in learner.sites.values()}
        at_work = learner.routing(experts, choices) if experts else nullcontext()
        with learner.watching(watchers(learner, batch, look) if needed else {}), at_work:
            return learner.features(batch), near

    def predict(self, learner: Learner, batch: Batch) -> Tensor:
        config = self.config
        features_bd, near = self.looked(learner, batch)
        scores_br: Tensor = learner.head(features_bd)
        if not near or not config.calibration:
            return scores_br
        relative = [near_bj / self.memory[f"{name}/shares"][:, 0].clamp_min(LEAST) for name, near_bj in near.items()]
        confidence_bj = (torch.stack(relative).mean(0) / config.temperature).softmax(1)
        lowered_bj = config.calibration * (confidence_bj.amax(1, keepdim=True) - confidence_bj)
        return scores_br - of_rows(lowered_bj, learner)

    def predict_task_aware(self, learner: Learner, batch: Batch, task: str) -> Tensor:
        """The told task's residual in full and no other; without a dynamic memory there is no choice."""
        if not self.config.dynamic_memory:
            return self.predict(learner, batch)
        with learner.routing([residual(task)], torch.zeros(len(batch), dtype=torch.int64, device=learner.device)):
            scores_br: Tensor = learner.head(learner.features(batch))
        return scores_br

    def gains(self, site: AdapterSite, near_bj: Tensor) -> Tensor:
        """What each residual is scaled by, (b, residuals): never more than the 1 it was trained with."""
        scaled = own_gains if self.config.residual == "own" else previous_gains
        return scaled(near_bj, self.memory[f"{site.name}/shares"])

    # -- the memory -------------------------------------------------------------------------------------------------

    def learnt(self, site: AdapterSite) -> int:
        """How many tasks have ended."""
        return len(self.memory.get(f"{site.name}/sizes", ()))

    def bases(self, site: AdapterSite) -> Tensor:
        """Φ: orthonormal columns (d, k)."""
        width = site.d_out if site.role == "k" else site.d_in
        return self.memory.get(f"{site.name}/bases", torch.zeros(width, 0, device=site.device))

    def threshold(self, learnt: int) -> float:
        """ε_t = ε + (1 - ε) t / T with t = 0 for the first task; constant where the number of tasks is not known."""
        epsilon, horizon = self.config.epsilon, self.horizon if self.config.growing_threshold else None
        return epsilon if horizon is None else epsilon + (1 - epsilon) * min(learnt, horizon - 1) / horizon

    def memory_bound(self, learner: Learner) -> int:
        widths = [site.d_out if site.role == "k" else site.d_in for site in learner.sites.values()]
        return sum(4 * d * d + 16 * len(learner.head.tasks) for d in widths)


def orthogonal(task: str) -> str:
    return f"orthogonal:{task}"


def residual(task: str) -> str:
    return f"residual:{task}"


def check(learner: Learner) -> None:
    roles = sorted({site.role for site in learner.sites.values()})
    if not set(roles) <= {"k", "v"}:
        raise MethodError(
            f"method 'duallora' adapts keys and values only, and backbone.targets has {', '.join(roles)}. Set "
            f"backbone.targets to k and v, or to one of them."
        )
    if learner.backbone.heads is None:
        raise MethodError(
            f"method 'duallora' needs the number of attention heads, which backbone {learner.backbone.name!r} does not "
            f"say. Give `heads` to from_module()."
        )


def blocks_of(site: AdapterSite, learner: Learner) -> int:
    """Keys are protected head by head, values all together."""
    return (learner.backbone.heads or 1) if site.role == "k" else 1


# -- what is read -------------------------------------------------------------------------------------------------------

Show = Callable[[AdapterSite, Tensor], None]


def watchers(learner: Learner, batch: Batch, show: Show) -> dict[str, Callable[[Tensor], None]]:
    """For `Learner.watching`: each site's probes (b, p, d) of this batch are shown, those of keys before those of values."""
    mask_bt = batch.inputs.get("attention_mask")
    return {
        group: partial(probe, learner, {site.role: site for site in sites}, mask_bt, show)
        for group, sites in learner.groups().items()
    }


def probe(
    learner: Learner, sites: Mapping[str, AdapterSite], mask_bt: Tensor | None, show: Show, x_btd: Tensor
) -> None:
    """Show q to the site of the keys and z to that of the values, as the layer with all that is at work now has them."""
    block, heads, x_btd = next(iter(sites.values())).block, learner.backbone.heads or 1, x_btd.float()
    weight_od, bias_o = learner.linear(block, "q")
    bias_o = None if bias_o is None else bias_o.float()
    asked_bno = attention.queries(x_btd, weight_od.float(), bias_o, mask_bt, first=learner.backbone.pooling == "cls")
    if "k" in sites:
        show(sites["k"], asked_bno)
    if "v" in sites:
        logits_bhnt = attention.key_logits(asked_bno, x_btd, learner.linear(block, "k")[0].float(), heads)
        if "k" in sites and "k" in sites["k"].layer.mixtures:
            _, ups_jor, downs_jrd, _ = mixture = sites["k"].layer.mixtures["k"]
            factors = ups_jor.float(), downs_jrd.float()
            logits_bhnt += attention.expert_logits(asked_bno, x_btd, *factors, mixture.gates(x_btd), heads)
        show(sites["v"], attention.pooled_inputs(logits_bhnt, x_btd, asked_bno.shape[2] // heads, mask_bt))


# -- subspaces, block by block ------------------------------------------------------------------------------------------


def free_directions(moment_ee: Tensor, old_ek: Tensor) -> tuple[Tensor, Tensor]:
    """Energies (k,), from large to small, and directions (e, k) of what lies outside the old space, without rounding."""
    for _ in range(2):  # once would leave what float32 has rounded off the old basis
        moment_ee = remove_span(remove_span(moment_ee, old_ek).T, old_ek)
    values_e, vectors_ee = sorted_eigh(moment_ee)
    return values_e, vectors_ee


def main_directions(moment_gee: Tensor, bases_dk: Tensor, rank: int) -> Tensor:
    """In every block the first directions outside the old space, (d, r); zeros where there are not as many."""
    found = []
    for moment_ee, old_ek in zip(moment_gee, by_block(bases_dk.double(), len(moment_gee)), strict=True):
        values_e, vectors_ee = free_directions(moment_ee, old_ek)
        alive = int((values_e > ROUNDING * moment_ee.trace()).sum())
        found.append(padded(vectors_ee[:, :alive], rank))
    return torch.cat(found)


def first_directions(basis_dk: Tensor, blocks: int, rank: int) -> Tensor:
    """In every block its first columns of a basis, (d, r); zeros where there are not as many."""
    return torch.cat([padded(part_ek[:, part_ek.any(0)], rank) for part_ek in by_block(basis_dk, blocks)])


def by_block(basis_dk: Tensor, blocks: int) -> Tensor:
    """(g e, k) as (g, e, k)."""
    return basis_dk.view(blocks, len(basis_dk) // blocks, basis_dk.shape[1])


def padded(directions_ek: Tensor, rank: int) -> Tensor:
    return F.pad(directions_ek[:, :rank], (0, max(0, rank - directions_ek.shape[1])))


def new_directions(moment_gee: Tensor, bases_dk: Tensor, epsilon: float) -> Tensor:
    """Ψ: in every block the fewest directions outside Φ, but at least one, with which both together hold a share ε of the
    energy; (d, k), each column within one block."""
    found = []
    for moment_ee, old_ek in zip(moment_gee, by_block(bases_dk.double(), len(moment_gee)), strict=True):
        values_e, vectors_ee = free_directions(moment_ee, old_ek)
        total = moment_ee.trace()
        alive = int((values_e > ROUNDING * total).sum())
        shares_e = values_e / total.clamp_min(1e-300)
        count = max(1, steps_to_reach(shares_e, 1 - float(shares_e.sum()), epsilon))
        found.append(vectors_ee[:, : min(count, alive)])
    basis_dk: Tensor = torch.block_diag(*found)  # type: ignore[no-untyped-call]
    return basis_dk


def share(moment_gee: Tensor, basis_dk: Tensor) -> Tensor:
    """The share of the energy that lies in the span of these columns."""
    basis_gek = by_block(basis_dk.double(), len(moment_gee))
    held = (basis_gek * (moment_gee @ basis_gek)).sum()
    return held / moment_gee.diagonal(dim1=1, dim2=2).sum().clamp_min(1e-300)


# -- the dynamic memory -------------------------------------------------------------------------------------------------


def similarity(probes_bpd: Tensor, bases_dk: Tensor, sizes_j: Tensor) -> Tensor:
    """s_j: the share of each input's energy that lies in the span of Ψ_j, (b, j)."""
    squares_bk = (probes_bpd @ bases_dk).square().sum(1)
    owner_k = torch.repeat_interleave(sizes_j, output_size=squares_bk.shape[1])
    inside_bj = squares_bk.new_zeros(len(squares_bk), len(sizes_j)).index_add_(1, owner_k, squares_bk)
    return inside_bj / probes_bpd.square().sum((1, 2)).clamp_min(1e-30)[:, None]


def own_gains(near_bj: Tensor, shares_j2: Tensor) -> Tensor:
    """R_j as far as the input lies in Ψ_j, compared with task j's own; 1 at most, (b, j)."""
    return (near_bj / shares_j2[:, 0].clamp_min(LEAST)).clamp_max(1)


def previous_gains(near_bj: Tensor, shares_j2: Tensor) -> Tensor:
    """R_j, which lives in Ψ_{j-1}, is 0 for what lies in there as task j-1's own, 1 as task j's own; (b, j - 1)."""
    old_j, own_j = shares_j2[:-1, 0].clamp_min(LEAST), shares_j2[1:, 1]
    # Where the two tasks are hardly different in Ψ_{j-1}, the gain falls from 1 to 0 over a tenth of what is there.
    return ((1 - near_bj[:, :-1] / old_j) / (1 - own_j / old_j).clamp_min(0.1)).clamp(0, 1)


def of_rows(values_bj: Tensor, learner: Learner) -> Tensor:
    """Values of the tasks that have ended, by row of the head, (b, r); 0 for rows of others."""
    position = {task: j for j, task in enumerate(learner.head.tasks[: values_bj.shape[1]])}
    return F.pad(values_bj, (0, 1))[:, [position.get(row.task, -1) for row in learner.outputs]]
