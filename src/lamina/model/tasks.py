"""Tasks: what is asked of `learn`, and how labelled data becomes examples with a model's class ids."""

import json
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lamina.backbones import Backbone
from lamina.config import RunConfig
from lamina.data.names import listed
from lamina.data.records import NothingToTrainOn
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

    def command(self, model: Path) -> str:
        """Returns the command that asks for the same task."""
        parts = ["lamina", "learn", str(model), self.source, "--name", self.name]
        for flag, values in (("--class", self.classes), ("--domain", self.domains)):
            parts += [part for value in values or () for part in (flag, value)]
        parts += [part for key, value in self.settings for part in ("--set", f"{key}={json.dumps(value)}")]
        parts += ["--probe", self.probe] if self.probe is not None else []
        return shlex.join(parts)


def new_task(
    request: Request, config: RunConfig, labelled: LabelledData, class_names: tuple[str, ...]
) -> tuple[Task, tuple[str, ...], str]:
    """Returns the task that is cut from the data, with class ids of the model; the names of all classes; and a fingerprint."""
    for role, given in (("class", request.classes), ("domain", request.domains)):
        twice = [name for name in given or () if (given or ()).count(name) > 1]
        if twice:
            raise ModelError(f"--{role} {twice[0]!r} is given more than once. Give every {role} once.")
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
        per_task=config.data.per_task,
        measured_per_task=config.evaluation.per_task,
    )
    theirs = _class_names(labelled, request.name)
    names = list(class_names)
    for label in classes:
        if theirs[label] not in names:
            names.append(theirs[label])
    ids = np.array([names.index(name) if name in names else -1 for name in theirs], np.int64)
    cut = stream[0]
    parts = {
        split: Examples(cut.split(split).table, cut.split(split).rows_n, ids[cut.split(split).labels_n])
        for split in SPLITS
    }
    task = Task(name=request.name, classes=tuple(ids[list(classes)].tolist()), domain=cut.domain, **parts)
    return task, tuple(names), stream.fingerprint


def _class_names(labelled: LabelledData, task: str) -> tuple[str, ...]:
    """Returns the names of the classes. Instructions without options or domains are one class, which is named after the
    task."""
    nameless = labelled.kind == "instructions" and labelled.class_names == labelled.domain_names == ("all",)
    return (task,) if nameless else labelled.class_names


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
    fingerprint: str
    """Of the data."""
    skipped: tuple[str, ...]
    """Damaged images that were left out."""
    class_names: tuple[str, ...]
    """By class id."""


def labelled_examples(
    config: RunConfig,
    backbone: Backbone,
    class_names: Sequence[str] | None,
    learnt_from: Collection[str | None],
    watch: Watch,
) -> Labelled:
    """Returns the test examples of a configuration's data. Where it has no test split of its own, all of it is used; but of
    data that a task was learnt from, only what was held out then.

    class_names: by class id; empty for a class that is not known; None for language models, which may be asked anything.
    learnt_from: fingerprints of the data of all tasks.
    """
    try:
        source = open_source(config)
    except NothingToTrainOn as error:
        source = error.source
    check_kind(config, source, backbone)
    labelled = decode(config, source, backbone, watch)
    class_names = labelled.class_names if class_names is None else class_names
    ids = np.array([class_names.index(name) if name in class_names else -1 for name in labelled.class_names], np.int64)
    labels_n = ids[labelled.labels_n]
    measured = (
        (2,) if (labelled.splits_n == 2).any() else (1,)
    )  # a source without training items may have validation items
    whole = source.held_out and labelled.fingerprint not in learnt_from
    rows_n = np.flatnonzero((labels_n >= 0) & (np.isin(labelled.splits_n, measured) | whole))
    used = {labelled.class_names[k] for k in np.unique(labelled.labels_n).tolist()}
    unknown = sorted(name for name in used if name not in class_names)
    examples = Examples(labelled.table, rows_n, labels_n[rows_n])
    return Labelled(examples, unknown, labelled.fingerprint, tuple(labelled.skipped), tuple(class_names))


def figures_of(found: Outcomes, class_names: Sequence[str]) -> Figures:
    """Returns what was measured, by class."""
    if not len(found.labels_n):
        return Figures()
    right_n = found.predicted_n == found.labels_n
    return Figures(
        accuracy=found.accuracy,
        calibration_error=None if found.confidence_n is None else calibration_error(found.confidence_n, right_n),
        rouge_l=found.rouge_l,
        classes={
            class_names[label]: ClassFigures(
                correct=int(right_n[found.labels_n == label].sum()), total=int((found.labels_n == label).sum())
            )
            for label in np.unique(found.labels_n).tolist()
        },
    )
