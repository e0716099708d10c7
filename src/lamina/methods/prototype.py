"""Prototypes: the nearest class mean of frozen features. Nothing is trained, so nothing is forgotten.

    cosine:     score_c(x) = <f(x), m_c> / (|f(x)| |m_c|)         m_c = mean of f over the training examples of class c
    euclidean:  score_c(x) = <f(x), m_c> - |m_c|^2 / 2            (the order of -|f(x) - m_c|^2 / 2)

Either is linear in f, so a class mean is the weight of an output of the head. The cosine form on a frozen pre-trained
backbone is SimpleCIL (Zhou et al., IJCV 2025; arXiv 2303.07338, section 4.1). A method that trains must beat it to be worth
its cost.

A class that returns in another task (another domain) gets a second output, and the larger score counts: *ours*, the
paper has disjoint classes.

Shape letters: b batch, d width, c classes of the task, j outputs of the head.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.errors import DataError
from lamina.learner import Learner, local_labels
from lamina.methods.base import Departure, Method, MethodConfig, Needs, Paper, Pass, Refusal
from lamina.types import Batch, Task


class PrototypeConfig(MethodConfig):
    metric: Literal["cosine", "euclidean"] = "cosine"
    """Similarity of a feature to a class mean."""


class Prototype(Method[PrototypeConfig]):
    name = "prototype"
    advice = "As the baseline to beat, or when the backbone already fits the data. Nothing is trained."
    paper = Paper(
        title="Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity are All You Need",
        authors="Zhou et al.",
        venue="IJCV 2025",
        link="https://arxiv.org/abs/2303.07338",
        departures=(Departure("a class that returns has one mean per task, and the nearest counts", "ours"),),
    )
    needs = Needs(
        per_task="nothing",
        storage="One mean per class and task, as an output of the head.",
        step="none",
        extra="One pass over the data of every task.",
    )
    config_type = PrototypeConfig
    refuses_language = "its means of classes are a classifier, and a language model has none"
    refuses = (
        Refusal("init", "it trains nothing"),
        Refusal("merging", "it trains nothing"),
    )
    trains = False

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        block = learner.add_outputs(task)
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

    def predict(self, learner: Learner, batch: Batch) -> Tensor:
        features_bd = learner.features(batch)
        if self.config.metric == "cosine":
            features_bd = F.normalize(features_bd, dim=1)
        scores_bj: Tensor = learner.head(features_bd)
        return scores_bj


def as_linear(means_cd: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Returns the weight (c, d) and bias (c,) of a linear classifier from class means (c, d): see the top of this file."""
    if metric == "cosine":
        return F.normalize(means_cd, dim=1), means_cd.new_zeros(len(means_cd))
    return means_cd, -means_cd.square().sum(1) / 2
