"""Posterior: one adapter per task, each trained alone, and predictions weighed by the posterior probability of the task.

    p(j | x) = p(t | x) p(j | t, x)                     j an output of task t

    p(t | x)      sum over the outputs j of t of softmax_j s(f(x)),   f: features of the backbone alone
    p(j | t, x)   for the most probable task: softmax over its outputs of ½ (log softmax s_t + log softmax h_t)(f_t(x))
                  for the others:             softmax over their outputs of s(f(x))
    s, s_t        linear discriminants: of all outputs on f; of the outputs of t on f_t, the features through its adapter
    h_t           the outputs of the head that were trained with the adapter

Nothing here ever changes when a later task is learnt, but s, whose statistics are sums. So there is no drift and no
forgetting: a task loses only what it is mistaken for. Tasks may be trained in any order, or side by side.

The factors are those of Kim et al., *A Theoretical Study on Solving Continual Learning* (NeurIPS 2022, arXiv 2211.02633):
class-incremental learning needs prediction within a task and the inference of the task, and these suffice. An adapter for
every task, selected per input, is CoLoR's (`methods/color.py`). Ours: the discriminant of all outputs as p(t | x), instead of
the nearest centroid; its conditional for the tasks not selected, so that the choice of a task is not final; the mean of s_t and
h_t.

    here                     shape       what
    router/weight_jd, bias_j (j, d)      s
    adapted/<task>/...       (c, d)      s_t
    statistics/...                       of f: means (j, d), counts (j,), one scatter (d, d)

Shape letters: b batch, n examples, d width (of several blocks side by side), j outputs of the head, c outputs of a task,
t tasks.
"""

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from lamina.learner import Learner, local_labels
from lamina.maths import classifiers
from lamina.maths.class_statistics import Statistics, concatenated, of_features
from lamina.maths.classifiers import LinearClassifier
from lamina.methods.base import Departure, Method, MethodConfig, Needs, Paper, Pass, Refusal
from lamina.methods.routed import through_adapters
from lamina.types import Batch, Task

ALONE = "every adapter is trained alone, and selected per input"


class PosteriorConfig(MethodConfig):
    rank: int = Field(10, ge=1)
    """Rank of the adapter of each task in every adapted layer."""
    layers: int = Field(4, ge=1)
    """How many of the last blocks give the discriminants their features (all blocks if there are fewer)."""


class Posterior(Method[PosteriorConfig]):
    name = "posterior"
    advice = "For tasks that can be told apart: no drift, no interference; a prediction takes two passes."
    paper = Paper(
        title="A Theoretical Study on Solving Continual Learning: prediction within the task times inference of the task",
        authors="Kim et al.; the method is by lamina's authors, from published parts",
        venue="NeurIPS 2022; this library, 2026",
        link="https://arxiv.org/abs/2211.02633",
        departures=(
            Departure("the task is inferred by a linear discriminant of all outputs on the frozen backbone", "ours"),
            Departure(
                "the selected task's classes are told apart by a discriminant and a head, on equal terms", "ours"
            ),
        ),
    )
    needs = Needs(
        per_task="an adapter, a mean per class",
        storage="One adapter of rank r per adapted layer and task. A mean, a count and two classifier outputs per class and "
        "task; one scatter matrix.",
        prediction="linear",
        extra="A prediction takes two passes. One pass over the data after every task, through both models.",
    )
    config_type = PosteriorConfig
    refuses = (
        Refusal("init", ALONE),
        Refusal("merging", ALONE),
        Refusal("drift", "the statistics that infer the task are of the frozen backbone, which never drifts"),
        Refusal("classifier", "it has discriminants of its own"),
    )
    refuses_language = (
        "it infers the task by a discriminant of all classes, and a language model has none; `color` has no need of one"
    )
    selects = True
    independent = True

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        learner.backbone.check_layers(self.config.layers)
        learner.add_lora(task, self.config.rank, self.name)

    def end(self, learner: Learner, task: Task, batches: Pass) -> None:
        learner.finish(task.name, fold=False)
        learner.head.freeze()
        frozen, adapted, outputs = [], [], []
        with torch.no_grad():
            for batch in batches(augmented=False):
                frozen.append(self.features(learner, batch).cpu())
                adapted.append(self.through(learner, batch, [task.name], torch.zeros_like(batch.labels_b)).cpu())
                outputs.append(local_labels(task, batch.labels_b).cpu())
        output_n, blocks = torch.cat(outputs), self.blocks(learner)
        of_task = of_features(torch.cat(adapted), output_n, len(task.classes), blocks=blocks)
        statistics = of_features(torch.cat(frozen), output_n, len(task.classes), blocks=blocks)
        if kept := self.part("statistics"):
            statistics = concatenated(Statistics.of_tensors(kept, blocks), statistics)
        self.keep(learner, "statistics", statistics.tensors())
        self.keep(learner, "router", classifiers.lda(statistics).tensors())
        self.keep(learner, f"adapted/{task.name}", classifiers.lda(of_task).tensors())

    def features(self, learner: Learner, batch: Batch) -> Tensor:
        """Returns the features (b, d) of the backbone alone."""
        with learner.bare():
            return learner.features(batch, self.config.layers)

    def predict(self, learner: Learner, batch: Batch) -> Tensor:
        tasks = self.learnt(learner)
        task_j = self.task_of_outputs(learner, tasks)
        scores_bj = self.classifier("router").scores(self.features(learner, batch))
        log_bt, within_bj = factors(scores_bj, task_j[task_j >= 0], len(tasks))
        chosen_b = log_bt.argmax(1)
        within_bj = self.refined(learner, batch, tasks, chosen_b, padded(within_bj, task_j))
        return (padded(log_bt[:, task_j[task_j >= 0]], task_j) + within_bj).float()

    def predict_task_aware(self, learner: Learner, batch: Batch, task: str) -> Tensor:
        tasks = self.learnt(learner)
        if task not in tasks:
            return self.predict(learner, batch)
        chosen_b = torch.full_like(batch.labels_b, tasks.index(task))
        nothing_bj = torch.full((len(batch), len(learner.outputs)), -torch.inf, device=learner.device).double()
        return self.refined(learner, batch, tasks, chosen_b, nothing_bj).float()

    def refined(
        self, learner: Learner, batch: Batch, tasks: Sequence[str], chosen_b: Tensor, within_bj: Tensor
    ) -> Tensor:
        """Returns log p(j | t, x), (b, j) float64, for the chosen task by its adapter. within_bj: by the router."""
        features_bd = self.through(learner, batch, tasks, chosen_b)
        head_bj = learner.head(features_bd[:, -learner.backbone.width :]).double()
        task_j, within_bj = self.task_of_outputs(learner, tasks), within_bj.clone()
        for t in set(chosen_b.tolist()):
            rows_b, own_j = chosen_b == t, task_j == t
            by_lda = self.classifier(f"adapted/{tasks[t]}").scores(features_bd[rows_b]).log_softmax(1)
            both = (by_lda + head_bj[rows_b][:, own_j].log_softmax(1)) / 2
            within_bj[rows_b.nonzero(), own_j.nonzero()[:, 0]] = both.log_softmax(1)
        return within_bj

    # -- parts ----------------------------------------------------------------------------------------------------------

    def through(self, learner: Learner, batch: Batch, tasks: Sequence[str], chosen_b: Tensor) -> Tensor:
        return through_adapters(learner, batch, tasks, chosen_b, self.config.layers)

    def blocks(self, learner: Learner) -> int:
        """Returns how many blocks the features are of."""
        return min(self.config.layers, len(learner.backbone.stages) - 1) if self.config.layers > 1 else 1

    def learnt(self, learner: Learner) -> list[str]:
        """Returns the tasks that have ended, in their order."""
        return [task for task in learner.head.tasks if f"adapted/{task}/weight_jd" in self.memory]

    def task_of_outputs(self, learner: Learner, tasks: Sequence[str]) -> Tensor:
        """Returns the position (j,) among `tasks` of the task of every output, -1 for one that has not ended."""
        position = {task: t for t, task in enumerate(tasks)}
        return torch.tensor([position.get(output.task, -1) for output in learner.outputs], device=learner.device)

    def part(self, name: str) -> dict[str, Tensor]:
        """Returns what is kept under a name."""
        start = f"{name}/"
        return {key.removeprefix(start): value for key, value in self.memory.items() if key.startswith(start)}

    def keep(self, learner: Learner, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.memory |= {f"{name}/{key}": value.to(learner.device) for key, value in tensors.items()}

    def classifier(self, name: str) -> LinearClassifier:
        return LinearClassifier(self.memory[f"{name}/weight_jd"], self.memory[f"{name}/bias_j"])

    def memory_bound(self, learner: Learner) -> int:
        outputs, width = len(learner.outputs), self.blocks(learner) * learner.backbone.width
        return 8 * (3 * outputs * (width + 1) + width**2)


def factors(scores_bj: Tensor, task_j: Tensor, tasks: int) -> tuple[Tensor, Tensor]:
    """Returns log p(t | x), (b, t), and log p(j | t, x), (b, j), of scores whose softmax is p(j | x). task_j: the task of every
    output."""
    log_bj, task_bj = scores_bj.log_softmax(1), task_j.expand(len(scores_bj), -1)
    best_bt = log_bj.new_full((len(log_bj), tasks), -torch.inf).scatter_reduce(1, task_bj, log_bj, "amax")
    shares_bj = (log_bj - best_bt[:, task_j]).exp()
    log_bt = best_bt + torch.zeros_like(best_bt).scatter_add(1, task_bj, shares_bj).log()
    return log_bt, log_bj - log_bt[:, task_j]


def padded(values_bj: Tensor, task_j: Tensor) -> Tensor:
    """Returns values of the outputs of ended tasks, with minus infinity for the others (-1 in task_j)."""
    found_bj = values_bj.new_full((len(values_bj), len(task_j)), -torch.inf)
    found_bj[:, task_j >= 0] = values_bj
    return found_bj
