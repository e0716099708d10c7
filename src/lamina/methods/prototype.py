"""Prototypes: the nearest class mean of frozen features. Nothing is trained, so nothing is forgotten.

    cosine:     score_c(x) = <f(x), m_c> / (|f(x)| |m_c|)         m_c = mean of f over the training examples of class c
    euclidean:  score_c(x) = <f(x), m_c> - |m_c|^2 / 2            (the order of -|f(x) - m_c|^2 / 2)

Either is linear in f, so a class mean is a row of the head. The cosine form on a frozen pre-trained backbone is
SimpleCIL (Zhou et al., IJCV 2025; arXiv 2303.07338, section 4.1). Every learning method has to beat it to be worth
its cost.

A class that comes back in another task (another domain) gets a second row, and the larger one counts: *ours*, the paper
has disjoint classes.

Shape letters: b batch, d width, c classes of the task, r rows of the head.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.errors import DataError
from lamina.learner import Learner
from lamina.methods.base import Departure, Method, MethodConfig, Needs, Paper, Pass, Refusal, local_labels
from lamina.types import Batch, Task


class PrototypeConfig(MethodConfig):
    metric: Literal["cosine", "euclidean"] = "cosine"
    """How close a feature is to a class mean."""


class Prototype(Method[PrototypeConfig]):
    name = "prototype"
    advice = "No training at all: the baseline to beat, and the right choice when the backbone fits the data already."
    paper = Paper(
        title="Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity are All You Need",
        authors="Zhou et al.",
        venue="IJCV 2025",
        link="https://arxiv.org/abs/2303.07338",
        departures=(
            Departure(what="a class that comes back has one mean per task, and the nearest counts", whose="ours"),
        ),
    )
    needs = Needs(
        growth="one mean (a row of the head) per class and task",
        operations="an answer not at all; nothing is trained but for one pass over the data of each task",
    )
    config_type = PrototypeConfig
    refuses = (
        Refusal("init", "it trains nothing"),
        Refusal("merging", "it trains nothing"),
    )
    trains = False

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        block = learner.head.add(task.name, task.classes)
        sums_cd = block.weight.new_zeros(block.weight.shape, dtype=torch.float64)
        counts_c = block.weight.new_zeros(len(task.classes), dtype=torch.float64)
        with learner.folded():
            for batch in batches(augmented=False):
                positions_b = local_labels(task, batch.labels_b)
                sums_cd.index_add_(0, positions_b, learner.features(batch).double())
                counts_c += torch.bincount(positions_b, minlength=len(task.classes))
        if (counts_c == 0).any():
            empty = [c for c, n in zip(task.classes, counts_c, strict=True) if n == 0]
            raise DataError(
                f"task {task.name!r} has no training example of class ids {empty}: a mean needs at least one"
            )
        weight_cd, bias_c = as_linear(sums_cd / counts_c[:, None], self.config.metric)
        block.load_state_dict({"weight": weight_cd.float(), "bias": bias_c.float()})
        learner.head.freeze()

    def end(self, learner: Learner, task: Task, batches: Pass) -> None:
        """Nothing is left to do."""

    def predict(self, learner: Learner, batch: Batch) -> Tensor:
        features_bd = learner.features(batch)
        if self.config.metric == "cosine":
            features_bd = F.normalize(features_bd, dim=1)
        scores_br: Tensor = learner.head(features_bd)
        return scores_br

    def memory_bound(self, learner: Learner) -> int:
        return 0


def as_linear(means_cd: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Class means (c, d) as the weight (c, d) and bias (c,) of a linear classifier: see the head of this file."""
    if metric == "cosine":
        return F.normalize(means_cd, dim=1), means_cd.new_zeros(len(means_cd))
    return means_cd, -means_cd.square().sum(1) / 2
