"""Consolidations of one training run: the run is trained once and kept, and every consolidation is made from what was kept.

    create(config, chain)          trains, and keeps what the method made of each task (the chain)
    replay(chain, config, out)     the run of another consolidation or evaluation, with the training of the chain

A replay has the result of the direct run. Its seconds count the training of the chain and the features taken from a memo, so
they are those of the direct run too; its peak of memory is not known.
"""

import dataclasses
import hashlib
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamina import record, runs
from lamina.config import ConsolidationConfig, RunConfig
from lamina.engine import checkpoint
from lamina.engine.consolidate import Consolidation
from lamina.engine.loop import Loop
from lamina.errors import RunError
from lamina.learner import Learner, local_labels
from lamina.maths.class_statistics import Statistics, concatenated, of_features
from lamina.methods.base import Method
from lamina.record import Record
from lamina.runs.directory import begun
from lamina.types import Batch, Task

CHAIN = "chain"
"""Folder of a run with what its method made of each task."""
Memo = dict[str, tuple[Tensor, float]]
"""Features by a hash of inputs and weights, and the seconds that they took."""


class KeepingLoop(Loop):
    """Keeps what the method made of each task, before consolidation."""

    def end_method(self, task: Task) -> None:
        super().end_method(task)
        tensors = {"learner": self.learner.tensors(), "memory": self.method.memory}
        documents = {"outline": self.learner.outline(), "entry": dataclasses.asdict(self.state.lineage[-1])}
        checkpoint.save(self.checkpoints.parent / CHAIN / str(self.position.task), documents, tensors)


class ReplayingLoop(Loop):
    """Takes what another run kept in place of training."""

    def __init__(self, *, chain: Path, memo: Memo | None, consolidation: ConsolidationConfig, **others: Any) -> None:
        """chain: the directory of the other run."""
        super().__init__(**others)
        self.chain = chain
        self.consolidation: Replayed = Replayed(consolidation, self.method, self, memo)
        self.consolidation.check(self.learner)
        spent = record.read(chain).cost.seconds
        for phase in ("begin", "train", "end"):
            super().spend(phase, spent.get(phase) or 0.0)

    def begin_method(self, task: Task) -> None:
        """Nothing: `end_method` takes all of it."""

    def descend(self, task: Task, steps: int) -> None:
        """Nothing: `end_method` takes all of it."""

    def end_method(self, task: Task) -> None:
        del task  # its number is enough
        kept = checkpoint.load_newest(self.chain / CHAIN / str(self.position.task))
        assert kept is not None
        documents, tensors = kept.documents, kept.tensors
        self.state = self.state.with_entry(trainable_parameters=documents["entry"]["trainable_parameters"])
        self.learner.reset()
        self.learner.restore(documents["outline"], tensors["learner"], self.method.branch_type)
        self.method.memory = {n: value.to(self.learner.device, copy=True) for n, value in tensors["memory"].items()}

    def spend(self, phase: str, seconds: float) -> None:
        super().spend(phase, seconds + self.consolidation.spared)
        self.consolidation.spared = 0.0


class Replayed(Consolidation):
    """Consolidation that can measure old examples again, and computes features once for all replays of a chain."""

    remeasures = True

    def __init__(self, config: ConsolidationConfig, method: Method[Any], loop: Loop, memo: Memo | None) -> None:
        super().__init__(config, method)
        self.loop, self.memo = loop, memo
        self.spared = 0.0
        """Seconds that features taken from the memo had needed."""

    def compensated(self, learner: Learner, old: Statistics, before_nd: Tensor | None, after_nd: Tensor) -> Statistics:
        if self.config.drift != "remeasured":
            return super().compensated(learner, old, before_nd, after_nd)
        parts = []
        for task in self.loop.stream.tasks[: self.loop.position.task]:
            features_nd, labels_n = self.features_of(learner, self.loop.pass_over("end", task))
            rank, blocks = self.config.class_covariance_rank, learner.backbone.blocks_of(self.config.layers)
            parts.append(of_features(features_nd, local_labels(task, labels_n), len(task.classes), rank, blocks))
        measured = parts[0]
        for part in parts[1:]:
            measured = concatenated(measured, part)
        return measured

    def features(self, learner: Learner, batch: Batch) -> Tensor:
        if self.memo is None:
            return super().features(learner, batch)
        key = self._key(learner, batch)
        if key in self.memo:
            self.spared += self.memo[key][1]
        else:
            started = time.perf_counter()
            self.memo[key] = super().features(learner, batch), time.perf_counter() - started
        return self.memo[key][0]

    def _key(self, learner: Learner, batch: Batch) -> str:
        digest = hashlib.blake2b(digest_size=16)

        def add(value: Tensor) -> None:
            digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

        for _, value in sorted(batch.inputs.items()):
            add(value)
        for layer in learner.layers.values():
            add(layer.effective().float())
        for _, value in sorted(self.method.memory.items()):  # of input-dependent gates, for example
            add(value)
        digest.update(repr([self.config.layers, [[*site.finished()] for site in learner.sites.values()]]).encode())
        return digest.hexdigest()


def create(config: RunConfig, chain: Path) -> Record:
    """Trains a run and keeps its chain, or goes on with one that was begun; returns its record."""
    if (chain / "config.json").exists():
        return runs.resume(chain, make_loop=KeepingLoop)
    return runs.create(config, chain, make_loop=KeepingLoop)


def replay(chain: Path, config: RunConfig, out: Path, memo: Memo | None = None) -> Record:
    """Makes the run of this configuration in `out` from the chain of another run, and returns its record.

    memo: features are noted there and taken from there. Raises RunError where the other run is not finished, has no chain, or
    differs in more than consolidation and evaluation.
    """
    config = runs.with_whole_paths(config)
    kept = begun(chain).config
    same = {"consolidation": kept.consolidation, "evaluation": kept.evaluation}
    if config.model_copy(update=same) != kept or config.consolidation.init != kept.consolidation.init:
        raise RunError(
            f"{chain} cannot be replayed as this run: it must have the same consolidation.init, and differ in nothing else "
            "outside consolidation and evaluation."
        )
    if not (chain / record.FILE).exists() or not (chain / CHAIN).is_dir():
        raise RunError(f"{chain} cannot be replayed: it is not finished, or kept no chain. Make it with chains.create.")
    found = runs.create(config, out, make_loop=partial(ReplayingLoop, chain=chain, memo=memo))
    found = found.model_copy(update={"cost": found.cost.model_copy(update={"peak_memory_mb": None})})
    record.write(found, out)
    return found
