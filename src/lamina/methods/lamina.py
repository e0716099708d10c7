"""lamina: sequential LoRA that goes on slowly, and around it an average, a shift and a tail.

    the adapter of task t starts from that of task t-1, from the second task on at a tenth of the rate        (chain)
    M_t = M_{t-1} + a_t (w_t - M_{t-1})                                                                       (average)
    means and the shared scatter of older rows move with the linear map W from old features to new ones       (shift)
    one linear discriminant of the rows of all tasks, on the features of four blocks side by side             (tail)

Nothing of it is new in itself: the adapter is that of `methods/finetune.py`, and what happens around it is `consolidate/`,
where each equation has its source. New is the choice: one configuration for all streams, made on validation data only
(`benchmarks/grids/choose.yaml`), so that whoever knows nothing of their stream need set nothing.

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
    rank: int = Field(10, ge=1)
    """Rank of the one adapter in every adapted linear map."""


class Lamina(Method[LaminaConfig]):
    name = "lamina"
    advice = "Start here: one adapter, and one classifier of all classes from their moved means. Needs no settings."
    paper = Paper(
        title="Chain, average, shift and tail around sequential LoRA: a combination of published parts",
        authors="lamina's authors; the parts by Hu et al., Hayes & Kanan, Gomez-Villa et al. and others",
        venue="this library, 2026",
        link="https://arxiv.org/abs/2106.09685",
        departures=(
            Departure(
                what="the parts are published one by one; which of them are combined is our choice, on validation data, and "
                "each has a setting of its own under `consolidation`",
                whose="ours",
            ),
        ),
    )
    needs = Needs(
        growth="the adapter not at all, the average until its rank is full; a mean, a count and a row of the classifier for "
        "every class and task",
        operations="a step, an answer, and the two passes around a task not at all",
    )
    config_type = LaminaConfig

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        add_shared_lora(learner, task, self.config.rank)

    def end(self, learner: Learner, task: Task, batches: Pass) -> None:
        learner.head.freeze()

    def memory_bound(self, learner: Learner) -> int:
        return 0
