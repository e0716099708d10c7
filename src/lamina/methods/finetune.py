"""Sequential LoRA: one adapter, trained on one task after another, with nothing to hold it back.

    ΔW = up down, both trained, carried from task to task; each task trains rows of the head of its own.

The lower bound every method is measured against; on `stream.joint()` (all tasks at once) it is the ceiling.
The baseline is called SeqLoRA in InfLoRA (Liang & Li, CVPR 2024, supplement); like every method there it trains with
cross-entropy over the current task's classes only (*inferred* for this baseline: the text does not say).

Shape letters: o outputs, i inputs, r rank.
"""

from pydantic import Field

from lamina.learner import Learner
from lamina.methods.base import Method, MethodConfig, Needs, Paper, Pass, add_shared_lora
from lamina.types import Task


class FinetuneConfig(MethodConfig):
    rank: int = Field(10, ge=1)
    """Rank of the one adapter in every adapted linear map."""


class Finetune(Method[FinetuneConfig]):
    name = "finetune"
    advice = "The floor to beat; with `--joined`, the ceiling: what all data at once would give."
    paper = Paper(
        title="LoRA: Low-Rank Adaptation of Large Language Models, trained sequentially",
        authors="Hu et al.",
        venue="ICLR 2022",
        link="https://arxiv.org/abs/2106.09685",
    )
    needs = Needs(
        growth="the adapter not at all, the head by a row per class", operations="a step and an answer not at all"
    )
    config_type = FinetuneConfig

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        add_shared_lora(learner, task, self.config.rank)

    def end(self, learner: Learner, task: Task, batches: Pass) -> None:
        learner.head.freeze()

    def memory_bound(self, learner: Learner) -> int:
        return 0
