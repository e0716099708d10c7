"""The gate: what a new task has changed on the examples that earlier tasks are measured on, and whether that is accepted.

Shape letters: n examples.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lamina.config import GateConfig
from lamina.maths.metrics import Floats, calibration_error, negative_flips
from lamina.record import Part
from lamina.types import Ints


class Outcomes(NamedTuple):
    """Predictions of one version for labelled examples. Shapes (n,)."""

    labels_n: Ints
    predicted_n: Ints
    """Predicted class. Of a language model: the label where the completion is right, and -1 where it is wrong."""
    confidence_n: Floats | None
    """Probability of the predicted class; None for language models, whose probabilities are those of texts."""
    rouge_l: float | None = None
    """Mean ROUGE-L of generated texts; None where nothing was generated, or it cannot be measured."""

    def select(self, keep: Ints | NDArray[np.bool_]) -> "Outcomes":
        confidence_n = None if self.confidence_n is None else self.confidence_n[keep]
        return Outcomes(self.labels_n[keep], self.predicted_n[keep], confidence_n)

    @property
    def correct(self) -> int:
        return int((self.predicted_n == self.labels_n).sum())

    @property
    def accuracy(self) -> float:
        return self.correct / max(len(self.labels_n), 1)


class Probes(NamedTuple):
    """Outcomes of the versions before and after a task, for the probes of one earlier task."""

    name: str
    before: Outcomes
    after: Outcomes


class Change(Part):
    """Accuracy before and after, on the probes of an earlier task or class."""

    name: str
    examples: int
    before: float
    after: float
    negative_flips: float
    """Share of the probes that turned from correct to wrong."""

    @property
    def drop(self) -> float:
        return self.before - self.after


class GateResult(Part):
    """What a task has changed, and which limits it broke."""

    task: str
    limits: GateConfig
    tasks: tuple[Change, ...] = ()
    classes: tuple[Change, ...] = ()
    negative_flips: float | None = None
    """Over all probes; None where there are none."""
    calibration_before: float | None = None
    """None for language models too."""
    calibration_after: float | None = None
    milliseconds_before: float | None = None
    """Of one prediction. Of a language model: to rank the options of a prompt, or to the first token."""
    milliseconds_after: float | None = None
    new_accuracy: float | None = None
    unmeasured: tuple[str, ...] = ()
    """Earlier tasks without probes."""
    problems: tuple[str, ...] = ()
    """A sentence for every limit that was broken."""

    @property
    def accepted(self) -> bool:
        return not self.problems


def judged(
    task: str,
    probes: Sequence[Probes],
    class_names: Sequence[str],
    limits: GateConfig,
    *,
    new: Outcomes | None,
    milliseconds: tuple[float, float] | None,
    unmeasured: Sequence[str] = (),
) -> GateResult:
    """Returns the result of comparing two versions. new: of the held-out examples of the new task. milliseconds: of one
    prediction, before and after. unmeasured: earlier tasks without probes."""
    tasks = tuple(_change(part.name, part.before, part.after) for part in probes)
    whole = [_joined([part.before for part in probes]), _joined([part.after for part in probes])] if probes else []
    classes: list[Change] = []
    if whole:
        for label in np.unique(whole[0].labels_n).tolist():
            own_n = whole[0].labels_n == label
            classes.append(_change(class_names[label], *(side.select(own_n) for side in whole)))
    found = GateResult(
        task=task,
        limits=limits,
        tasks=tasks,
        classes=tuple(classes),
        negative_flips=negative_flips(whole[0].predicted_n, whole[1].predicted_n, whole[0].labels_n) if whole else None,
        calibration_before=_calibration(whole[0]) if whole else None,
        calibration_after=_calibration(whole[1]) if whole else None,
        milliseconds_before=milliseconds[0] if milliseconds else None,
        milliseconds_after=milliseconds[1] if milliseconds else None,
        new_accuracy=new.accuracy if new is not None and len(new.labels_n) else None,
        unmeasured=tuple(unmeasured),
    )
    return found.model_copy(update={"problems": tuple(_problems(found))})


def _problems(found: GateResult) -> list[str]:
    limits, told = found.limits, []
    for role, changes, limit in (("task", found.tasks, limits.task_drop), ("class", found.classes, limits.class_drop)):
        if limit is None:
            continue
        told += [
            f"{role} {change.name!r} falls from {change.before:.1%} to {change.after:.1%} "
            f"({round(change.drop * change.examples)} of {change.examples} probes); gate.{role}_drop allows a loss of "
            f"{limit:.1%}"
            for change in changes
            if change.drop > limit + 1e-12
        ]
    if limits.negative_flips is not None and (found.negative_flips or 0.0) > limits.negative_flips:
        told.append(
            f"{found.negative_flips:.1%} of the probes turn from correct to wrong; gate.negative_flips allows "
            f"{limits.negative_flips:.1%}"
        )
    if limits.calibration_error is not None and (found.calibration_after or 0.0) > limits.calibration_error:
        told.append(
            f"the expected calibration error is {found.calibration_after:.3f}; gate.calibration_error allows "
            f"{limits.calibration_error:.3f}"
        )
    if limits.new_accuracy is not None and found.new_accuracy is not None and found.new_accuracy < limits.new_accuracy:
        told.append(
            f"the new task reaches {found.new_accuracy:.1%} on its held-out examples; gate.new_accuracy asks for "
            f"{limits.new_accuracy:.1%}"
        )
    if limits.slowdown is not None and found.milliseconds_before and found.milliseconds_after:
        ratio = found.milliseconds_after / found.milliseconds_before
        if ratio > limits.slowdown:
            told.append(
                f"a prediction takes {ratio:.2f} times as long as before; gate.slowdown allows {limits.slowdown:.2f}"
            )
    return told


def _change(name: str, before: Outcomes, after: Outcomes) -> Change:
    return Change(
        name=name,
        examples=len(before.labels_n),
        before=before.accuracy,
        after=after.accuracy,
        negative_flips=negative_flips(before.predicted_n, after.predicted_n, before.labels_n),
    )


def _calibration(outcomes: Outcomes) -> float | None:
    if outcomes.confidence_n is None:
        return None
    return calibration_error(outcomes.confidence_n, outcomes.predicted_n == outcomes.labels_n)


def _joined(parts: Sequence[Outcomes]) -> Outcomes:
    confidence = [part.confidence_n for part in parts if part.confidence_n is not None]
    return Outcomes(
        np.concatenate([part.labels_n for part in parts]),
        np.concatenate([part.predicted_n for part in parts]),
        np.concatenate(confidence) if len(confidence) == len(parts) else None,
    )
