"""What happens around any method when a task begins and ends: where its training starts, and which weights, statistics and
classifier are deployed afterwards. The mathematics is in `consolidate/`; this file only says what is done to what, and when.

    begin of task t   features of its examples under the deployed weights M_{t-1} are noted, for the shift
                      training starts from w_{t-1} (chain), from W_0 (fresh), or from M_{t-1} itself (merged)
    end of task t     w_t, what the method has made, goes into the deployed weights M_t            (average)
                      statistics of older rows are moved into the feature space of M_t             (shift)
                      statistics of the new rows are taken under M_t, and all rows refitted        (tail)

M_t - w_t lies in every adapted map as a finished branch of its own, so whatever saves, folds or counts branches knows it.
Everything else is in `memory`, which the processor holds wherever the learner is. No step uses the number of tasks, and
none sees an example of another task or split.

Shape letters: n examples, d width of the features (of several blocks side by side, if asked for), j rows of the head,
o outputs, i inputs of a map.
"""

import hashlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina import linalg
from lamina.adapters import LowRank
from lamina.chance import seed_of
from lamina.config import ConsolidationConfig
from lamina.consolidate import average, shift, tail
from lamina.consolidate.statistics import Shrinkage, Statistics, joined, of_features
from lamina.errors import MethodError
from lamina.learner import Learner, Slot
from lamina.methods.base import Method, Pass, row_labels
from lamina.types import Batch, Task

AVERAGE = "average"
"""Name of the branch that takes the weights from w_t to M_t."""
Memo = dict[str, tuple[Tensor, float]]
"""Features by what they are made of, and the seconds that took: for several consolidations of one chain."""


class Consolidation:
    """Around one method. Raises MethodError where the method cannot be combined with what is asked for."""

    def __init__(
        self,
        config: ConsolidationConfig,
        method: Method[Any],
        past: Callable[[], Iterable[tuple[Task, Pass]]] | None = None,
    ) -> None:
        """past: the tasks before the current one, for the diagnosis drift = oracle; a learner has none."""
        self.config, self.method, self.past = config, method, past
        self.memory: dict[str, Tensor] = {}
        self.memo: Memo | None = None
        self.spared = 0.0
        """Seconds that features found in the memo had taken to make: work that is this one's all the same."""
        for part, why in method.refuses:
            value, default = getattr(config, part), type(config).model_fields[part].default
            if value != default:
                raise MethodError(
                    f"consolidation.{part} = {value!r} does not go with method {method.name!r}: {why}. Leave it at {default!r}."
                )

        if config.layers > 1 and type(method).features is not Method.features:
            raise MethodError(
                f"consolidation.layers = {config.layers} does not go with method {method.name!r}, which makes features its own "
                "way, of the last block. Leave it at 1."
            )
        if config.drift == "oracle" and past is None:
            raise MethodError(
                "consolidation.drift = 'oracle' measures old classes on old examples, which are gone: it is a diagnosis, for "
                "replays of a kept chain (`lamina.run.replay`) only. Choose none, linear or linear+local."
            )

    @property
    def memory_bytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.memory.values())

    def check(self, learner: Learner) -> None:
        """Raises BackboneError where the backbone does not have what is asked for."""
        learner.backbone.check_layers(self.config.layers)

    # -- around a task ----------------------------------------------------------------------------------------------

    def begin(self, learner: Learner, batches: Pass) -> None:
        """Before the method's own `begin`."""
        if not learner.head.tasks:
            return
        if self.config.drift not in ("none", "oracle"):
            self.memory["before"] = self.features_of(learner, batches)[0]
        if self.config.merge != "none":
            self.memory |= {f"deployed/{name}": change_of(slot).float().cpu() for name, slot in learner.slots.items()}
            if self.config.init != "merged":
                learner.drop(AVERAGE)
        if self.config.init == "fresh":
            for slot in learner.slots.values():
                for name in (*slot.live(), *slot.finished()):
                    slot.drop(name)

    def end(self, learner: Learner, task: Task, batches: Pass) -> None:
        """After the method's own `end`."""
        if self.config.merge != "none":
            self.average(learner, batches, len(learner.head.tasks) - 1)
        if self.config.head != "local":
            features_nd, labels_n = self.features_of(learner, batches)
            self.refit(learner, features_nd, row_labels(task, labels_n), self.memory.pop("before", None))

    def average(self, learner: Learner, batches: Pass, old_tasks: int) -> None:
        """Put M_t to work in every slot, where w_t is."""
        config = self.config
        weight = average.share(old_tasks, *((1.0, 0.0) if config.merge == "mean" else (config.gamma, config.floor)))
        moments = learner.input_moments(batches(augmented=False), summed=True) if config.merge == "weighted" else {}
        for slot in learner.slots.values():
            trained_oi = change_of(slot)
            deployed_oi, already_oi = trained_oi, torch.zeros_like(trained_oi)
            if old_tasks:
                before_oi = self.memory.pop(f"deployed/{slot.name}").to(learner.device)
                if config.merge == "weighted":
                    old_ii = self.memory[f"inputs/{slot.group}"].to(learner.device)
                    deployed_oi = average.weighted(before_oi, trained_oi, old_ii, moments[slot.group], config.gamma)
                else:
                    deployed_oi = average.exponential(before_oi, trained_oi, weight)
            if AVERAGE in slot.finished():  # training started from the average, which is a part of w_t
                found = slot.finished()[AVERAGE]
                already_oi = found.up_or.double() @ found.down_ri.double()
                slot.drop(AVERAGE)
            up_or, down_ri = linalg.factors_of(deployed_oi - trained_oi + already_oi)
            slot.add(AVERAGE, LowRank(trained={}, frozen={"up": up_or, "down": down_ri}))
        learner.finish(AVERAGE)
        for group, moment_ii in moments.items():
            self.memory[f"inputs/{group}"] = moment_ii.cpu() + self.memory.get(f"inputs/{group}", 0)

    def refit(self, learner: Learner, features_nd: Tensor, row_n: Tensor, before_nd: Tensor | None) -> None:
        """Move what is kept of older rows, add the new task's rows, and make one classifier of all. features_nd: of the new
        examples under M_t; row_n: positions of their rows among the task's own; before_nd: the features under M_{t-1}."""
        config, kept = self.config, parts(self.memory, "statistics")
        statistics = of_features(features_nd, row_n, int(row_n.max()) + 1, config.own_rank)
        if kept:
            old = Statistics.of_tensors(kept)
            if config.drift == "oracle":
                old = self.anew(learner)
            elif before_nd is not None and config.drift != "none":
                old, _ = shift.shifted(old, before_nd, features_nd, config.drift, self.generator("shift"))
            row_n = row_n + len(old.counts_j)
            statistics = joined(old, statistics)
        head = self.fitted(statistics, (features_nd, row_n))
        self.memory = {k: v for k, v in self.memory.items() if not k.startswith(("statistics/", "head/"))}
        self.memory |= {f"statistics/{key}": value for key, value in statistics.tensors().items()}
        self.memory |= {f"head/{key}": value for key, value in head.tensors().items()}

    def anew(self, learner: Learner) -> Statistics:
        """Statistics of all rows before the task's own, under M_t, on the examples they were made of."""
        found: Statistics | None = None
        for task, batches in self.past() if self.past else ():
            features_nd, labels_n = self.features_of(learner, batches)
            own = of_features(features_nd, row_labels(task, labels_n), len(task.classes), self.config.own_rank)
            found = own if found is None else joined(found, own)
        assert found is not None  # there are rows, so there were tasks
        return found

    def fitted(self, statistics: Statistics, real: tuple[Tensor, Tensor]) -> tail.Head:
        config, draws = self.config, self.generator("tail")
        shrinkage: Shrinkage = "oas" if config.shrinkage is None else config.shrinkage
        if config.head == "ncm":
            return tail.ncm(statistics)
        if config.head == "aligned":
            return tail.aligned(statistics, draws, shrinkage=shrinkage)
        if config.head == "lda":
            return tail.lda(statistics, shrinkage)
        ridge = tail.ridge(statistics, draws, real, width=config.random_features, shrinkage=shrinkage)
        if config.head == "ridge":
            return ridge
        return tail.mixed(tail.lda(statistics, shrinkage), ridge, statistics, draws, shrinkage=shrinkage)

    # -- prediction -------------------------------------------------------------------------------------------------

    @property
    def routes(self) -> bool:
        """Whether being told the task does more than choose rows."""
        return self.config.head == "local" and self.method.routes

    def predict(self, learner: Learner, batch: Batch) -> Tensor:
        """Scores of all rows, (b, r) float32, of what is deployed. Rows of a task that has not ended have none yet."""
        fitted = parts(self.memory, "head")
        if not fitted:
            if self.memo is not None and self.config.layers == 1 and type(self.method).predict is Method.predict:
                own_br: Tensor = learner.head(self.features(learner, batch))
                return own_br
            return self.method.predict(learner, batch)
        scores_bj = tail.head_of(fitted).scores(self.features(learner, batch).cpu()).float()
        return F.pad(scores_bj, (0, len(learner.rows) - scores_bj.shape[1]), value=-torch.inf)

    def predict_told(self, learner: Learner, batch: Batch, task: str) -> Tensor:
        """As `predict`, if it were known that all examples are of this task."""
        return self.method.predict_told(learner, batch, task) if self.routes else self.predict(learner, batch)

    # -- parts ------------------------------------------------------------------------------------------------------

    def features_of(self, learner: Learner, batches: Pass) -> tuple[Tensor, Tensor]:
        """Features (n, d) and labels (n,) of the task's training examples as evaluation sees them, under the weights at
        work now."""
        with learner.folded():
            found = [(self.features(learner, batch).cpu(), batch.labels_b.cpu()) for batch in batches(augmented=False)]
        return torch.cat([features_bd for features_bd, _ in found]), torch.cat([labels_b for _, labels_b in found])

    def features(self, learner: Learner, batch: Batch) -> Tensor:
        """Of a batch, (b, d), under the weights at work now."""
        if self.memo is None:
            return self.made(learner, batch)
        digest = hashlib.blake2b(digest_size=16)
        for _, value in sorted(batch.inputs.items()):
            digest.update(value.cpu().contiguous().numpy().data)
        for layer in learner.layers.values():
            digest.update(layer.effective().float().cpu().contiguous().numpy().data)
        for _, value in sorted(self.method.memory.items()):  # of input-dependent gains, say
            digest.update(
                value.cpu().contiguous().view(torch.uint8).numpy().data if value.ndim else str(value.item()).encode()
            )
        digest.update(repr([self.config.layers, [[*slot.finished()] for slot in learner.slots.values()]]).encode())
        key = digest.hexdigest()
        if key in self.memo:
            self.spared += self.memo[key][1]
        else:
            started = time.perf_counter()
            self.memo[key] = self.made(learner, batch), time.perf_counter() - started
        return self.memo[key][0]

    def made(self, learner: Learner, batch: Batch) -> Tensor:
        if self.config.layers > 1:
            return learner.features(batch, self.config.layers)
        return self.method.features(learner, batch)

    def generator(self, what: str) -> torch.Generator:
        """The engine seeds every phase by seed and task."""
        return torch.Generator().manual_seed(seed_of(what, torch.initial_seed()))


def change_of(slot: Slot) -> Tensor:
    """What all branches of a slot, live or folded, add to the pre-trained weight, (o, i) float64."""
    factors = [(part.up_or, part.down_ri) for part in slot.finished().values() if part.folded]
    factors += [branch.factors() for branch in slot.live().values()]
    change_oi = torch.zeros(slot.d_out, slot.d_in, dtype=torch.float64, device=slot.device)
    with torch.no_grad():
        for up_or, down_ri in factors:
            change_oi += up_or.double() @ down_ri.double()
    return change_oi


def parts(memory: dict[str, Tensor], of: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{of}/"): value for key, value in memory.items() if key.startswith(f"{of}/")}
