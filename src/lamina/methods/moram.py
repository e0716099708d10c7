"""MoRAM: a growing mixture of rank-1 associative memories (Lu et al., ICML 2026, arXiv 2506.21035).

    y = W_0 x + Σ_i w_i B_i (A_i x)                     for every token x; i: the atoms of all tasks so far     (eqs. 3, 4)
    s_i = A_i x / sqrt(Σ_j (A_j x)²)                    relevance: an atom judges itself, there is no router    (eq. 5)
    w = softmax(s / τ) over the k largest s_i           0 for the others                                        (eqs. 6, 7)
    w_i = 0 where s_i < δ                               in predictions only; w is not normalised again          (eq. 8)

Row A_i is the key of an atom and column B_i its value. Task t trains r atoms, which compete with the frozen atoms of older
tasks for every token. The loss is that of the task, with no other term. Predictions need no task identity.

    paper      here                                                                   shape
    A_i        rows of `down` (trained, LoRA's start), then of the finished branch    (r, i)
    B_i        columns of `up` (trained, from zero), then of the finished branch      (o, r)
    s, w       inside and result of `mixing_weights`                                  (b, t, p)
    k          budget
    τ, δ       temperature, threshold

The equations are those of the authors' project page and of their released code (Artificer-AI-Lab/MoRAM, gh-pages and aaa51d8).
The code has two parts, for language models (TRACE) and for CLIP (X-TAIL). See docs/papers/moram.md.

Shape letters: b batch, d width of the features, t tokens, o outputs, i inputs, r rank, p atoms of all tasks, k active ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lamina.adapters import Mixture, Router
from lamina.learner import AdapterSite, Learner
from lamina.methods.base import Departure, Method, MethodConfig, Needs, Paper, Pass, Refusal
from lamina.types import Batch, Task


class MoRAMConfig(MethodConfig):
    rank: int = Field(8, ge=1)
    """r: atoms that each task adds to every adapted layer."""
    budget: int | None = Field(None, ge=1)
    """k: atoms that are active for a token, at most. Not set: the rank, but at least 2 (released code)."""
    temperature: float = Field(0.03, gt=0)
    """τ: of the softmax over relevances. Small values favour the most relevant atom."""
    threshold: float = Field(0.2, ge=0, lt=1)
    """δ: relevance below which an atom is not used for predictions. 0 uses all atoms within the budget."""


class Atoms(Mixture):
    """All atoms of a site as one adapter of rank p. The router maps the projections A_i x to the weights, both (b, t, p)."""

    __slots__ = ()

    def update(self, x_bti: Tensor) -> Tensor:
        assert not isinstance(self.router, Tensor)
        projections_btp = x_bti @ self.downs_eri[0].T
        weights_btp = self.router(projections_btp)
        return (weights_btp * projections_btp).to(x_bti.dtype) @ self.ups_eor[0].T


class MoRAM(Method[MoRAMConfig]):
    name = "moram"
    advice = "For tasks that share parts: rank-1 adapters of all tasks, weighted for every token."
    paper = Paper(
        title="Little By Little: Continual Learning via Incremental Mixture of Rank-1 Associative Memory Experts",
        authors="Lu et al.",
        venue="ICML 2026",
        link="https://arxiv.org/abs/2506.21035",
        departures=(
            Departure("at least two atoms are active, even with rank 1", "released code", "budget"),
            Departure(
                "values are not scaled; TRACE's code doubles those of the current task and drops the factor at its end",
                "ours",
            ),
            Departure(
                "no spare atoms in predictions; TRACE's code has r random keys of value zero, which take part in "
                "normalisation and budget",
                "ours",
            ),
            Departure("no dropout before the keys; TRACE's code has 0.1, X-TAIL's none", "ours"),
            Departure("relevances and weights are computed in float32", "ours"),
            Departure(
                "a classifier with outputs for each task; CLIP compares with embedded class names",
                "ours",
                of_classifiers=True,
            ),
        ),
    )
    needs = Needs(
        per_task="an adapter",
        storage="r rank-1 adapters per adapted layer and task.",
        step="linear",
        prediction="linear",
        extra="Every token is compared with the keys of all tasks, so updates cannot be folded into the weight.",
    )
    config_type = MoRAMConfig
    routes_training = True
    refuses = (
        Refusal("init", "its atoms start from the pre-trained weights"),
        Refusal("merging", "atoms are weighted for every token, so there is no single weight to merge"),
    )

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        learner.add_lora(task, self.config.rank, "moram")

    def loss(self, learner: Learner, batch: Batch, task: Task) -> Tensor:
        with self.in_training(learner):
            return learner.loss(batch, task)

    def end(self, learner: Learner, task: Task, batches: Pass) -> None:
        learner.finish(task.name, fold=False)
        learner.head.freeze()

    def features(self, learner: Learner, batch: Batch) -> Tensor:
        with self.activated(learner, self.config.threshold):
            return learner.features(batch)

    @contextmanager
    def in_training(self, learner: Learner) -> Iterator[None]:
        with self.activated(learner, 0):
            yield

    @contextmanager
    def predicting(self, learner: Learner, batch: Batch, task: str | None = None) -> Iterator[None]:
        with self.activated(learner, self.config.threshold):
            yield

    @contextmanager
    def activated(self, learner: Learner, threshold: float) -> Iterator[None]:
        """Within the context every site adds the mixture of its atoms, live ones included, to the pre-trained layer. Before
        the first task there are none."""
        config = self.config
        router = partial(
            mixing_weights,
            budget=config.budget or max(config.rank, 2),
            temperature=config.temperature,
            threshold=threshold,
        )
        with learner.bare():  # live atoms act in the mixture only
            try:
                for site in learner.sites.values():
                    if site.finished() or site.live():
                        site.layer.mixtures[site.role] = atoms(site, router)
                yield
            finally:
                for layer in learner.layers.values():
                    layer.mixtures.clear()


def atoms(site: AdapterSite, router: Router) -> Atoms:
    """Returns the mixture of all atoms of a site, the oldest first, with gradients for those in training."""
    factors = [(finished.up_or, finished.down_ri) for finished in site.finished().values()]
    factors += [branch.factors() for branch in site.live().values()]
    dtype = site.layer.weight_oi.dtype
    ups_op, downs_pi = torch.cat([up_or for up_or, _ in factors], 1), torch.cat([down_ri for _, down_ri in factors])
    return Atoms(site.outputs, ups_op.to(dtype)[None], downs_pi.to(dtype)[None], router)


def mixing_weights(projections_btp: Tensor, budget: int, temperature: float, threshold: float) -> Tensor:
    """Returns w, the weight of every atom for every token, (b, t, p) float32."""
    relevance_btp = F.normalize(projections_btp.float(), dim=-1)
    best_btk, atom_btk = relevance_btp.topk(min(budget, relevance_btp.shape[-1]))
    logits_btp = torch.full_like(relevance_btp, -torch.inf).scatter(-1, atom_btk, best_btk / temperature)
    weights_btp = logits_btp.softmax(-1)
    return weights_btp * (relevance_btp >= threshold) if threshold else weights_btp
