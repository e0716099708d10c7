"""Self-distillation: while a task is learnt, the scores of older rows stay near what they were before it (Learning without
Forgetting, Li & Hoiem, ECCV 2016, here with the model's own start of the task as the teacher).

    L = L_method + λ T² KL( softmax(z_old / T) || softmax(z / T) )          z: scores of the older rows, T = 2

Shape letters: b batch, j older rows, o outputs and i inputs of an adapted map.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.adapters import standing_in
from lamina.learner import Learner
from lamina.types import Batch, Task

TEMPERATURE = 2.0


def teacher_of(learner: Learner) -> dict[str, Tensor]:
    """The weights (o, i) at work now, by path of the adapted map."""
    return {path: layer.effective().clone() for path, layer in learner.layers.items()}


def divergence(learner: Learner, teacher: Mapping[str, Tensor], batch: Batch, task: Task) -> Tensor:
    """T² KL(old || new) over the rows of all tasks but this one, the mean over examples."""
    old_tasks = [name for name in learner.head.tasks if name != task.name]

    def scores() -> Tensor:
        features_bd = learner.features(batch)
        return torch.cat([learner.head.block(name)(features_bd) for name in old_tasks], 1) / TEMPERATURE

    with torch.no_grad(), standing_in(learner.layers, teacher):
        old_bj = scores()
    return TEMPERATURE**2 * F.kl_div(scores().log_softmax(1), old_bj.softmax(1), reduction="batchmean")
