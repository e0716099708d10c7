"""Consolidation: what happens around any method when a task begins and ends. It decides where training starts, and which
weights, statistics and classifier are deployed afterwards. The mathematics is in `lamina.maths`.

    begin of task t   features of its examples under the deployed weights M_{t-1} are stored     (for drift compensation)
                      training starts from w_{t-1} (chain), from W_0 (fresh), or from M_{t-1} itself (merged)
    end of task t     w_t, the result of the method, is merged into the deployed weights M_t     (weight merging)
                      statistics of older outputs are moved into the feature space of M_t        (drift compensation)
                      statistics of the new outputs are added, and all outputs refitted          (unified classifier)

In every adapted layer M_t - w_t is a finished branch, so whatever saves, folds or counts branches includes it. Everything else
is in `memory`, on the CPU. No step uses the number of tasks, and none sees an example of another task or split.

Shape letters: n examples, d width of the features (of several blocks side by side if asked for), j outputs of the head,
o outputs, i inputs of a linear layer.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.adapters import LowRank
from lamina.config import ConsolidationConfig
from lamina.data.variants import Pool, variants_of
from lamina.errors import MethodError, TrainingError
from lamina.learner import AdapterSite, Learner, local_labels
from lamina.maths import classifiers, drift, linalg, merging, ranpac
from lamina.maths.class_statistics import Statistics, concatenated, of_features
from lamina.methods.base import Method, Pass, under
from lamina.rng import seed_of
from lamina.types import Batch, Task

MERGED = "merging"
"""Name of the branch that leads from w_t to M_t."""


class Consolidation:
    """Consolidation around one method. Raises MethodError where the method cannot be combined with the settings."""

    remeasures: ClassVar[bool] = False
    """Whether old examples are at hand; only in experiments."""

    def __init__(self, config: ConsolidationConfig, method: Method[Any]) -> None:
        self.config, self.method = config, method
        method.classifies = config.classifier == "own"
        self.memory: dict[str, Tensor] = {}
        if config.drift == "remeasured" and not self.remeasures:
            raise MethodError(
                "consolidation.drift = 'remeasured' measures old classes on old examples, which are gone: it is a diagnosis of "
                "benchmarks/drift.py only. Choose none, linear or linear+local."
            )
        for part, why in method.refuses:
            value, default = getattr(config, part), type(config).model_fields[part].default
            if value != default:
                raise MethodError(
                    f"consolidation.{part} = {value!r} does not go with method {method.name!r}: {why}. Leave it at {default!r}."
                )
        if config.layers > 1 and type(method).features is not Method.features:
            raise MethodError(
                f"consolidation.layers = {config.layers} does not go with method {method.name!r}, whose features are its own "
                "and of the last block. Leave it at 1."
            )

    @property
    def memory_bytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.memory.values())

    def check(self, learner: Learner) -> None:
        """Raises BackboneError where the backbone has no features of several blocks, and they are asked for; MethodError for a
        unified classifier on a language model."""
        if learner.generates and self.config.classifier != "own":
            raise MethodError(
                f"consolidation.classifier = {self.config.classifier!r} does not go with a language model: its predictions are "
                f"tokens, not classes. Leave it at 'own'."
            )
        learner.backbone.check_layers(self.config.layers)

    # -- around a task --------------------------------------------------------------------------------------------------

    def begin(self, learner: Learner, batches: Pass) -> None:
        """Before the method's own `begin`."""
        if not learner.head.tasks:
            return
        if self.config.drift not in ("none", "remeasured"):
            *_, self.memory["before"] = self.shown(learner, batches, len(learner.head.tasks), True)
        if self.config.merging != "none":
            self.memory |= {f"deployed/{name}": update_of(site).float().cpu() for name, site in learner.sites.items()}
            if self.config.init != "merged":
                learner.drop(MERGED)
        if self.config.init == "fresh":
            for site in learner.sites.values():
                for name in (*site.live(), *site.finished()):
                    site.drop(name)

    def end(self, learner: Learner, task: Task, batches: Pass) -> None:
        """After the method's own `end`."""
        if self.config.merging != "none":
            self.merge(learner, batches, len(learner.head.tasks) - 1)
        if self.config.classifier != "own":
            before_nd = self.memory.pop("before", None)
            features_nd, labels_n, after_nd = self.shown(
                learner, batches, len(learner.head.tasks) - 1, before_nd is not None
            )
            output_n = local_labels(task, labels_n)
            self.refit(learner, features_nd, output_n, len(task.classes), before_nd, after_nd)

    def merge(self, learner: Learner, batches: Pass, old_tasks: int) -> None:
        """Deploy M_t in every site, in place of w_t."""
        kind = self.config.merging
        weight = merging.share(old_tasks, 1.0, 0.0) if kind == "mean" else merging.share(old_tasks)
        moments = learner.input_moments(batches(augmented=False), summed=True) if kind == "weighted" else {}
        for site in learner.sites.values():
            trained_oi = update_of(site)
            deployed_oi, already_oi = trained_oi, torch.zeros_like(trained_oi)
            if old_tasks:
                before_oi = self.memory.pop(f"deployed/{site.name}").to(learner.device)
                if kind == "weighted":
                    old_ii = self.memory[f"inputs/{site.group}"].to(learner.device)
                    deployed_oi = merging.weighted(
                        before_oi, trained_oi, old_ii, moments[site.group], merging.NEW_WEIGHT
                    )
                else:
                    deployed_oi = merging.exponential(before_oi, trained_oi, weight)
            if MERGED in site.finished():  # training started from the merged weights, which are a part of w_t
                found = site.finished()[MERGED]
                already_oi = found.up_or.double() @ found.down_ri.double()
                site.drop(MERGED)
            up_or, down_ri = linalg.factors_of(deployed_oi - trained_oi + already_oi)
            site.add(MERGED, LowRank(trained={}, frozen={"up": up_or, "down": down_ri}))
        learner.finish(MERGED)
        for group, moment_ii in moments.items():
            self.memory[f"inputs/{group}"] = moment_ii.cpu() + self.memory.get(f"inputs/{group}", 0)

    def refit(
        self,
        learner: Learner,
        features_nd: Tensor,
        output_n: Tensor,
        outputs: int,
        before_nd: Tensor | None,
        after_nd: Tensor,
    ) -> None:
        """Move the statistics of older outputs, add those of the new task's, and fit one classifier of all.

        features_nd: (n, d), of the new examples under M_t. output_n: positions of their outputs among the task's own.
        outputs: number of these. before_nd, after_nd: features under M_{t-1} and M_t of the inputs that show the drift.
        """
        rank, blocks = self.config.class_covariance_rank, learner.backbone.blocks_of(self.config.layers)
        statistics = of_features(features_nd, output_n, outputs, rank, blocks)
        new = (features_nd, output_n)
        old = self.statistics(learner)
        if old is not None:
            old = self.compensated(learner, old, before_nd, after_nd)
            output_n = output_n + len(old.counts_j)
            statistics = concatenated(old, statistics)
        classifier: classifiers.Classifier
        if self.config.classifier == "gram":
            classifier = self.summed(*new, outputs, [output.label for output in learner.outputs])
        else:
            classifier = self.fitted(statistics, (features_nd, output_n))
        self.memory = {k: v for k, v in self.memory.items() if not k.startswith(("statistics/", "classifier/"))}
        self.memory |= {f"statistics/{key}": value for key, value in statistics.tensors().items()}
        self.memory |= {f"classifier/{key}": value for key, value in classifier.tensors().items()}

    def compensated(self, learner: Learner, old: Statistics, before_nd: Tensor | None, after_nd: Tensor) -> Statistics:
        """Returns the older outputs' statistics under M_t. before_nd, after_nd: features under M_{t-1} and M_t of the inputs
        that show the drift."""
        kind = self.config.drift
        if before_nd is None or kind == "none" or kind == "remeasured":
            return old
        return drift.compensated(old, before_nd, after_nd, kind, self.generator("shift"))[0]

    def fitted(self, statistics: Statistics, real: tuple[Tensor, Tensor]) -> classifiers.Classifier:
        """Returns the classifier of all outputs. real: features and outputs of the examples at hand."""
        kind, draws = self.config.classifier, self.generator("tail")
        if kind == "ncm":
            return classifiers.ncm(statistics)
        if kind == "aligned":
            return classifiers.aligned(statistics, draws)
        if kind == "lda":
            return classifiers.lda(statistics)
        ridge = classifiers.ridge(statistics, draws, real, width=self.config.random_features)
        if kind == "ridge":
            return ridge
        return classifiers.mixed(classifiers.lda(statistics), ridge, statistics, draws)

    def summed(
        self, features_nd: Tensor, output_n: Tensor, outputs: int, labels: Sequence[int]
    ) -> classifiers.RidgeClassifier:
        """Add the random features of new examples to the sums of all, and return the classifier of these sums.

        features_nd, output_n, outputs: as in `refit`. labels: the class of every output, older ones included.
        """
        projection_md = self.memory.get("classifier/projection_md")
        if projection_md is None:
            width = self.config.random_features
            projection_md = ranpac.projection(width, features_nd.shape[1], self.generator("projection"))
        kept = under(self.memory, "sums")
        sums = ranpac.Sums(**kept) if kept else ranpac.Sums.zero(len(projection_md))
        sums = sums.plus(projection_md, features_nd, output_n, outputs)
        self.memory |= {f"sums/{name}": part for name, part in sums._asdict().items()}
        weight_mj = ranpac.solved(
            sums, ranpac.selected(projection_md, features_nd, output_n, outputs), torch.tensor(labels)
        )
        return classifiers.RidgeClassifier(projection_md, torch.zeros(len(projection_md)).double(), weight_mj)

    # -- prediction -----------------------------------------------------------------------------------------------------

    @property
    def uses_task(self) -> bool:
        """Whether the task's identity does more than select outputs."""
        return self.config.classifier == "own" and self.method.uses_task

    def predict(self, learner: Learner, batch: Batch) -> Tensor:
        """Returns the scores of all outputs, (b, j) float32, of what is deployed; minus infinity for outputs of a task that
        has not ended."""
        if not under(self.memory, "classifier"):
            return self.method.predict(learner, batch)
        return self.scores(learner, self.features(learner, batch).cpu())

    def scores(self, learner: Learner, features_bd: Tensor) -> Tensor:
        """Returns the scores (b, j), as `predict` does, of features on the CPU. For a unified classifier that is fitted."""
        scores_bj = classifiers.classifier_of(under(self.memory, "classifier")).scores(features_bd).float()
        return F.pad(scores_bj, (0, len(learner.outputs) - scores_bj.shape[1]), value=-torch.inf)

    def predict_task_aware(self, learner: Learner, batch: Batch, task: str) -> Tensor:
        """As `predict`, given that all examples are of this task."""
        return self.method.predict_task_aware(learner, batch, task) if self.uses_task else self.predict(learner, batch)

    @property
    def selects(self) -> bool:
        """Whether `predicting` depends on the task, if it is given."""
        return self.method.selects

    def predicting(self, learner: Learner, batch: Batch, task: str | None = None) -> AbstractContextManager[None]:
        """As that of the method."""
        return self.method.predicting(learner, batch, task)

    # -- parts ----------------------------------------------------------------------------------------------------------

    def features_of(self, learner: Learner, batches: Pass, examples: Pool | None = None) -> tuple[Tensor, Tensor]:
        """Returns features (n, d) and labels (n,) of the task's training examples under the current weights, with the
        transform of evaluation, and notes some of the `examples`. Raises TrainingError where a feature is not finite."""
        found = []
        with learner.folded():
            for batch in batches(augmented=False):
                found.append((self.features(learner, batch).cpu(), batch.labels_b.cpu()))
                if examples is not None:
                    examples.add(batch)
        features_nd = torch.cat([features_bd for features_bd, _ in found])
        if not torch.isfinite(features_nd).all():
            number = int((~torch.isfinite(features_nd).all(1)).nonzero()[0])
            raise TrainingError(
                f"the features of training example {number + 1} of {len(features_nd)} are not finite. Its input is not finite, "
                f"or training diverged: check the data, and use a smaller training.lr."
            )
        return features_nd, torch.cat([labels_b for _, labels_b in found])

    def shown(self, learner: Learner, batches: Pass, old_tasks: int, variants: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Returns features and labels as `features_of`, and these features with, below them, those of variants of the examples
        if asked for: the same variants before and after a task."""
        count = self.config.drift_variants if variants else 0
        examples = Pool() if count else None
        features_nd, labels_n = self.features_of(learner, batches, examples)
        if examples is None:
            return features_nd, labels_n, features_nd
        made = variants_of(examples.found, count, torch.Generator().manual_seed(seed_of("variants", old_tasks)))
        with learner.folded():
            below = [self.features(learner, batch.to(learner.device)).cpu() for batch in made]
        return features_nd, labels_n, torch.cat([features_nd, *below])

    def statistics(self, learner: Learner) -> Statistics | None:
        """Returns the statistics of all outputs; None before the first task has ended."""
        kept = under(self.memory, "statistics")
        return Statistics.of_tensors(kept, learner.backbone.blocks_of(self.config.layers)) if kept else None

    def features(self, learner: Learner, batch: Batch) -> Tensor:
        """Returns the features of a batch, (b, d), under the current weights."""
        if self.config.layers > 1:
            return learner.features(batch, self.config.layers)
        return self.method.features(learner, batch)

    def generator(self, what: str) -> torch.Generator:
        """Returns a generator for one purpose. The engine seeds every phase by seed and task."""
        return torch.Generator().manual_seed(seed_of(what, torch.initial_seed()))


def update_of(site: AdapterSite) -> Tensor:
    """Returns what all branches of a site, live or folded, add to the pre-trained weight, (o, i) float64."""
    factors = [(part.up_or, part.down_ri) for part in site.finished().values() if part.folded]
    factors += [branch.factors() for branch in site.live().values()]
    update_oi = torch.zeros(site.d_out, site.d_in, dtype=torch.float64, device=site.device)
    with torch.no_grad():
        for up_or, down_ri in factors:
            update_oi += up_or.double() @ down_ri.double()
    return update_oi
