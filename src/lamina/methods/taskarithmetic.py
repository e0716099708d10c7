"""Task arithmetic with LoRA (Chitale et al., WANT workshop at NeurIPS 2023, arXiv 2311.02428).

    τ_i = up_i down_i, trained from the pre-trained model alone, whatever came before
    θ   = θ_pre + λ Σ_i τ_i                                  one model for all tasks, in any order
    θ   = θ_pre + λ TIES(τ_1, ..., τ_t)                     where updates in conflict are resolved (Yadav et al., 2023)
    MemFT: θ is fine-tuned on a few examples of every class; the next task starts from θ_pre again

    paper        here                                                      shape
    A, B         down_ri, up_or: the live branch of a task                 (r, i), (o, r)
    Σ τ_i        in memory as `sum/<site>`, float64                        (o, i)
    τ_i          for TIES: in memory as `up/<task>/<site>`, `down/...`     (o, r), (r, i)
                 for DARE: the seed of its draws as `dare/<task>`          ()
    θ - θ_pre    finished branch "merged" of every site                    (o, i) in factors
    λ            scale
    MemFT        finished branch "memory", and the outputs of the head as deployed

The paper does not specify the head. Here every task has its own outputs; as trained, they stay in memory as
`weight/<task>` and `bias/<task>`. Stored examples are `pixel_values/<task>` in half precision, or `input_ids` and
`attention_mask` as int32.

Shape letters: o outputs, i inputs, r rank, n examples, b batch, c classes, d width.
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
from lamina.errors import MethodError, TrainingError
from lamina.learner import AdapterSite, Learner, local_labels
from lamina.maths.linalg import factors_of
from lamina.maths.merging import agreeing, dropped, trimmed
from lamina.methods.base import (
    Departure,
    Method,
    MethodConfig,
    Needs,
    Paper,
    Pass,
    Refusal,
    hashed_order,
)
from lamina.rng import seed_of
from lamina.types import Batch, Task

MERGED, MEMORY = "merged", "memory"
INPUTS = {
    "image": ("pixel_values",),
    "text": ("input_ids", "attention_mask"),
    "language": ("input_ids", "attention_mask", "completion_mask"),
}


class TaskArithmeticConfig(MethodConfig):
    rank: int = Field(16, ge=1)
    """Rank of the update that each task learns in every adapted layer."""
    scale: float = Field(0.25, gt=0)
    """λ: factor of the sum of all updates."""
    merge: Literal["sum", "ties", "dare", "dare+ties"] = "sum"
    """Merging of the updates: their sum (the paper); without entries in conflict (TIES); the sum of randomly thinned updates
    (DARE); or both. TIES takes a mean, so that `scale` = 1 is usual with it. The equations are in `maths/merging.py`."""
    density: float = Field(0.2, gt=0, le=1)
    """Share of an update's entries that TIES or DARE keeps."""
    kl: float = Field(0.0, ge=0, lt=1)
    """Weight of the divergence from the pre-trained features; cross-entropy has 1 - kl. The paper tries 0 and 0.4."""
    memory_per_class: int = Field(10, ge=0)
    """Training examples stored per class of each task, for fine-tuning after merging. 0: none, and no fine-tuning."""
    memory_rank: int = Field(16, ge=1)
    """Rank of the update that the fine-tuning adds to every adapted layer."""
    memory_epochs: int = Field(10, ge=1)
    """Passes over the stored examples in each fine-tuning."""
    memory_lr: float = Field(1e-3, gt=0)
    """Learning rate of Adam in the fine-tuning, for adapters and head."""
    memory_batch: int | None = Field(None, ge=1)
    """Examples in a step of the fine-tuning. Not set: 32, and 8 for language models, whose steps need much memory."""


class TaskArithmetic(Method[TaskArithmeticConfig]):
    name = "taskarithmetic"
    advice = "When a few examples per class may be stored, or tasks come in any order."
    paper = Paper(
        title="Task Arithmetic with LoRA for Continual Learning",
        authors="Chitale et al.",
        venue="WANT workshop at NeurIPS 2023",
        link="https://arxiv.org/abs/2311.02428",
        departures=(
            Departure(
                "fine-tuning trains a low-rank update and the head; in the paper it reads as all weights",
                "ours",
                "memory_rank",
            ),
            Departure(
                "fine-tuning follows every task and is undone before the next; in the paper it ends the stream", "ours"
            ),
            Departure(
                "epochs, rate and batch of the fine-tuning, which the paper does not give",
                "ours",
                "memory_epochs, memory_lr, memory_batch",
            ),
            Departure("each task has its own outputs of the head, not multiplied by λ", "ours", of_classifiers=True),
            Departure(
                "a class that returns has outputs per task, and the largest score counts", "ours", of_classifiers=True
            ),
            Departure("stored images are rounded to half precision", "ours", of_classifiers=True),
        ),
    )
    needs = Needs(
        stored_examples=10,
        per_task="stored examples",
        storage="The stored examples, and a copy of each class's outputs. The merged update of every adapted layer, in "
        "float64. With memory_per_class = 0 no example is stored.",
        extra="Fine-tuning on all stored examples at the end of every task.",
    )
    config_type = TaskArithmeticConfig
    refuses = (
        Refusal("init", "every task is trained from the pre-trained weights"),
        Refusal("merging", "it merges the updates of all tasks itself"),
    )
    independent = True

    def begin(self, learner: Learner, task: Task, batches: Pass) -> None:
        learner.drop(MERGED)
        learner.drop(MEMORY)
        self.reset_outputs(learner, learner.head.tasks)
        learner.add_lora(task, self.config.rank, self.name)

    def loss(self, learner: Learner, batch: Batch, task: Task) -> Tensor:
        weight = self.config.kl
        if weight == 0:
            return learner.loss(batch, task)
        if learner.generates:
            raise MethodError(
                f"method.kl = {weight} compares features that a classifier reads, and a language model has none. Leave it at 0."
            )
        with learner.bare(), torch.no_grad():
            before_bd = learner.features(batch)
        features_bd = learner.features(batch)
        logits_bc = learner.head.block(task.name)(features_bd)
        fitting = F.cross_entropy(logits_bc, local_labels(task, batch.labels_b))
        return (1 - weight) * fitting + weight * feature_divergence(before_bd, features_bd)

    def end(self, learner: Learner, task: Task, batches: Pass) -> None:
        for part, parameter in learner.head.block(task.name).named_parameters():
            self.memory[f"{part}/{task.name}"] = parameter.detach().clone()
        for site in learner.sites.values():
            up_or, down_ri = factors_of(self.config.scale * self.merged(site, task.name))
            site.add(MERGED, LowRank(trained={}, frozen={"up": up_or, "down": down_ri}))
        learner.drop(task.name)
        learner.finish(MERGED)
        self.reset_outputs(learner, learner.head.tasks)
        if self.config.memory_per_class:
            self.store_examples(learner, task)
            self.fine_tune(learner)
        learner.head.freeze()

    def merged(self, site: AdapterSite, task: str) -> Tensor:
        """Returns the updates of all tasks, merged, (o, i) float64; that of the task is stored."""
        up_or, down_ri = (factor.detach() for factor in site.live()[task].factors())
        if "dare" in self.config.merge:
            self.memory[f"dare/{task}"] = torch.tensor(seed_of("dare", torch.initial_seed()))
        if "ties" in self.config.merge:
            self.memory |= {f"up/{task}/{site.name}": up_or.clone(), f"down/{task}/{site.name}": down_ri.clone()}
            end = f"/{site.name}"  # a task's name may hold a slash
            stored = [key for key in self.memory if key.startswith("up/") and key.endswith(end)]
            tasks = [key.removeprefix("up/").removesuffix(end) for key in stored]
            return agreeing([self.thinned(site, name) for name in sorted(tasks)])
        # Float64: the order of the sum then changes it far less than the rounding of the weight.
        new_oi, key = up_or.double() @ down_ri.double(), f"sum/{site.name}"
        if self.config.merge == "dare":
            new_oi = dropped(new_oi, self.config.density, self.draws_of(site, task))
        self.memory[key] = self.memory[key] + new_oi if key in self.memory else new_oi
        return self.memory[key]

    def thinned(self, site: AdapterSite, task: str) -> Tensor:
        """Returns what TIES takes of the update of a task, (o, i) float64."""
        update_oi = self.memory[f"up/{task}/{site.name}"].double() @ self.memory[f"down/{task}/{site.name}"].double()
        if self.config.merge == "ties":
            return trimmed(update_oi, self.config.density)
        return dropped(update_oi, self.config.density, self.draws_of(site, task))

    def draws_of(self, site: AdapterSite, task: str) -> torch.Generator:
        """Returns the generator of what DARE drops from the update of a task, the same whenever it is merged."""
        return torch.Generator().manual_seed(seed_of(int(self.memory[f"dare/{task}"]), site.name))

    def reset_outputs(self, learner: Learner, tasks: list[str]) -> None:
        """Set the outputs of these tasks to their values after training."""
        for task in tasks:
            learner.head.block(task).load_state_dict({p: self.memory[f"{p}/{task}"] for p in ("weight", "bias")})

    def store_examples(self, learner: Learner, task: Task) -> None:
        """Store some examples of each class, the first in `hashed_order`, and the seed of that order."""
        seed = seed_of(MEMORY, torch.initial_seed())
        order_n = hashed_order(task.train, seed)
        labels_n = task.train.labels_n[order_n]
        chosen = [order_n[labels_n == label][: self.config.memory_per_class] for label in task.classes]
        batch = task.train.batch(np.concatenate(chosen)).to(learner.device)
        for part in INPUTS[learner.backbone.kind]:
            values = batch.inputs[part]
            compact = values.half() if values.is_floating_point() else values.int()
            self.memory[f"{part}/{task.name}"] = compact.contiguous()
        self.memory |= {f"labels/{task.name}": batch.labels_b, f"seed/{task.name}": torch.tensor(seed)}

    def fine_tune(self, learner: Learner) -> None:
        """MemFT: train a low-rank update on top of the merged weights, and all outputs of the head, on all classes together.
        A class's score is the largest of its outputs, as in prediction. The order of the tasks does not matter."""
        config, tasks = self.config, sorted(learner.head.tasks)
        seed = seed_of(*(int(self.memory[f"seed/{task}"]) for task in tasks))
        for site in learner.sites.values():
            generator = torch.Generator().manual_seed(seed_of(seed, site.name))
            site.add(MEMORY, LowRank.fresh(site.d_out, site.d_in, config.memory_rank, generator))
        learner.head.requires_grad_(True)
        inputs = {k: padded([self.memory[f"{k}/{task}"] for task in tasks]) for k in INPUTS[learner.backbone.kind]}
        labels_n = torch.cat([self.memory[f"labels/{task}"] for task in tasks])
        optimizer = torch.optim.Adam(learner.trainable().values(), lr=config.memory_lr)
        size = config.memory_batch or (8 if learner.generates else 32)
        for epoch in range(config.memory_epochs):
            self.working(epoch, config.memory_epochs)
            order_n = torch.from_numpy(rng.permutation(len(labels_n), seed, epoch)).to(learner.device)
            for chosen_b in torch.split(order_n, size):
                parts = {k: value[chosen_b] for k, value in inputs.items()}
                parts = {k: v.float() if v.is_floating_point() else v.long() for k, v in parts.items()}
                batch = Batch(inputs=parts, labels_b=labels_n[chosen_b])
                loss = learner.loss_of_all(batch)
                if not math.isfinite(loss.item()):
                    raise TrainingError(
                        f"the loss is {loss.item()} in epoch {epoch + 1} of the fine-tuning on stored examples. Use a "
                        f"smaller method.memory_lr (now {config.memory_lr})."
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        learner.finish(MEMORY)

    def memory_bound(self, learner: Learner) -> int:
        tasks, outputs, kept = len(learner.head.tasks), len(learner.outputs), self.config.memory_per_class
        sites = learner.sites.values()
        if "ties" in self.config.merge:
            updates = 4 * tasks * self.config.rank * sum(site.d_out + site.d_in for site in sites)
        else:
            updates = sum(8 * site.d_out * site.d_in for site in sites)
        examples = outputs * kept
        if learner.generates:  # without outputs, only the examples tell how many classes there are
            examples = sum(len(value) for key, value in self.memory.items() if key.startswith("labels/"))
        example = dict.fromkeys(("labels", *INPUTS[learner.backbone.kind]), 0)
        for key, value in self.memory.items():  # only the texts themselves know their length
            kind = key.split("/")[0]
            if kind in example:
                example[kind] = max(example[kind], value[:1].numel() * value.element_size())
        stored = 8 * tasks + examples * sum(example.values()) if kept else 0
        updates += 8 * tasks if "dare" in self.config.merge else 0
        return updates + 4 * outputs * (learner.backbone.width + 1) + stored


def feature_divergence(before_bd: Tensor, after_bd: Tensor) -> Tensor:
    """Returns the mean over examples of KL(softmax(before) || softmax(after))."""
    return F.kl_div(F.log_softmax(after_bd, 1), F.softmax(before_bd, 1), reduction="batchmean")


def padded(parts: list[Tensor]) -> Tensor:
    """Returns the examples of several tasks as one tensor. Texts are padded with zeros, which their masks exclude."""
    longest = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(part, (0, longest - part.shape[-1])) for part in parts])
