"""lamina: one adapter per task, each trained alone, and predictions weighed by the posterior probability of the task.

    p(j | x) = p(t | x) p(j | t, x)                     j an output of task t

    q(j | x)      softmax over all outputs of ½ (log softmax r(f(x)) / τ + log softmax l(f(x)) / τ')
                  f: features of the backbone alone
    p(t | x)      sum of q(j | x) over the outputs j of t
    p(j | t, x)   for the most probable task: softmax over its outputs of ⅓ (log s_t + log h_t + log q(j | x) / p(t | x))
                  for the others:             q(j | x) / p(t | x)
    r, τ          least squares on random features of f, and its temperature (`calibrated` in `maths/ranpac.py`)
    l, τ'         the linear discriminant of all outputs on f, and its temperature
    s_t, h_t      softmax of the linear discriminant of t, and of the outputs of the head that were trained with its adapter,
                  both on f_t, the features through that adapter

Of a language model only the adapters and p(t | x) are used: f is the mean hidden state of the prompt, r alone makes q and has
one output for a task, and the most probable task's adapter writes the completion.

Later tasks change only r, l and their temperatures, which are fitted to sums over all tasks. So no feature drifts, and a task
loses accuracy only where its inputs are assigned to another task. Tasks may be trained side by side. Their order matters only
to what the first one fixes (the random features, the units of f), and to how many outputs there are when a task is left out.

The factors are those of Kim et al., *A Theoretical Study on Solving Continual Learning* (NeurIPS 2022, arXiv 2211.02633):
class-incremental learning needs prediction within a task and the inference of the task, and these suffice. An adapter for
every task, selected per input, is CoLoR's (`methods/color.py`). Ours: q, instead of the nearest centroid, from two classifiers
that err on different inputs; its conditional for the tasks not selected, so that the choice of a task is not final; the mean of
the three conditionals.

    here                     shape       what
    ridge/...                            r: the projection, its solution and τ; centre and scale of f in the first task
    sums/...                             of the random features of f: G (m, m), C (m, j)
    frozen/...               (j, d)      l / τ'
    statistics/...                       of f: means (j, d), scatter (d, d); cross-entropies at every τ'
    adapted/<task>/...       (c, d)      s_t

Shape letters: b batch, n examples, d width (of several blocks side by side), j outputs of the head, c outputs of a task,
t tasks, m random features.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lamina.errors import TrainingError
from lamina.learner import Learner, local_labels
from lamina.maths import classifiers, ranpac
from lamina.maths.calibration import left_out_scores
from lamina.maths.class_statistics import Statistics, concatenated, of_features
from lamina.maths.classifiers import LinearClassifier
from lamina.methods.base import Departure, Method, MethodConfig, Needs, Paper, Pass, Refusal, under
from lamina.methods.routed import adapters_of, bare_features, through_adapters
from lamina.rng import seed_of
from lamina.types import Batch, Task

SMALLEST = 1e-6
"""Least standard deviation of a feature."""
TAUS = tuple(10 ** (power / 16) for power in range(80, -17, -1))
"""The τ' that are tried, the largest first: from 100,000 to 0.1. Scores of l are log posteriors, which are overconfident: the
wider the features, the more."""
ALONE = "every adapter is trained alone, and selected per input"


class LaminaConfig(MethodConfig):
    around: ClassVar[Mapping[str, Any]] = {"backbone.targets": ["q", "k", "v", "out", "fc1", "fc2"]}
    rank: int = Field(32, ge=1)
    """Rank of the adapter of each task in every adapted layer."""
    layers: int = Field(4, ge=1)
    """How many of the last blocks give features (all if there are fewer). Of a language model it is the last one."""
    random_features: int = Field(4096, ge=1)
    """M: number of random features that, with a discriminant, infer the task. Their Gram matrix takes 4 M² bytes."""


class Lamina(Method[LaminaConfig]):
    name = "lamina"
    advice = "By default. It stores no examples; a prediction takes two passes."
    paper = Paper(
        title="A Theoretical Study on Solving Continual Learning",
        authors="Kim et al.; the method is by lamina's authors, from published parts",
        venue="NeurIPS 2022; this library, 2026",
        link="https://arxiv.org/abs/2211.02633",
        departures=(
            Departure("two classifiers on the frozen backbone infer the task: random features, a discriminant", "ours"),
            Departure("within the selected task three classifiers count equally", "ours"),
        ),
    )
    needs = Needs(
        per_task="an adapter, a few vectors per class",
        storage="One adapter of rank r per adapted layer and task. Three classifier outputs, a mean and two vectors of random "
        "features per class and task; one Gram matrix of the random features (67 MB), and their projection; one scatter matrix "
        "of the features (5 MB at width 768, 75 MB at 3,072).",
        prediction="linear",
        extra="A prediction takes two passes. After every task: one pass over its data with its adapter and one without, and "
        "four linear systems in as many unknowns as there are random features, and two eigendecompositions and two inverses of "
        "matrices as wide as the features.",
    )
    config_type = LaminaConfig
    refuses = (
        Refusal("init", ALONE),
        Refusal("merging", ALONE),
        Refusal("drift", "the statistics that infer the task are of the frozen backbone, which never drifts"),
        Refusal("classifier", "it has classifiers of its own"),
    )
    selects = True
    independent = True

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        if not learner.generates:
            learner.backbone.check_layers(self.config.layers)
        learner.add_lora(task, self.config.rank, self.name)

    def end(self, learner: Learner, task: Task, batches: Pass) -> None:
        learner.finish(task.name, fold=False)
        learner.head.freeze()
        frozen, adapted, outputs = [], [], []
        with torch.no_grad():
            for batch in batches(augmented=False):
                alone_b = torch.zeros(len(batch), dtype=torch.int64, device=learner.device)
                frozen.append(self.features(learner, batch).cpu())
                if not learner.generates:
                    adapted.append(self.through(learner, batch, [task.name], alone_b).cpu())
                outputs.append((alone_b if learner.generates else local_labels(task, batch.labels_b)).cpu())
        output_n = torch.cat(outputs)
        if not all(bool(features_bd.isfinite().all()) for features_bd in (*frozen, *adapted)):
            raise TrainingError(
                f"features of task {task.name!r} are not finite. An input is not finite, or training diverged: check the data, "
                f"and use a smaller training.lr."
            )
        if adapted:
            blocks = learner.backbone.blocks_of(self.config.layers)
            of_task = of_features(torch.cat(adapted), output_n, len(task.classes), blocks=blocks)
            self.keep(learner, f"adapted/{task.name}", discriminant(of_task, torch.cat(adapted), output_n).tensors())
        if not learner.generates:
            self.add_statistics(learner, torch.cat(frozen), output_n, self.columns(learner, task.name))
        self.add_random_features(learner, torch.cat(frozen), output_n, self.columns(learner, task.name))

    def add_statistics(self, learner: Learner, features_nd: Tensor, output_n: Tensor, outputs: int) -> None:
        """Add a task's examples to the statistics of all, and find l and τ'. output_n: among the task's outputs.

        Without the statistics of earlier tasks, of a model that an earlier lamina trained, there is no l from then on.
        """
        blocks, kept = learner.backbone.blocks_of(self.config.layers), self.part("statistics")
        before = self.memory["sums/cross_mj"].shape[1] if "sums/cross_mj" in self.memory else 0
        if before != (len(kept["counts_j"]) if kept else 0):
            self.memory = {k: v for k, v in self.memory.items() if not k.startswith(("statistics/", "frozen/"))}
            return
        statistics, losses_t = of_features(features_nd, output_n, outputs, blocks=blocks), None
        if kept:
            old = Statistics.of_tensors({name: part.cpu() for name, part in kept.items()}, blocks)
            statistics, losses_t = concatenated(old, statistics), kept["losses_t"].cpu()
        found, losses_t = discriminant_of_all(statistics, features_nd, output_n + before, losses_t)
        self.keep(learner, "statistics", statistics.tensors() | {"losses_t": losses_t})
        if int(statistics.counts_j.max()) > 1:  # else nothing says how far examples of one output lie apart
            self.keep(learner, "frozen", found.tensors())

    def add_random_features(self, learner: Learner, features_nd: Tensor, output_n: Tensor, outputs: int) -> None:
        """Add the random features of a task's examples to the sums, and solve for r. output_n: among the task's outputs."""
        kept = {key: value.cpu() for key, value in self.part("ridge").items()}
        if not kept:
            generator = torch.Generator().manual_seed(seed_of("projection", torch.initial_seed()))
            width = self.config.random_features
            kept = {
                "projection_md": ranpac.projection(width, features_nd.shape[1], generator),
                "centre_d": features_nd.mean(0),
                "scale_d": features_nd.std(0, correction=0).clamp_min(SMALLEST),
            }
        projection_md, scaled_nd = kept["projection_md"], (features_nd - kept["centre_d"]) / kept["scale_d"]
        sums = self.part("sums")
        old = (
            ranpac.Sums(sums["gram_mm"].cpu(), sums["cross_mj"].cpu()) if sums else ranpac.Sums.zero(len(projection_md))
        )
        found = old.plus(projection_md, scaled_nd, output_n, outputs)
        losses_rt = sums["losses_rt"].cpu() if sums else None
        solved = ranpac.calibrated(found, projection_md, scaled_nd, output_n + old.cross_mj.shape[1], losses_rt)
        self.keep(learner, "sums", found._asdict() | {"losses_rt": solved.losses_rt})
        tau = torch.tensor(solved.temperature, dtype=torch.float64)
        self.keep(learner, "ridge", kept | {"weight_mj": solved.weight_mj, "temperature": tau})

    def features(self, learner: Learner, batch: Batch) -> Tensor:
        """Returns the features (b, d) of the backbone alone."""
        return bare_features(learner, batch, 1 if learner.generates else self.config.layers)

    def predict(self, learner: Learner, batch: Batch) -> Tensor:
        log_bt, within_bj = self.routed(learner, batch)
        within_bj = self.refined(learner, batch, log_bt.argmax(1), within_bj)
        return (padded(log_bt[:, self.task_of_outputs(learner)], learner) + within_bj).float()

    def predict_task_aware(self, learner: Learner, batch: Batch, task: str) -> Tensor:
        tasks = self.learnt(learner)
        if task not in tasks:
            return self.predict(learner, batch)
        chosen_b = torch.full_like(batch.labels_b, tasks.index(task))
        return self.refined(learner, batch, chosen_b, self.routed(learner, batch)[1]).float()

    @contextmanager
    def predicting(self, learner: Learner, batch: Batch, task: str | None = None) -> Iterator[None]:
        tasks = self.learnt(learner)
        if not tasks:
            with learner.bare():
                yield
            return
        if task in tasks:
            chosen_b = torch.full((len(batch),), tasks.index(task), device=learner.device)
        else:
            chosen_b = self.scores(learner, batch).argmax(1)  # r has one output for a task
        with adapters_of(learner, tasks, chosen_b):
            yield

    def routed(self, learner: Learner, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns log p(t | x), (b, t), and log q(j | x) / p(t | x), (b, j), of the backbone alone; float64."""
        scores_bj, task_j = self.scores(learner, batch), self.task_of_outputs(learner)
        log_bt, within_bj = factors(scores_bj, task_j, len(self.learnt(learner)))
        return log_bt, padded(within_bj, learner)

    def scores(self, learner: Learner, batch: Batch) -> Tensor:
        """Returns log q up to a constant per example, float64, (b, outputs of the tasks that have ended)."""
        ridge, features_bd = self.part("ridge"), self.features(learner, batch)
        phi_bm = ranpac.random_features((features_bd - ridge["centre_d"]) / ridge["scale_d"], ridge["projection_md"])
        log_bj = (phi_bm.double() @ ridge["weight_mj"] / ridge["temperature"]).log_softmax(1)
        if "frozen/weight_jd" in self.memory:
            log_bj = (log_bj + self.classifier("frozen").scores(features_bd).log_softmax(1)) / 2
        return log_bj

    def refined(self, learner: Learner, batch: Batch, chosen_b: Tensor, within_bj: Tensor) -> Tensor:
        """Returns log p(j | t, x), (b, j) float64, for the chosen task by its adapter. within_bj: of the backbone alone."""
        tasks = self.learnt(learner)
        features_bd = self.through(learner, batch, tasks, chosen_b)
        task_j = self.task_of_outputs(learner)
        own_bj = F.pad(task_j == chosen_b[:, None], (0, len(learner.outputs) - len(task_j)))
        lda_bj = torch.cat([self.classifier(f"adapted/{task}").scores(features_bd) for task in tasks], 1)
        head_bj = learner.head(features_bd[:, -learner.backbone.width :]).double()
        three = (padded(lda_bj, learner), head_bj, within_bj)
        logs = [scores_bj.masked_fill(~own_bj, -torch.inf).log_softmax(1) for scores_bj in three]
        return torch.where(own_bj, torch.stack(logs).mean(0).log_softmax(1), within_bj)

    # -- parts ----------------------------------------------------------------------------------------------------------

    def through(self, learner: Learner, batch: Batch, tasks: Sequence[str], chosen_b: Tensor) -> Tensor:
        return through_adapters(learner, batch, tasks, chosen_b, self.config.layers)

    def learnt(self, learner: Learner) -> list[str]:
        """Returns the tasks that have ended, in their order."""
        known = self.memory["sums/cross_mj"].shape[1] if "sums/cross_mj" in self.memory else 0
        ends = accumulate(self.columns(learner, task) for task in learner.head.tasks)
        return [task for task, end in zip(learner.head.tasks, ends, strict=True) if end <= known]

    def columns(self, learner: Learner, task: str) -> int:
        """Returns how many outputs r has for a task: one for each of its classes; one for a task of a language model."""
        return 1 if learner.generates else learner.head.block(task).out_features

    def task_of_outputs(self, learner: Learner) -> Tensor:
        """Returns the position of its task for every output of the tasks that have ended. They are the first outputs."""
        tasks = enumerate(self.learnt(learner))
        return torch.tensor([t for t, task in tasks for _ in range(self.columns(learner, task))], device=learner.device)

    def part(self, name: str) -> dict[str, Tensor]:
        """Returns what is kept under a name."""
        return under(self.memory, name)

    def keep(self, learner: Learner, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.memory |= {f"{name}/{key}": value.to(learner.device) for key, value in tensors.items()}

    def classifier(self, name: str) -> LinearClassifier:
        return LinearClassifier(self.memory[f"{name}/weight_jd"], self.memory[f"{name}/bias_j"])

    def memory_bound(self, learner: Learner) -> int:
        m, calibration = self.config.random_features, 8 * (1 + len(ranpac.RATIOS) * len(ranpac.TAUS))
        if learner.generates:
            outputs, width, discriminants = len(learner.head.tasks), learner.backbone.width, 0
        else:
            outputs = len(learner.outputs)
            width = learner.backbone.blocks_of(self.config.layers) * learner.backbone.width
            discriminants = 8 * outputs * (3 * width + 3) + 8 * width**2 + 8 * len(TAUS)
        return 4 * m**2 + 16 * m * outputs + 4 * (m + 2) * width + calibration + discriminants


def discriminant(statistics: Statistics, features_nd: Tensor, output_n: Tensor) -> LinearClassifier:
    """Returns the linear discriminant of a task, divided by the temperature of its scores of examples that are left out. Where
    no output has two examples, all scores are zero: nothing says how far examples of one output lie apart."""
    found = classifiers.lda(statistics)
    left_nj, output_n, smoothing = left_out(statistics, features_nd, output_n)
    if not len(left_nj):
        return LinearClassifier(torch.zeros_like(found.weight_jd), torch.zeros_like(found.bias_j))
    tau = classifiers.temperature(left_nj, output_n, smoothing=smoothing)
    return LinearClassifier(found.weight_jd / tau, found.bias_j / tau)


def discriminant_of_all(
    statistics: Statistics, features_nd: Tensor, output_n: Tensor, losses_t: Tensor | None = None
) -> tuple[LinearClassifier, Tensor]:
    """Returns the linear discriminant of all outputs, divided by the τ' with the smallest cross-entropy over all tasks, whose
    examples are left out when their task is the newest; and these cross-entropies at every τ' of `TAUS`, float64.

    features_nd, output_n: of the newest examples, which are in the statistics; their positions among all outputs. losses_t: of
    the tasks before, if there are any. Of a task, no τ' counts as worse than a guess: with examples that are nearly the same,
    cross-entropies of wrong scores would otherwise outweigh all other tasks.
    """
    found = classifiers.lda(statistics)
    losses_t = torch.zeros(len(TAUS), dtype=torch.float64) if losses_t is None else losses_t.clone()
    left_nj, output_n, smoothing = left_out(statistics, features_nd, output_n)
    guess = len(left_nj) * math.log(len(statistics.counts_j))
    for t, tau in enumerate(TAUS if len(left_nj) else ()):
        loss = F.cross_entropy(left_nj / tau, output_n, reduction="sum", label_smoothing=smoothing)
        losses_t[t] += loss.clamp_max(guess)
    tau = TAUS[int(losses_t.argmin())]
    return LinearClassifier(found.weight_jd / tau, found.bias_j / tau), losses_t


def left_out(statistics: Statistics, features_nd: Tensor, output_n: Tensor) -> tuple[Tensor, Tensor, float]:
    """Returns scores (n, j) of at most `LEFT_OUT` evenly spaced examples, each left out of the statistics; their outputs; and
    the share of every target that is spread over all outputs. Examples alone in their output are not among them."""
    taken_n = (statistics.counts_j[output_n] > 1).nonzero()[:, 0]
    taken_n = taken_n[torch.linspace(0, len(taken_n) - 1, min(ranpac.LEFT_OUT, len(taken_n))).long()]
    if not len(taken_n):
        return torch.zeros(0, len(statistics.counts_j), dtype=torch.float64), taken_n, 1.0
    left_nj = left_out_scores(statistics, features_nd[taken_n], output_n[taken_n])
    return left_nj, output_n[taken_n], 1 / (len(taken_n) + 1)


def factors(scores_bj: Tensor, task_j: Tensor, tasks: int) -> tuple[Tensor, Tensor]:
    """Returns log p(t | x), (b, t), and log p(j | t, x), (b, j), of scores whose softmax is p(j | x). task_j: the task of every
    output."""
    log_bj, task_bj = scores_bj.log_softmax(1), task_j.expand_as(scores_bj)
    best_bt = log_bj.new_full((log_bj.shape[0], tasks), -torch.inf).scatter_reduce(1, task_bj, log_bj, "amax")
    shares_bj = (log_bj - best_bt[:, task_j]).exp()
    log_bt = best_bt + torch.zeros_like(best_bt).scatter_add(1, task_bj, shares_bj).log()
    return log_bt, log_bj - log_bt[:, task_j]


def padded(values_bj: Tensor, learner: Learner) -> Tensor:
    """Returns values of the outputs of ended tasks, and minus infinity for those of others, which come after them."""
    return F.pad(values_bj, (0, len(learner.outputs) - values_bj.shape[1]), value=-torch.inf)
