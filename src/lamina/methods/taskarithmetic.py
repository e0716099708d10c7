"""Task arithmetic with LoRA (Chitale et al., WANT workshop at NeurIPS 2023, arXiv 2311.02428).

    τ_i = up_i down_i, learnt from the pre-trained model alone, whatever came before
    θ   = θ_pre + λ Σ_i τ_i                                  one model for all tasks, in whatever order they came
    MemFT: θ is fine-tuned on a few examples of every class; the next task starts from θ_pre again, not from here

    paper        here                                                      shape
    A, B         down_ri, up_or: the live branch of a task                 (r, i), (o, r)
    τ_i          change_oi = up_or @ down_ri                               (o, i)
    Σ τ_i        in memory as `sum/<site>`, float64                        (o, i)
    θ - θ_pre    finished branch "merged" of every site                    (o, i) in factors
    λ            scale
    MemFT        finished branch "memory", and the rows of the head while it is deployed

The paper's λ Σ τ_i is the default; `merge` also offers the mean, TIES, DARE and trimming, all in the space of the whole
change and never on the factors, whose product is no linear function of them. Of the head the paper says nothing: here
every task has rows of its own (see `head`), and each row as its task left it stays in memory as `weight/<task>` and
`bias/<task>`. Examples are kept as `pixel_values/<task>` in half precision, or `input_ids` and `attention_mask` as int32.

Shape letters: o outputs, i inputs, r rank, n tasks or examples, b batch, d width.
"""

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lamina import rng
from lamina.adapters import LowRank
from lamina.errors import TrainingError
from lamina.learner import AdapterSite, Learner
from lamina.learner.head import class_scores
from lamina.maths import linalg
from lamina.methods.base import (
    Departure,
    Method,
    MethodConfig,
    Needs,
    Paper,
    Pass,
    Refusal,
    local_cross_entropy,
    local_labels,
)
from lamina.rng import seed_of
from lamina.types import Batch, Task

MERGED, MEMORY = "merged", "memory"
INPUTS = {"image": ("pixel_values",), "text": ("input_ids", "attention_mask")}
Merge = Literal["sum", "mean", "ties", "dare", "magnitude"]


class TaskArithmeticConfig(MethodConfig):
    rank: int = Field(16, ge=1)
    """Rank of the change each task learns in every adapted map."""
    merge: Merge = "sum"
    """How changes become one: their sum; their mean; ties (trim, elect a sign per entry, mean of those that agree); dare
    (drop entries at random, rescale the rest) or magnitude (trim), then the sum. All but the mean are times `scale`."""
    scale: float = Field(0.25, gt=0)
    """λ: what the merged change is multiplied by."""
    density: float = Field(0.2, gt=0, le=1)
    """Share of the entries of each change that ties, dare and magnitude keep."""
    head: Literal["own", "scaled"] = "own"
    """OutputRange of the head as their own task left them, or part of θ: what the task changed in them times λ."""
    kl: float = Field(0.0, ge=0, lt=1)
    """Weight of the divergence from the pre-trained features; cross-entropy has 1 - kl. The paper tries 0 and 0.4."""
    memory_per_class: int = Field(10, ge=0)
    """Training examples kept per class of each task for the fine-tuning after merging; 0: none, and no fine-tuning."""
    memory_rank: int = Field(16, ge=1)
    """Rank of the change that the fine-tuning adds to every adapted map."""
    memory_epochs: int = Field(10, ge=1)
    """Passes over the kept examples in each fine-tuning."""
    memory_lr: float = Field(1e-3, gt=0)
    """Learning rate of Adam in the fine-tuning, for adapters and head."""
    memory_batch: int = Field(32, ge=1)
    """Examples in a step of the fine-tuning."""


class TaskArithmetic(Method[TaskArithmeticConfig]):
    name = "taskarithmetic"
    advice = "Tasks that come in any order, or are merged later; it keeps a few examples per class to repair the merge."
    paper = Paper(
        title="Task Arithmetic with LoRA for Continual Learning",
        authors="Chitale et al.",
        venue="WANT workshop at NeurIPS 2023",
        link="https://arxiv.org/abs/2311.02428",
        departures=(
            Departure(
                what="fine-tuning on kept examples trains a low-rank change and the head; the paper's reads as all weights",
                whose="ours",
                switch="memory_rank",
            ),
            Departure(
                what="it is done after every task and undone before the next, not once at the end of the stream",
                whose="ours",
            ),
            Departure(
                what="its epochs, rate and batch, of which the paper says nothing",
                whose="ours",
                switch="memory_epochs, memory_lr, memory_batch",
            ),
            Departure(
                what="each task has rows of the head of its own, not scaled; the paper does not say what the head is",
                whose="ours",
                switch="head",
            ),
            Departure(what="a class that comes back has rows per task, and the largest counts", whose="ours"),
            Departure(what="other ways to merge than the scaled sum", whose="ours", switch="merge, density"),
            Departure(what="kept images are rounded to half precision", whose="ours"),
        ),
    )
    needs = Needs(
        stored_examples=10,
        growth="kept examples, and head rows with a copy of each, by class; the merged change until its rank is full, but "
        "with merge = ties by one change per task. With memory_per_class = 0 no example is kept",
        operations="a step and an answer not at all; the end of a task by the fine-tuning on the kept examples of one more",
    )
    config_type = TaskArithmeticConfig
    refuses = (
        Refusal("init", "every task is learnt from the pre-trained weights"),
        Refusal("merging", "it merges the changes of all tasks itself"),
    )
    independent = True

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        learner.drop(MERGED)
        learner.drop(MEMORY)
        for name in learner.head.tasks:
            self.set_rows(learner, name, gain=1.0)
        learner.head.freeze()
        block = learner.head.add(task.name, task.classes)
        if self.config.head == "scaled":
            self.memory |= {f"start/{part}/{task.name}": p.detach().clone() for part, p in block.named_parameters()}
        for site in learner.sites.values():
            generator = torch.Generator().manual_seed(seed_of(self.name, torch.initial_seed(), site.name))
            site.add(task.name, LowRank.fresh(site.d_out, site.d_in, self.config.rank, generator))

    def loss(self, learner: Learner, batch: Batch, task: Task) -> Tensor:
        weight = self.config.kl
        if weight == 0:
            return local_cross_entropy(learner, batch, task)
        with learner.bare(), torch.no_grad():
            before_bd = learner.features(batch)
        features_bd = learner.features(batch)
        logits_bc = learner.head.block(task.name)(features_bd)
        fitting = F.cross_entropy(logits_bc, local_labels(task, batch.labels_b))
        return (1 - weight) * fitting + weight * feature_divergence(before_bd, features_bd)

    def end(self, learner: Learner, task: Task, batches: Pass) -> None:
        for site in learner.sites.values():
            self.remember_change(site, task.name)
        learner.drop(task.name)
        block = learner.head.block(task.name)
        self.memory |= {f"{part}/{task.name}": p.detach().clone() for part, p in block.named_parameters()}
        if self.config.memory_per_class:
            self.remember_examples(learner, task)
        for site in learner.sites.values():
            up_or, down_ri = linalg.factors_of(self.merged(site, sorted(learner.head.tasks)))
            site.add(MERGED, LowRank(trained={}, frozen={"up": up_or, "down": down_ri}))
        learner.finish(MERGED)
        for name in learner.head.tasks:
            self.set_rows(learner, name, self.gain(learner) if self.config.head == "scaled" else 1.0)
        if self.config.memory_per_class:
            self.fine_tune(learner)
        learner.head.freeze()

    # -- merging ----------------------------------------------------------------------------------------------------

    def gain(self, learner: Learner) -> float:
        """What every change is multiplied by: λ, or 1/n for a mean."""
        return 1 / len(learner.head.tasks) if self.config.merge == "mean" else self.config.scale

    def remember_change(self, site: AdapterSite, task: str) -> None:
        up_or, down_ri = (factor.detach() for factor in site.live()[task].factors())
        if self.config.merge == "ties":  # signs are elected among all changes, so each must be kept
            self.memory |= {f"up/{site.name}/{task}": up_or.clone(), f"down/{site.name}/{task}": down_ri.clone()}
            return
        change_oi = up_or.double() @ down_ri.double()
        if self.config.merge == "magnitude":
            change_oi = linalg.trim(change_oi, self.config.density)
        elif self.config.merge == "dare":
            generator = torch.Generator().manual_seed(seed_of("dare", torch.initial_seed(), site.name))
            change_oi = linalg.drop_and_rescale(change_oi, self.config.density, generator)
        # Float64: what the order of the sum leaves in it is far below the rounding of the weight.
        sum_oi = self.memory.get(f"sum/{site.name}")
        self.memory[f"sum/{site.name}"] = change_oi if sum_oi is None else sum_oi + change_oi

    def merged(self, site: AdapterSite, tasks: list[str]) -> Tensor:
        """θ - θ_pre of one map, (o, i) float64."""
        if self.config.merge == "ties":
            pairs = [[self.memory[f"{f}/{site.name}/{task}"].double() for f in ("up", "down")] for task in tasks]
            trimmed_noi = torch.stack([linalg.trim(up_or @ down_ri, self.config.density) for up_or, down_ri in pairs])
            return self.config.scale * linalg.agreeing_mean(trimmed_noi)
        sum_oi = self.memory[f"sum/{site.name}"]
        return sum_oi / len(tasks) if self.config.merge == "mean" else self.config.scale * sum_oi

    def set_rows(self, learner: Learner, task: str, gain: float) -> None:
        """The rows of a task as it left them (gain 1), or with the change it made in them times the gain."""
        rows = {part: self.memory[f"{part}/{task}"] for part in ("weight", "bias")}
        if gain != 1:
            starts = {part: self.memory[f"start/{part}/{task}"] for part in rows}
            rows = {part: starts[part] + gain * (row - starts[part]) for part, row in rows.items()}
        learner.head.block(task).load_state_dict(rows)

    # -- fine-tuning on kept examples -------------------------------------------------------------------------------

    def remember_examples(self, learner: Learner, task: Task) -> None:
        """Some of each class, chosen by a hash of their place in the data; and what the fine-tuning is seeded with."""
        seed = seed_of(MEMORY, torch.initial_seed())
        order_n = np.argsort(rng.bits(task.train.rows_n, seed), kind="stable")
        labels_n = task.train.labels_n[order_n]
        chosen = [order_n[labels_n == label][: self.config.memory_per_class] for label in task.classes]
        batch = task.train.batch(np.concatenate(chosen)).to(learner.device)
        for part in INPUTS[learner.backbone.kind]:
            values = batch.inputs[part]
            self.memory[f"{part}/{task.name}"] = (
                values.half() if values.is_floating_point() else values.int()
            ).contiguous()
        self.memory[f"labels/{task.name}"] = batch.labels_b
        self.memory[f"seed/{task.name}"] = torch.tensor(seed)

    def fine_tune(self, learner: Learner) -> None:
        """MemFT: a low-rank change on top of the merged weights and all rows of the head learn all classes together. A
        class's score is the largest of its rows, as when predicting. Nothing here depends on the order of the tasks."""
        config, tasks = self.config, sorted(learner.head.tasks)
        seed = seed_of(*(int(self.memory[f"seed/{task}"]) for task in tasks))
        for site in learner.sites.values():
            generator = torch.Generator().manual_seed(seed_of(seed, site.name))
            site.add(MEMORY, LowRank.fresh(site.d_out, site.d_in, config.memory_rank, generator))
        learner.head.requires_grad_(True)
        inputs = {k: padded([self.memory[f"{k}/{task}"] for task in tasks]) for k in INPUTS[learner.backbone.kind]}
        labels_n = torch.cat([self.memory[f"labels/{task}"] for task in tasks])
        classes_c = torch.tensor(sorted({row.label for row in learner.outputs}), device=learner.device)
        optimizer = torch.optim.Adam(learner.trainable().values(), lr=config.memory_lr)
        per_epoch = -(-len(labels_n) // config.memory_batch)
        for step in range(config.memory_epochs * per_epoch):
            epoch, number = divmod(step, per_epoch)
            order_n = torch.from_numpy(rng.permutation(len(labels_n), seed, epoch)).to(learner.device)
            chosen_b = order_n[number * config.memory_batch : (number + 1) * config.memory_batch]
            values = {
                k: v[chosen_b].float() if v.is_floating_point() else v[chosen_b].long() for k, v in inputs.items()
            }
            batch = Batch(inputs=values, labels_b=labels_n[chosen_b])
            scores_bc = class_scores(learner.head(learner.features(batch)), learner.outputs, classes_c.tolist())
            loss = F.cross_entropy(scores_bc, torch.searchsorted(classes_c, batch.labels_b))
            if not math.isfinite(loss.item()):
                raise TrainingError(
                    f"the loss is {loss.item()} in epoch {epoch + 1} of the fine-tuning on kept examples. A smaller "
                    f"method.memory_lr (now {config.memory_lr}) usually helps."
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        learner.finish(MEMORY)

    def memory_bound(self, learner: Learner) -> int:
        config, tasks, rows = self.config, len(learner.head.tasks), len(learner.outputs)
        sizes = [(site.d_out, site.d_in) for site in learner.sites.values()]
        changes = sum(4 * tasks * config.rank * (o + i) if config.merge == "ties" else 8 * o * i for o, i in sizes)
        head = 4 * rows * (learner.backbone.width + 1) * (2 if config.head == "scaled" else 1)
        kinds = dict.fromkeys(("labels", *INPUTS[learner.backbone.kind]), 0)
        for key, value in self.memory.items():  # how long a text is, only the texts know
            kind = key.split("/")[0]
            if kind in kinds:
                kinds[kind] = max(kinds[kind], value[:1].numel() * value.element_size())
        kept = 8 * tasks + rows * config.memory_per_class * sum(kinds.values()) if config.memory_per_class else 0
        return changes + head + kept


def feature_divergence(before_bd: Tensor, after_bd: Tensor) -> Tensor:
    """KL(softmax(before) || softmax(after)), the mean over examples."""
    return F.kl_div(F.log_softmax(after_bd, 1), F.softmax(before_bd, 1), reduction="batchmean")


def padded(parts: list[Tensor]) -> Tensor:
    """Examples of several tasks as one tensor; texts are filled up with zeros, which their masks leave out."""
    longest = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(part, (0, longest - part.shape[-1])) for part in parts])
