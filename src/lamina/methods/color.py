"""CoLoR: continual learning with low rank adaptation (Wistuba et al., DistShift workshop at NeurIPS 2023, arXiv 2311.17601).

    adapter t: up_t down_t in every adapted layer, and outputs of the head, trained on task t alone on the frozen backbone
    C_t = k-means centroids of f(x)/|f(x)| over the training data of task t        f: features of the backbone alone
    t̂(x) = the task of the centroid nearest to f(x)/|f(x)|
    score(x) = outputs of task t̂ on the features through adapter t̂; minus infinity for all other outputs

A routed adapter is never changed and never folded, so task-aware predictions of a task keep the same bits for ever. An
input takes two passes: one to infer its task, one through that task's adapter. CoLoR++ takes f through the first task's
adapter; an input assigned to the first task then needs no second pass.

    paper        here                                                              shape
    A_t, B_t     down_ri, up_or of the branch of the task, a routed adapter        (r, i), (o, r)
    centroids    in memory as `centroids/<task>`                                   (k, d)
    k            clusters
    CoLoR++      identify = "first expert"

Only the abstract and the start of the paper could be read. The inference of the task is that of S-Prompts (Wang et al.,
NeurIPS 2022) as released; see the departures and docs/papers/color.md for what is inferred.

Shape letters: b batch, n examples, d width, k centroids, r rank, j outputs of the head, o outputs, i inputs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lamina.learner import Learner
from lamina.maths.linalg import kmeans
from lamina.methods.base import Departure, Method, MethodConfig, Needs, Paper, Pass, Refusal
from lamina.methods.routed import adapters_of, bare_features, through_adapters
from lamina.rng import seed_of
from lamina.types import Batch, Task

Distance = Literal["l1", "l2"]


class CoLoRConfig(MethodConfig):
    rank: int = Field(10, ge=1)
    """Rank of the adapter of each task in every adapted layer."""
    clusters: int = Field(5, ge=1)
    """k: centroids stored per task. Domains need few; tasks that split the classes of one dataset need more."""
    distance: Distance = "l2"
    """Euclidean distance (as in Renate) or sum of absolute differences (as in S-Prompts)."""
    identify: Literal["pretrained", "first expert"] = "pretrained"
    """Features that the task is inferred from: of the backbone alone (CoLoR), or through the first task's adapter (CoLoR++)."""


class CoLoR(Method[CoLoRConfig]):
    name = "color"
    advice = "For domains that look different: an adapter for each, selected per input."
    paper = Paper(
        title="Continual Learning with Low Rank Adaptation",
        authors="Wistuba et al.",
        venue="DistShift workshop at NeurIPS 2023",
        link="https://arxiv.org/abs/2311.17601",
        departures=(
            Departure(
                "rank, clusters per task and optimiser are unknown; here rank 10 and 5 clusters (S-Prompts)",
                "ours",
                "rank, clusters",
            ),
            Departure(
                "the distance to centroids is Renate's; S-Prompts' code sums absolute differences", "ours", "distance"
            ),
            Departure("CoLoR++ is reconstructed from recollection", "ours", "identify"),
            Departure(
                "every task has its own outputs of the head; Renate shares one head by default, which drifts",
                "ours",
                of_classifiers=True,
            ),
            Departure(
                "centroids are taken after training; Renate takes them before (the same, except for CoLoR++)", "ours"
            ),
        ),
    )
    needs = Needs(
        per_task="an adapter",
        storage="One adapter of rank r per adapted layer and task, and `clusters` centroids per task.",
        prediction="linear",
        extra="A prediction takes two passes and computes the distances to `clusters` centroids per task. A batch gathers one "
        "adapter per task that occurs in it.",
    )
    config_type = CoLoRConfig
    refuses = (
        Refusal("init", "every adapter starts from the pre-trained weights"),
        Refusal("merging", "adapters are selected per input, so there is no single weight to merge"),
    )
    selects = True
    independent = True  # CoLoR++ too: it uses the first task's adapter when a task ends, not while it trains

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        learner.add_lora(task, self.config.rank, "color")

    def end(self, learner: Learner, task: Task, batches: Pass) -> None:
        learner.finish(task.name, fold=False)
        learner.head.freeze()
        with torch.no_grad():
            directions_nd = torch.cat([self.directions(learner, batch)[1] for batch in batches(augmented=False)])
        generator = torch.Generator().manual_seed(seed_of("centroids", torch.initial_seed()))
        self.memory[f"centroids/{task.name}"] = kmeans(directions_nd, self.config.clusters, generator).float()

    def features(self, learner: Learner, batch: Batch) -> Tensor:
        return self.routed(learner, batch)[0]

    def predict(self, learner: Learner, batch: Batch) -> Tensor:
        features_bd, chosen_b = self.routed(learner, batch)
        return own_outputs(learner, features_bd, self.learnt(learner), chosen_b)

    def routed(self, learner: Learner, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns features (b, d), each input through the adapter of its inferred task, and that task's position (b,)."""
        tasks = self.learnt(learner)
        features_bd, directions_bd = self.directions(learner, batch)
        chosen_b = nearest_task(directions_bd, [self.memory[f"centroids/{t}"] for t in tasks], self.config.distance)
        again_b = chosen_b >= (1 if self.config.identify == "first expert" else 0)
        if again_b.any():
            part = batch if again_b.all() else batch.select(again_b)  # a whole batch has a memo, a part of it has none
            features_bd[again_b] = through_adapters(learner, part, tasks, chosen_b[again_b])
        return features_bd, chosen_b

    def predict_task_aware(self, learner: Learner, batch: Batch, task: str) -> Tensor:
        chosen_b = torch.zeros(len(batch), dtype=torch.int64, device=learner.device)
        return own_outputs(learner, through_adapters(learner, batch, [task], chosen_b), [task], chosen_b)

    @contextmanager
    def predicting(self, learner: Learner, batch: Batch, task: str | None = None) -> Iterator[None]:
        tasks = [name for name in self.learnt(learner) if task in (None, name)]
        if not tasks:
            with learner.bare():
                yield
            return
        _, directions_bd = self.directions(learner, batch)
        centroids = [self.memory[f"centroids/{name}"] for name in tasks]
        with adapters_of(learner, tasks, nearest_task(directions_bd, centroids, self.config.distance)):
            yield

    def learnt(self, learner: Learner) -> list[str]:
        """Returns the tasks that have ended, in their order."""
        return [task for task in learner.head.tasks if f"centroids/{task}" in self.memory]

    def directions(self, learner: Learner, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns the features (b, d) that the task is inferred from, as they are and of length 1."""
        if self.config.identify == "first expert":
            first_b = torch.zeros(len(batch), dtype=torch.int64, device=learner.device)
            features_bd = through_adapters(learner, batch, learner.head.tasks[:1], first_b)
        else:
            features_bd = bare_features(learner, batch)
        return features_bd, F.normalize(features_bd, dim=1)

    def memory_bound(self, learner: Learner) -> int:
        return 4 * self.config.clusters * learner.backbone.width * len(learner.head.tasks)


def own_outputs(learner: Learner, features_bd: Tensor, tasks: Sequence[str], chosen_b: Tensor) -> Tensor:
    """Returns scores (b, j): those of the chosen task's outputs, minus infinity for all others."""
    position = {task: e for e, task in enumerate(tasks)}
    task_j = torch.tensor([position.get(output.task, -1) for output in learner.outputs], device=learner.device)
    scores_bj: Tensor = learner.head(features_bd)
    return scores_bj.masked_fill(task_j != chosen_b[:, None], -torch.inf)


def nearest_task(directions_bd: Tensor, centroids: Sequence[Tensor], distance: Distance) -> Tensor:
    """Returns the position (b,) of the task with the nearest centroid. centroids: (k, d) of every task."""
    owner_k = torch.repeat_interleave(torch.tensor([len(c) for c in centroids])).to(directions_bd.device)
    power = 1.0 if distance == "l1" else 2.0
    # Not by matrix products: their rounding depends on the batch size.
    away_bk = torch.cdist(directions_bd, torch.cat(list(centroids)), power, "donot_use_mm_for_euclid_dist")
    return owner_k[away_bk.argmin(1)]
