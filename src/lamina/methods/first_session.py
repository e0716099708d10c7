"""What methods have in common that train one adapter on the first task, and only add outputs afterwards.

Shape letters: b batch, j outputs of the head.
"""

from typing import TypeVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lamina.learner import Learner
from lamina.methods.base import Method, MethodConfig, Pass, Refusal, add_shared_lora, set_means
from lamina.types import Batch, Task

WHY = "it trains on the first task only"


class FirstSessionConfig(MethodConfig):
    rank: int = Field(10, ge=1)
    """Rank of the adapter in every adapted layer."""


C = TypeVar("C", bound=FirstSessionConfig)


class FirstSession(Method[C]):
    """Under the classifier `own` a task's outputs are its class means, compared by their cosine."""

    refuses = (Refusal("init", WHY), Refusal("merging", WHY), Refusal("drift", f"{WHY}, so no feature moves later"))
    refuses_language = "from the second task on it only fits a classifier, and a language model has none"
    first_session = True

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        if learner.head.tasks:
            learner.add_outputs(task)
        else:
            add_shared_lora(learner, task, self.config.rank)

    def end(self, learner: Learner, task: Task, batches: Pass) -> None:
        if self.classifies:
            set_means(learner, task, batches, "cosine")
        learner.head.freeze()

    def predict(self, learner: Learner, batch: Batch) -> Tensor:
        scores_bj: Tensor = learner.head(F.normalize(self.features(learner, batch), dim=1))
        return scores_bj
