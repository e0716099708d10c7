"""Elastic weight consolidation on adapters (Kirkpatrick et al., PNAS 2017, arXiv 1612.00796), one LoRA chain.

    L(θ) = CE of the task's own outputs + λ/2 Σ_j F_j (θ_j - θ*_j)²            from the second task on
    F = Σ_t F^t,   F^t_j = 1/n Σ_i (∂ log p(y_i | x_i) / ∂θ_j)²             after every task, one gradient per example
    θ* = the factors as the last task left them

    paper   here                                                   shape
    θ       factors of the branch "shared" of every site           up (o, r), down (r, i)
    F       in memory as `fisher/<site>/up`, `fisher/<site>/down`  of θ
    θ*      in memory as `anchor/<site>/up`, `anchor/<site>/down`  of θ
    λ       strength

F is the mean of the squared gradients of single examples, not the square of a mean gradient, which shrinks with the size of
the batch. It is taken on the factors, so it depends on how an update is factored: it is not the Fisher of up @ down itself.

Shape letters: o outputs, i inputs, r rank, b batch, c classes of the task, n examples.
"""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lamina.learner import Learner
from lamina.methods.base import (
    SHARED,
    Departure,
    Method,
    MethodConfig,
    Needs,
    Paper,
    Pass,
    Refusal,
    add_shared_lora,
    hashed_order,
)
from lamina.rng import seed_of, uniform
from lamina.types import Batch, Examples, Ints, Task

TOGETHER = 32
"""Examples whose gradients are computed in one pass."""


class EWCConfig(MethodConfig):
    rank: int = Field(10, ge=1)
    """Rank of the one adapter in every adapted layer."""
    strength: float = Field(1e4, ge=0)
    """λ: weight of the penalty. 0 is sequential LoRA."""
    fisher: Literal["true", "empirical"] = "true"
    """Label of the likelihood: drawn from the model's own prediction (true Fisher), or the given one (empirical)."""
    fisher_samples: int = Field(200, ge=1)
    """Training examples of each task that the Fisher is estimated on, with the shares of its classes; at most all of them."""


class EWC(Method[EWCConfig]):
    name = "ewc"
    advice = "For constant storage without stored examples: one adapter, penalised where old tasks are sensitive."
    paper = Paper(
        title="Overcoming catastrophic forgetting in neural networks",
        authors="Kirkpatrick et al.",
        venue="PNAS 2017",
        link="https://arxiv.org/abs/1612.00796",
        departures=(
            Departure("only low-rank factors are trained and penalised, not the weights", "ours", "rank"),
            Departure(
                "one penalty around the last task's factors, with the sum of all Fishers, instead of one per task",
                "ours",
            ),
            Departure(
                "each task has its own outputs of the head, which later tasks do not train", "ours", of_classifiers=True
            ),
            Departure("the Fisher is estimated on some examples only", "ours", "fisher_samples"),
        ),
    )
    needs = Needs(
        per_task="nothing",
        storage="One adapter and two tensors of its size, whatever the number of tasks.",
        extra="The gradients of `fisher_samples` examples at the end of every task.",
    )
    config_type = EWCConfig
    refuses = (Refusal("init", "its penalty keeps the adapter near its last state"),)

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        add_shared_lora(learner, task, self.config.rank)

    def loss(self, learner: Learner, batch: Batch, task: Task) -> Tensor:
        fitting = learner.loss(batch, task)
        if self.config.strength == 0 or not self.memory:
            return fitting
        return fitting + self.config.strength / 2 * distance(shared(learner), self.memory)

    def end(self, learner: Learner, task: Task, batches: Pass) -> None:
        learner.head.freeze()
        for name, new in self.fisher(learner, task).items():
            old = self.memory.get(f"fisher/{name}")
            self.memory[f"fisher/{name}"] = new if old is None else old + new
        self.memory |= {f"anchor/{name}": factor.detach().clone() for name, factor in shared(learner).items()}

    def fisher(self, learner: Learner, task: Task) -> dict[str, Tensor]:
        """Returns the diagonal Fisher of the shared factors on this task's data, by the names of `shared`."""
        seed, sums = seed_of("fisher", torch.initial_seed()), dict[str, Tensor]()
        chosen_with = seed_of("fisher examples", torch.initial_seed())  # independent of the labels that are drawn
        positions_n = fisher_positions(task.train, self.config.fisher_samples, chosen_with)
        for start in range(0, len(positions_n), TOGETHER):
            chosen_b = positions_n[start : start + TOGETHER]
            batch = task.train.batch(chosen_b).to(learner.device)
            with learner.per_example(SHARED, len(batch)) as copies:
                draw = partial(uniform_draws, learner, task.train.rows_n[chosen_b], seed)
                likelihood_b = learner.log_likelihood(batch, task, draw if self.config.fisher == "true" else None)
                gradients = torch.autograd.grad(likelihood_b.sum(), list(copies.values()))
            for name, gradient in zip(copies, gradients, strict=True):
                squares = gradient.square().sum(0)
                sums[name] = sums[name] + squares if name in sums else squares
        return {name: total / len(positions_n) for name, total in sums.items()}

    def memory_bound(self, learner: Learner) -> int:
        return sum(2 * 4 * self.config.rank * (site.d_in + site.d_out) for site in learner.sites.values())


def fisher_positions(examples: Examples, count: int, seed: int) -> Ints:
    """Returns the sorted positions of `count` examples, or of all if there are fewer. They have the shares of the classes, and
    within a class they are drawn by a hash of their rows, so the order of the examples does not matter."""
    order_n = hashed_order(examples, seed)
    quantiles_n = np.empty(len(examples))
    for label in np.unique(examples.labels_n):
        own = order_n[examples.labels_n[order_n] == label]
        quantiles_n[own] = (np.arange(len(own)) + 0.5) / len(own)
    return np.sort(order_n[np.argsort(quantiles_n[order_n], kind="stable")][:count])


def uniform_draws(learner: Learner, rows_b: Ints, seed: int, number: int) -> Tensor:
    """Returns uniform numbers (b,): those of this number for each of these rows."""
    return torch.from_numpy(uniform(rows_b, seed + number)).to(learner.device)


def shared(learner: Learner) -> dict[str, Tensor]:
    """Returns the factors of the one adapter, by `<site>/up` and `<site>/down`."""
    return {
        f"{site.name}/{part}": value
        for site in learner.sites.values()
        for part, value in site.live()[SHARED].trained().items()
    }


def distance(factors: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> Tensor:
    """Returns Σ_j F_j (θ_j - θ*_j)²."""
    parts = [(memory[f"fisher/{k}"] * (v - memory[f"anchor/{k}"]).square()).sum() for k, v in factors.items()]
    return torch.stack(parts).sum()
