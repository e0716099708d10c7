"""CoLoR: continual learning with low rank adaptation (Wistuba et al., DistShift workshop at NeurIPS 2023, arXiv 2311.17601).

    expert_t = up_t down_t in every adapted map, and rows of the head: task t alone trains them, on the frozen backbone
    C_t = k-means centroids of f(x)/|f(x)| over the training data of task t        f: the backbone without any expert
    t̂(x) = the task of the centroid nearest to f(x)/|f(x)|
    score(x) = rows of task t̂ of the features through expert t̂; minus infinity for all other rows

An expert is never changed and never folded, so what a task answers when told stays the same bits for ever. Two passes per
input: one to identify its task, one through that task's expert. CoLoR++ takes f through the first task's expert; an
input identified as the first task's then needs no second pass.

    paper        here                                                          shape
    A_t, B_t     down_ri, up_or of the branch of the task, kept as an expert   (r, i), (o, r)
    centroids    in memory as `centroids/<task>`                               (k, d)
    k            clusters
    CoLoR++      identify = "first expert"

Only the abstract and the start of the paper could be read. The identification is that of S-Prompts (Wang et al., NeurIPS
2022) as released; see the departures and docs/papers/color.md for what is inferred.

Shape letters: b batch, n examples, d width, k centroids, r rank or rows of the head, o outputs, i inputs.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lamina.adapters import LowRank
from lamina.learner import Learner
from lamina.maths.linalg import kmeans
from lamina.methods.base import Departure, Method, MethodConfig, Needs, Paper, Pass, Refusal
from lamina.rng import seed_of
from lamina.types import Batch, Task

Distance = Literal["l1", "l2"]


class CoLoRConfig(MethodConfig):
    rank: int = Field(10, ge=1)
    """Rank of the expert of each task in every adapted map."""
    clusters: int = Field(5, ge=1)
    """k: centroids kept per task. Domains need few; tasks that split the classes of one dataset need more."""
    distance: Distance = "l2"
    """Nearest by the Euclidean distance (as in Renate) or by the sum of absolute differences (as in S-Prompts)."""
    identify: Literal["pretrained", "first expert"] = "pretrained"
    """Features that tell tasks apart: of the backbone alone (CoLoR) or through the first task's expert (CoLoR++)."""


class CoLoR(Method[CoLoRConfig]):
    name = "color"
    advice = "Domains that look different: an expert for each, chosen per input, and nothing is ever forgotten."
    paper = Paper(
        title="Continual Learning with Low Rank Adaptation",
        authors="Wistuba et al.",
        venue="DistShift workshop at NeurIPS 2023",
        link="https://arxiv.org/abs/2311.17601",
        departures=(
            Departure(
                what="rank, clusters per task and optimiser are not known to us; rank 10 and 5 clusters (S-Prompts)",
                whose="ours",
                switch="rank, clusters",
            ),
            Departure(
                what="the distance to centroids is Renate's; S-Prompts' code sums absolute differences",
                whose="ours",
                switch="distance",
            ),
            Departure(what="CoLoR++ is reconstructed from recollection", whose="ours", switch="identify"),
            Departure(
                what="every task has rows of the head of its own; Renate shares one head by default, which drifts",
                whose="ours",
            ),
            Departure(
                what="centroids are taken after the task is learnt; Renate takes them before (the same, but for CoLoR++)",
                whose="ours",
            ),
        ),
    )
    needs = Needs(
        growth="one expert, one block of the head and `clusters` centroids per task",
        operations="a step not at all; an answer, which is two passes, by the distances to `clusters` centroids with every "
        "task, and with the number of different experts in a batch",
    )
    config_type = CoLoRConfig
    refuses = (
        Refusal("init", "every expert starts from the pre-trained weights"),
        Refusal("merging", "an expert is chosen per input, so the weights are not one matrix to average"),
    )
    independent = True  # CoLoR++ too: the first task's expert is used when a task ends, not while it trains

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        learner.head.freeze()
        learner.head.add(task.name, task.classes)
        for site in learner.sites.values():
            generator = torch.Generator().manual_seed(seed_of("color", torch.initial_seed(), site.name))
            site.add(task.name, LowRank.fresh(site.d_out, site.d_in, self.config.rank, generator))

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
        return own_rows(learner, features_bd, self.learnt(learner), chosen_b)

    def routed(self, learner: Learner, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features (b, d), each input through the expert of the task it is taken to be of; that task's position (b,)."""
        tasks = self.learnt(learner)
        features_bd, directions_bd = self.directions(learner, batch)
        chosen_b = nearest_task(directions_bd, [self.memory[f"centroids/{t}"] for t in tasks], self.config.distance)
        again_b = chosen_b >= (1 if self.config.identify == "first expert" else 0)
        if again_b.any():
            features_bd[again_b] = through_experts(learner, batch.select(again_b), tasks, chosen_b[again_b])
        return features_bd, chosen_b

    def predict_task_aware(self, learner: Learner, batch: Batch, task: str) -> Tensor:
        chosen_b = torch.zeros(len(batch), dtype=torch.int64, device=learner.device)
        return own_rows(learner, through_experts(learner, batch, [task], chosen_b), [task], chosen_b)

    def learnt(self, learner: Learner) -> list[str]:
        """The tasks that have ended, in their order."""
        return [task for task in learner.head.tasks if f"centroids/{task}" in self.memory]

    def directions(self, learner: Learner, batch: Batch) -> tuple[Tensor, Tensor]:
        """The features (b, d) that tell tasks apart, as they are and of length 1."""
        if self.config.identify == "first expert":
            first_b = torch.zeros(len(batch), dtype=torch.int64, device=learner.device)
            features_bd = through_experts(learner, batch, learner.head.tasks[:1], first_b)
        else:
            with learner.bare():
                features_bd = learner.features(batch)
        return features_bd, F.normalize(features_bd, dim=1)

    def memory_bound(self, learner: Learner) -> int:
        return 4 * self.config.clusters * learner.backbone.width * len(learner.head.tasks)


def through_experts(learner: Learner, batch: Batch, tasks: Sequence[str], chosen_b: Tensor) -> Tensor:
    """Features (b, d), each input through the expert of the task at its position in `tasks` and through nothing else."""
    used_e, expert_b = torch.unique(chosen_b, return_inverse=True)
    with learner.bare(), learner.routing([tasks[e] for e in used_e], expert_b):
        return learner.features(batch)


def own_rows(learner: Learner, features_bd: Tensor, tasks: Sequence[str], chosen_b: Tensor) -> Tensor:
    """Scores (b, r): those of the chosen task's rows, minus infinity for all others."""
    position = {task: e for e, task in enumerate(tasks)}
    task_r = torch.tensor([position.get(row.task, -1) for row in learner.outputs], device=learner.device)
    scores_br: Tensor = learner.head(features_bd)
    return scores_br.masked_fill(task_r != chosen_b[:, None], -torch.inf)


def nearest_task(directions_bd: Tensor, centroids: Sequence[Tensor], distance: Distance) -> Tensor:
    """Position (b,) of the task that has the nearest centroid. centroids: (k, d) of every task."""
    owner_k = torch.repeat_interleave(torch.tensor([len(c) for c in centroids])).to(directions_bd.device)
    power = 1.0 if distance == "l1" else 2.0
    # Without matrix products, whose rounding depends on the size of the batch.
    away_bk = torch.cdist(directions_bd, torch.cat(list(centroids)), power, "donot_use_mm_for_euclid_dist")
    return owner_k[away_bk.argmin(1)]
