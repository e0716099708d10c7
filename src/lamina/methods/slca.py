"""SLCA: all weights of the adapted layers are trained, slowly, and the classifier is aligned afterwards (Zhang et al., ICCV
2023, arXiv 2303.05118).

    W = W_0 + U,  U (o, i) trained from zero at a small rate, carried from task to task           (slow learner)
    classifier    refitted on samples of the classes' stored Gaussians at the end of every task   (class-wise alignment)

U is a branch of full rank whose second factor is fixed to the identity: its gradient is the gradient of W. Alignment is the
unified classifier `aligned`.

    paper                here
    θ_rps, its rate      U; `training.lr`, 1e-4
    θ_cls, its rate      the head; `training.head_lr`, 1e-2
    μ_c, Σ_c             `maths/class_statistics.py`: a mean, and the shared covariance with a part of low rank per class

Shape letters: o outputs, i inputs.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from lamina.adapters import LowRank
from lamina.learner import Learner
from lamina.methods.base import SHARED, Departure, Method, MethodConfig, Needs, Paper, Pass
from lamina.types import Task


class SLCAConfig(MethodConfig):
    around: ClassVar[Mapping[str, Any]] = {
        "training.optimizer": "sgd",
        "training.lr": 1e-4,
        "training.head_lr": 1e-2,
        "consolidation.classifier": "aligned",
        "consolidation.class_covariance_rank": 16,
    }
    around_language: ClassVar[Mapping[str, Any]] = {"training.lr": 1e-4}


class SLCA(Method[SLCAConfig]):
    name = "slca"
    advice = "As the baseline that needs no adapter: full fine-tuning of the layers at a small rate."
    paper = Paper(
        title="SLCA: Slow Learner with Classifier Alignment for Continual Learning on a Pre-trained Model",
        authors="Zhang et al.",
        venue="ICCV 2023",
        link="https://arxiv.org/abs/2303.05118",
        departures=(
            Departure(
                "only the weights of the adapted linear layers are trained, not norms, biases and embeddings", "ours"
            ),
            Departure(
                "a class's covariance is the shared one and a part of rank 16, where the paper stores it whole", "ours"
            ),
            Departure("the classifier is aligned from the linear discriminant, without normalised logits", "ours"),
        ),
    )
    needs = Needs(
        per_task="a mean and 16 vectors per class",
        storage="One update of full rank in every adapted layer. A mean, a count, 16 vectors and a classifier output per class "
        "and task; one scatter matrix.",
        extra="300 steps on samples of the classes when a task ends.",
    )
    config_type = SLCAConfig

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        learner.add_outputs(task)
        for site in learner.sites.values():
            if SHARED not in site.live():
                update_oi = torch.zeros(site.d_out, site.d_in)
                site.add(SHARED, LowRank(trained={"up": update_oi}, frozen={"down": torch.eye(site.d_in)}))
