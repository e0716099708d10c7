"""The record of a finished run, made from its setup and its state."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from lamina import __version__
from lamina.data import InstructionTable
from lamina.data.tokens import MULTIPLE
from lamina.engine import device
from lamina.engine.batches import Order
from lamina.engine.evaluate import depends_on_batch
from lamina.engine.loop import Loop
from lamina.engine.optim import for_task
from lamina.engine.order import steps_per_epoch
from lamina.engine.rehearsal import keep
from lamina.engine.state import Clock, now
from lamina.learner import LanguageLearner
from lamina.methods.base import describe
from lamina.record import (
    BackboneRecord,
    BatchRecord,
    ClassRecord,
    CodeRecord,
    CostRecord,
    LanguageRecord,
    LineageRecord,
    MachineRecord,
    MethodRecord,
    PredictionRecord,
    Record,
    SourceRecord,
    StreamRecord,
    TaskRecord,
)
from lamina.runs.environment import peak_memory_mb
from lamina.runs.setup import Setup
from lamina.types import SPLITS, Examples


def record_of(setup: Setup, loop: Loop) -> Record:
    """Returns the record of a run that has come to its end."""
    config, state, environment = setup.config, loop.state, setup.environment
    facts = describe(setup.method, language=setup.backbone.kind == "language")
    steps_before = [sum(entry.steps for entry in state.lineage[:task]) for task in range(len(state.lineage))]
    return Record(
        name=config.name,
        created=now(),
        seed=config.seed,
        split=config.evaluation.split,
        method=MethodRecord(**{key: facts[key] for key in MethodRecord.model_fields}),
        stream=_stream(setup),
        matrix=state.matrix,
        task_aware=state.task_aware,
        task_inference_accuracy=tuple(
            sum(inferred) / int(state.matrix.total_ij[i, : i + 1].sum())
            for i, inferred in enumerate(state.task_inference)
            if inferred
        ),
        config=config.model_dump(mode="json"),
        source=SourceRecord(**setup.source),
        backbone=BackboneRecord(
            name=Path(setup.backbone.name).name,
            hash=setup.backbone.hash,
            parameters=setup.backbone_parameters,
            kind=setup.backbone.kind,
        ),
        machine=MachineRecord(**environment.to_json(), processes=setup.world.size),
        code=CodeRecord(version=__version__, commit=environment.commit),
        classes=_classes(setup, loop),
        batch=_batch(setup, loop),
        language=_language(setup, loop),
        cost=_cost(setup, loop),
        lineage=_lineage(setup, loop),
        losses=tuple((steps_before[loss.task] + loss.step, loss.value) for loss in state.losses),
        skipped=tuple(setup.data.skipped),
        notes=state.notes,
    )


def _stream(setup: Setup) -> StreamRecord:
    stream = setup.stream
    return StreamRecord(
        data=stream.data_name,
        kind=stream.kind,
        scenario=stream.scenario if stream.scenario == "mixed" else f"{stream.scenario}-incremental",
        fingerprint=stream.fingerprint,
        joint=setup.config.stream.joint,
        tasks=tuple(
            TaskRecord(
                name=task.name,
                classes=tuple(stream.class_names[c] for c in task.classes),
                domain=task.domain,
                **{split: len(task.split(split)) for split in SPLITS},
            )
            for task in stream
        ),
    )


def _cost(setup: Setup, loop: Loop) -> CostRecord:
    state, clock = loop.state, loop.state.clock
    seconds = {phase: round(value, 3) for phase, value in clock.seconds.items()}
    total, train = sum(seconds.values()), seconds.get("train", 0.0)
    per_class = setup.config.rehearsal.per_class or None
    return CostRecord(
        seconds=seconds | {"total": round(total, 3)},
        steps=sum(entry.steps for entry in state.lineage),
        train_examples_per_second=clock.examples / train if clock.examples and train else None,
        parallel_seconds=None if clock.parallel_seconds is None else round(clock.parallel_seconds, 3),
        outside_training_share=1 - train / total if total else None,
        peak_memory_mb=peak_memory_mb(),
        peak_gpu_memory_mb=device.peak_memory_mb(setup.device),
        trainable_parameters=state.lineage[-1].trainable_parameters,
        stored_parameters=loop.learner.stored_parameters(),
        memory_bytes=loop.method.memory_bytes + loop.consolidation.memory_bytes,
        kept_examples=per_class and sum(len(keep(task.train, per_class)) for task in setup.stream),
        kept_per_class=per_class,
    )


def _language(setup: Setup, loop: Loop) -> LanguageRecord | None:
    state = loop.state.language
    if state is None:
        return None
    tokens, padded = 0, 0
    training = setup.config.training
    for task in setup.stream:
        assert isinstance(task.train.table, InstructionTable)
        lengths_n, steps = task.train.lengths(), steps_per_epoch(len(task.train), training.batch_size)
        order = Order(task.train, training.batch_size, seed=setup.config.seed, task=task.name, by_length=True)
        for step in range(for_task(training, steps).epochs * steps):
            lengths_b = lengths_n[order.positions(step)]
            tokens += int(lengths_b.sum())
            longest = min(-(-int(lengths_b.max()) // MULTIPLE) * MULTIPLE, task.train.table.max_length)  # as it pads
            padded += longest * len(lengths_b)
    return LanguageRecord(
        zero_shot=state.zero_shot,
        rouge_l=state.rouge_l,
        perplexity=state.perplexity,
        predictions=tuple(
            PredictionRecord(
                task=setup.stream[one.task].name,
                prompt=one.prompt,
                expected=one.expected,
                before=one.predicted[0],
                learnt=one.predicted[_when_learnt(loop, one.task)],
                end=one.predicted[-1],
            )
            for one in state.shown
        ),
        tokens=tokens,
        padding_share=1 - tokens / padded if padded else None,
        truncated=sum(_truncated(task.split(split)) for task in setup.stream for split in SPLITS),
    )


def _truncated(examples: Examples) -> int:
    """Returns how many of these examples have a prompt that was cut."""
    assert isinstance(examples.table, InstructionTable)
    return int(examples.table.truncated_n[examples.rows_n].sum())


def _when_learnt(loop: Loop, task: int) -> int:
    """Returns the place of the prediction after a task: one before the stream comes first, then those after each task."""
    return 1 + task if loop.evaluation.unseen else 1


def _lineage(setup: Setup, loop: Loop) -> tuple[LineageRecord, ...]:
    state, names = loop.state, setup.stream.class_names
    found = []
    for index, entry in enumerate(state.lineage):
        losses = [loss.value for loss in state.losses if loss.task == index]
        found.append(
            LineageRecord(
                **{key: value for key, value in dataclasses.asdict(entry).items() if key != "class_correct"},
                classes=tuple(names[c] for c in setup.stream[index].classes),
                loss_first=losses[0] if losses else None,
                loss_last=losses[-1] if losses else None,
                accuracy_at_end=float(state.matrix.accuracy_ij[-1, index]),
                **_times(state.clock, index),
            )
        )
    return tuple(found)


def _times(clock: Clock, task: int) -> dict[str, Any]:
    return {"seconds": clock.train_seconds.get(str(task)), "finished": clock.finished.get(str(task))}


def _batch(setup: Setup, loop: Loop) -> BatchRecord | None:
    """Tries whether predictions depend on the batch, with three test examples of the first and three of the last task."""
    if loop.learner.generates or isinstance(loop.learner, LanguageLearner):
        return None
    measure, found = loop.measure(), 0
    tasks = [task.split(setup.config.evaluation.split) for task in (setup.stream[0], setup.stream[-1])]
    tried = [
        examples.select(np.unique([0, len(examples) // 2, len(examples) - 1])) for examples in tasks if len(examples)
    ]
    for examples in tried:
        found += depends_on_batch(loop.learner, loop.consolidation, examples, lambda some: measure.batches(some, False))
    return BatchRecord(examples=sum(map(len, tried)), dependent=found)


def _classes(setup: Setup, loop: Loop) -> tuple[ClassRecord, ...]:
    """For every class: examples of it in all tasks, and how many the last model predicts correctly."""
    if loop.learner.generates:
        return ()  # predictions are positions of options, or texts
    counts: dict[int, tuple[int, int]] = {}
    for j in range(loop.matrix.tasks):
        labels_n = setup.stream[j].split(setup.config.evaluation.split).labels_n
        for label, predicted in zip(labels_n.tolist(), loop.last_predictions[str(j)].tolist(), strict=True):
            correct, total = counts.get(label, (0, 0))
            counts[label] = correct + (label == predicted), total + 1
    entries = [entry.class_correct for entry in loop.state.lineage]
    learnt = {c: sum((entry or {}).get(str(c), 0) for entry in entries) for c in counts}
    known = all(entry is not None for entry in entries)
    first_task = {label: task.name for task in reversed(setup.stream.tasks) for label in task.classes}
    return tuple(
        ClassRecord(
            name=setup.stream.class_names[c],
            task=first_task[c],
            correct=counts[c][0],
            total=counts[c][1],
            correct_when_learnt=learnt[c] if known else None,
        )
        for c in sorted(counts)
    )
