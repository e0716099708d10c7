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

import torch.nn.functional as F
from torch import Tensor

from lamina.learner import Learner
from lamina.methods.base import Departure, Method, MethodConfig, Needs, Paper, Pass, Refusal, set_means
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
        learner.add_outputs(task)
        if self.classifies:
            set_means(learner, task, batches, self.config.metric)
        learner.head.freeze()

    def predict(self, learner: Learner, batch: Batch) -> Tensor:
        features_bd = learner.features(batch)
        if self.config.metric == "cosine":
            features_bd = F.normalize(features_bd, dim=1)
        scores_bj: Tensor = learner.head(features_bd)
        return scores_bj
