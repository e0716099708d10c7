"""lamina: sequential LoRA at a low later rate, with weight merging, drift compensation and a unified classifier.

    the adapter of task t starts from that of task t-1; from the second task on, a tenth of the learning rate
    M_t = M_{t-1} + a_t (w_t - M_{t-1})                                                              (weight merging)
    means and shared scatter of older outputs move by the linear map W from old to new features      (drift compensation)
    one linear discriminant of the outputs of all tasks, on the features of four blocks              (unified classifier)

No part is new. The adapter is that of `methods/finetune.py`; the rest is consolidation (`engine/consolidate.py`), whose
equations and sources are in `maths/`. New is the choice: one configuration for all streams, made on validation data only
(`benchmarks/grids/choose.yaml`), so that a user who knows nothing of a stream need not set anything.

Shape letters: o outputs, i inputs, r rank.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from lamina.learner import Learner
from lamina.methods.base import Departure, Method, MethodConfig, Needs, Paper, Pass, add_shared_lora
from lamina.types import Task


class LaminaConfig(MethodConfig):
    around: ClassVar[Mapping[str, Any]] = {
        "training.later_lr": 0.1,
        "consolidation.init": "chain",
        "consolidation.merging": "ema",
        "consolidation.drift": "linear+local",
        "consolidation.classifier": "lda",
        "consolidation.layers": 4,
    }
    around_language: ClassVar[Mapping[str, Any]] = {
        "training.later_lr": 0.1,
        "consolidation.init": "chain",
        "consolidation.merging": "ema",
    }
    rank: int = Field(10, ge=1)
    """Rank of the one adapter in every adapted layer."""


class Lamina(Method[LaminaConfig]):
    name = "lamina"
    advice = "By default. It stores no examples and needs no settings."
    paper = Paper(
        title="Sequential LoRA with weight merging, drift compensation and a unified classifier: published parts, combined",
        authors="lamina's authors, from parts by Hu et al. and others",
        venue="this library, 2026",
        link="https://arxiv.org/abs/2106.09685",
        departures=(
            Departure(
                "the parts are published one by one; their combination is ours, chosen on validation data, and each "
                "part has its own setting under `consolidation`",
                "ours",
            ),
        ),
    )
    needs = Needs(
        per_task="a mean per class",
        storage="One adapter, and its merged weights until they have full rank. A mean, a count and a classifier output per "
        "class and task; one scatter matrix.",
        extra="Two passes over the data around every task.",
    )
    config_type = LaminaConfig

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        add_shared_lora(learner, task, self.config.rank)
