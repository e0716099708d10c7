"""A finished run as the first version of a model."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lamina import record
from lamina.config import ModelConfig
from lamina.engine import checkpoint
from lamina.errors import CheckpointError, ModelError
from lamina.model.card import Card, ClassFigures, Figures, LearntTask
from lamina.model.settings import load_model_config, refuse_fixed
from lamina.runs.directory import begun, read_record


class RunVersion(NamedTuple):
    """What a finished run comes to as a version. The folder of its card is still to be named."""

    config: ModelConfig
    card: Card
    documents: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    task_count: int
    backbone: str
    """Hash of the weights that it was learnt with."""


def version_of_run(run: Path, settings: dict[str, Any]) -> RunVersion:
    """Returns a finished run as a version. settings: of the model, by dotted key. Raises RunError where it is not finished, and
    ModelError where its newest checkpoint is damaged."""
    found, start = read_record(run), begun(run)
    loaded = checkpoint.load_newest(run / "checkpoints")
    if loaded is None or loaded.damaged:
        told = "; ".join(loaded.damaged.values()) if loaded else f"{run} has no checkpoint"
        raise ModelError(f"{told}. Run it again, or restore the checkpoint from a backup.")
    if loaded.documents["state"]["position"]["phase"] != "done":
        raise CheckpointError(
            f"{run}: the newest checkpoint is not that of the finished run. `lamina resume {run}` ends it."
        )
    given = start.config.model_dump(mode="json")
    for section, keys in {"stream": None, "evaluation": ("split", "unseen"), "jobs": None}.items():
        if keys is None:
            given.pop(section)
        else:
            given[section] = {key: value for key, value in given[section].items() if key not in keys}
    given["precision"] = start.environment.precision
    plain = load_model_config(None, list(given.items()))
    config = load_model_config(None, list(settings.items()), base=plain)
    refuse_fixed(plain, config, run)
    if found.source is None:
        raise ModelError(
            f"{run / record.FILE} does not say which classes the data has. `lamina resume {run}` writes it anew."
        )
    names, known = tuple(found.source.classes), set[str]()
    tasks = []
    for number, task in enumerate(found.stream.tasks):
        counts = {"train": task.train or 0, "val": task.val or 0, "test": task.test or 0}
        new = tuple(name for name in task.classes if name not in known)
        known |= set(new)
        tasks.append(
            LearntTask(
                name=task.name,
                classes=task.classes,
                new_classes=new,
                domains=(task.domain,) if task.domain else (),
                examples=counts,
                accuracy=float(found.matrix.accuracy_ij[number, number]),
            )
        )
    card = Card(
        folder="0001-run",
        version=1,
        created=found.created or start.environment.started,
        tasks=tuple(tasks),
        class_names=names,
        data=start.config.data.source,
        fingerprint=found.stream.fingerprint,
        source=found.source,
        figures=Figures(
            accuracy=found.metrics.final_accuracy,
            classes={one.name: ClassFigures(correct=one.correct, total=one.total) for one in found.classes},
        ),
        seconds={phase: value for phase, value in found.cost.seconds.items() if value is not None},
        steps=found.cost.steps or 0,
        trainable_parameters=found.cost.trainable_parameters,
        stored_parameters=found.cost.stored_parameters,
        machine=found.machine,
        code=found.code,
    )
    tensors = {**loaded.tensors, "predictions": {}, "optimizer": {}}
    backbone = loaded.documents["state"]["identity"]["backbone"]
    return RunVersion(config, card, loaded.documents, tensors, len(found.stream.tasks), backbone)
