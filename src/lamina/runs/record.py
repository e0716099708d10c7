"""The record of a finished run, from its state."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from lamina import __version__
from lamina.engine import device
from lamina.engine.loop import Loop
from lamina.maths import metrics
from lamina.methods.base import describe
from lamina.runs.environment import now, peak_memory_mb
from lamina.runs.setup import Setup

FORMAT = 2


def record_of(setup: Setup, loop: Loop) -> dict[str, Any]:
    """What `results.json` holds."""
    config, stream, learner, state = setup.config, setup.stream, loop.learner, loop.state
    seconds = {phase: round(value, 3) for phase, value in state.clock.seconds.items()}
    total, train = sum(seconds.values()), seconds.get("train", 0.0)
    lineage = []
    for index, entry in enumerate(state.lineage):
        of_task = [loss.value for loss in state.losses if loss.task == index]
        lineage.append(
            dataclasses.asdict(entry)
            | {
                "classes": [stream.class_names[c] for c in stream[index].classes],
                "loss_first": of_task[0] if of_task else None,
                "loss_last": of_task[-1] if of_task else None,
                "seconds": state.clock.train_seconds.get(str(index)),
                "finished": state.clock.finished.get(str(index)),
                "accuracy_at_end": float(state.matrix.accuracy_ij[-1, index]),
            }
        )
    shares = [
        sum(right) / sum(int(n) for n in state.matrix.total_ij[i, : i + 1])
        for i, right in enumerate(state.task_inference)
    ]
    figures = metrics.summary(state.matrix) | {
        "task_aware_accuracy": metrics.final_accuracy(state.task_aware),
        "task_inference_accuracy": shares[-1],
    }
    if config.evaluation.unseen:
        guess = 1 / len({label for task in stream for label in task.classes})
        figures["forward_transfer"] = metrics.forward_transfer(state.matrix, np.full(len(stream), guess))
    return {
        "format": FORMAT,
        "name": config.method["name"] + ("-joint" if config.stream.joint else ""),
        "created": now(),
        "method": describe(setup.method),
        "config": config.model_dump(mode="json"),
        "stream": {
            "scenario": {"mixed": "mixed"}.get(stream.scenario, f"{stream.scenario}-incremental"),
            "fingerprint": stream.fingerprint,
            "data": stream.data_name,
            "kind": stream.kind,
            "tasks": [
                {
                    "name": task.name,
                    "classes": [stream.class_names[c] for c in task.classes],
                    "domain": task.domain,
                    **{split: len(task.split(split)) for split in ("train", "val", "test")},
                }
                for task in stream
            ],
        },
        "source": setup.source,
        "backbone": {
            "name": Path(setup.backbone.name).name,
            "hash": setup.backbone.hash,
            "parameters": setup.backbone_parameters,
            "kind": setup.backbone.kind,
        },
        "machine": setup.environment.to_json(),
        "code": {"version": __version__, "commit": setup.environment.commit},
        "matrix": state.matrix.as_dict(),
        "task_aware": state.task_aware.as_dict(),
        "task_inference_accuracy": shares,
        "metrics": figures,
        "classes": _class_counts(setup, loop),
        "cost": {
            "seconds": seconds | {"total": round(total, 3)},
            "steps": sum(entry.steps for entry in state.lineage),
            "train_examples_per_second": state.clock.examples / train if state.clock.examples and train else None,
            "parallel_seconds": None
            if state.clock.parallel_seconds is None
            else round(state.clock.parallel_seconds, 3),
            "outside_training_share": 1 - train / total if total else None,
            "peak_memory_mb": peak_memory_mb(),
            "peak_gpu_memory_mb": device.peak_memory_mb(setup.device),
            "trainable_parameters": state.lineage[-1].trainable_parameters,
            "stored_parameters": learner.stored_parameters(),
            "memory_bytes": loop.method.memory_bytes + loop.consolidation.memory_bytes,
        },
        "lineage": lineage,
        "losses": [
            [sum(entry.steps for entry in state.lineage[: loss.task]) + loss.step, loss.value] for loss in state.losses
        ],
        "skipped": list(setup.data.skipped),
        "notes": list(state.notes),
    }


def _class_counts(setup: Setup, loop: Loop) -> list[dict[str, Any]]:
    """For every class: examples of it in all tasks, and how many the last model answered right."""
    counts: dict[int, list[int]] = {}
    for j in range(loop.matrix.tasks):
        labels = setup.stream[j].split(setup.config.evaluation.split).labels_n
        for label, answer in zip(labels.tolist(), loop.last_predictions[str(j)].tolist(), strict=True):
            right, total = counts.get(label, [0, 0])
            counts[label] = [right + (label == answer), total + 1]
    first_task = {label: task.name for task in reversed(setup.stream.tasks) for label in task.classes}
    return [
        {"name": setup.stream.class_names[c], "task": first_task[c], "correct": counts[c][0], "total": counts[c][1]}
        for c in sorted(counts)
    ]
