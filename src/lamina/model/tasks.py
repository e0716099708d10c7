"""Tasks: what is asked of `learn`, and how labelled data becomes examples with a model's class ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lamina.backbones import Backbone
from lamina.config import RunConfig
from lamina.data.names import listed
from lamina.data.streams import PlannedTask, make_stream
from lamina.errors import ModelError
from lamina.maths.metrics import calibration_error
from lamina.model.card import ClassFigures, Figures
from lamina.model.gate import Outcomes
from lamina.runs.setup import Watch, check_kind, decode, open_source
from lamina.types import SPLITS, Examples, LabelledData, Task


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of `learn`."""

    source: str
    name: str
    classes: tuple[str, ...] | None = None
    """Learn these classes of the data only."""
    domains: tuple[str, ...] | None = None
    """Learn these domains of the data only."""
    settings: tuple[tuple[str, Any], ...] = ()
    """Settings for this task only, by dotted key."""
    probe: str | None = None
    """Labelled data to measure earlier classes on, besides the probes that are kept."""
    force: bool = False
    discard: bool = False
    """Discard another task that was interrupted, or refused."""


def new_task(
    request: Request, config: RunConfig, labelled: LabelledData, class_names: tuple[str, ...]
) -> tuple[Task, tuple[str, ...], str]:
    """Returns the task that is cut from the data, with class ids of the model; the names of all classes; and a fingerprint."""
    domains: tuple[int, ...] | None = None
    if request.domains is not None:
        domains = tuple(_position(name, labelled.domain_names, "domain", labelled.name) for name in request.domains)
    inside = np.ones(len(labelled.labels_n), np.bool_) if domains is None else np.isin(labelled.domains_n, domains)
    if request.classes is not None:
        classes = tuple(_position(name, labelled.class_names, "class", labelled.name) for name in request.classes)
    else:
        classes = tuple(np.unique(labelled.labels_n[inside]).tolist())
    plan = [PlannedTask(name=request.name, classes=classes, domains=domains)]
    stream = make_stream(
        labelled,
        plan,
        "mixed",
        per_class=config.data.per_class,
        validation=config.stream.validation,
        measured_per_class=config.evaluation.per_class,
    )
    names = list(class_names)
    for label in classes:
        if labelled.class_names[label] not in names:
            names.append(labelled.class_names[label])
    ids = np.array([names.index(name) if name in names else -1 for name in labelled.class_names], np.int64)
    cut = stream[0]
    parts = {
        split: Examples(cut.split(split).table, cut.split(split).rows_n, ids[cut.split(split).labels_n])
        for split in SPLITS
    }
    task = Task(name=request.name, classes=tuple(ids[list(classes)].tolist()), domain=cut.domain, **parts)
    return task, tuple(names), stream.fingerprint


def _position(name: str, names: Sequence[str], role: str, where: str) -> int:
    if name not in names:
        raise ModelError(f"{where} has no {role} {name!r}. It has: {listed(names, 20)}.")
    return names.index(name)


class Labelled(NamedTuple):
    """Labelled data as a model knows it."""

    examples: Examples
    """Those of known classes, with the model's class ids."""
    unknown: list[str]
    """The names of the other classes."""
    skipped: tuple[str, ...]
    """Damaged images that were left out."""


def labelled_examples(config: RunConfig, backbone: Backbone, class_names: Sequence[str], watch: Watch) -> Labelled:
    """Returns the test examples of a configuration's data, or all of them where it has no test split of its own. class_names:
    by class id; empty for a class that is not known."""
    source = open_source(config)
    check_kind(config, source, backbone)
    labelled = decode(config, source, backbone, watch)
    ids = np.array([class_names.index(name) if name in class_names else -1 for name in labelled.class_names], np.int64)
    labels_n = ids[labelled.labels_n]
    rows_n = np.flatnonzero((labels_n >= 0) & ((labelled.splits_n == 2) | source.held_out))
    used = {labelled.class_names[k] for k in np.unique(labelled.labels_n).tolist()}
    unknown = sorted(name for name in used if name not in class_names)
    return Labelled(Examples(labelled.table, rows_n, labels_n[rows_n]), unknown, tuple(labelled.skipped))


def figures_of(found: Outcomes, class_names: Sequence[str]) -> Figures:
    """Returns what was measured, by class."""
    if not len(found.labels_n):
        return Figures()
    right_n = found.predicted_n == found.labels_n
    return Figures(
        accuracy=found.accuracy,
        calibration_error=calibration_error(found.confidence_n, right_n),
        classes={
            class_names[label]: ClassFigures(
                correct=int(right_n[found.labels_n == label].sum()), total=int((found.labels_n == label).sum())
            )
            for label in np.unique(found.labels_n).tolist()
        },
    )
