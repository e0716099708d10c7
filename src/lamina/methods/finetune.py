"""Sequential LoRA: one adapter, trained on one task after another without any protection of old tasks.

    ΔW = up down, both trained, carried from task to task; each task trains its own outputs of the head

It is the lower bound for every method. Trained on all tasks at once (`stream.joint`) it is the upper bound. InfLoRA
(Liang & Li, CVPR 2024, supplement) calls the baseline SeqLoRA. It trains with cross-entropy over the current task's classes
only, like every method there (*inferred* for this baseline: the text does not say).

Shape letters: o outputs, i inputs, r rank.
"""

from pydantic import Field

from lamina.learner import Learner
from lamina.methods.base import Method, MethodConfig, Needs, Paper, Pass, add_shared_lora
from lamina.types import Task


class FinetuneConfig(MethodConfig):
    rank: int = Field(10, ge=1)
    """Rank of the one adapter in every adapted layer."""


class Finetune(Method[FinetuneConfig]):
    name = "finetune"
    advice = "As the lower bound; with --joint, as the reference that sees all data at once."
    paper = Paper(
        title="LoRA: Low-Rank Adaptation of Large Language Models, trained sequentially",
        authors="Hu et al.",
        venue="ICLR 2022",
        link="https://arxiv.org/abs/2106.09685",
    )
    needs = Needs(per_task="nothing", storage="One adapter, whatever the number of tasks.")
    config_type = FinetuneConfig

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        add_shared_lora(learner, task, self.config.rank)
