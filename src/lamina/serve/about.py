"""What the server says about the model: its tasks, its card, and its history. Folders of this machine are left out."""

from pathlib import PurePath
from typing import Any

from lamina.model import Card, GateResult, LanguagePredictor, Predictor
from lamina.model.store import EVENTS
from lamina.serve.versions import Refused, Version, Versions

MOST_EVENTS = 200
"""Newest events of the history that are shown."""
TOLD = ("time", "event", "task", "tasks", "version", "forced", "problems")
"""Of an event. The rest may name folders of this machine."""


def tasks(versions: Versions) -> dict[str, Any]:
    """Returns the tasks that the served version has learnt, with their figures and how those changed; and the history. They are
    put together once for a version and a history."""
    try:
        found = (versions.path / EVENTS).stat()
        told: object = versions.current, found.st_ino, found.st_size, found.st_mtime_ns
    except OSError:
        told = versions.current
    if versions.told[0] != told:
        versions.told = told, _tasks(versions)
    return versions.told[1]


def _tasks(versions: Versions) -> dict[str, Any]:
    version = versions.current
    lineage = version.lineage
    curves = accuracies(lineage)
    found = []
    for card in lineage:
        for task in card.tasks:
            own = len(card.tasks) == 1
            found.append(
                {
                    "name": task.name,
                    "version": card.version,
                    "created": card.created,
                    "classes": list(task.classes),
                    "new_classes": list(task.new_classes),
                    "domains": list(task.domains),
                    "examples": task.examples,
                    "accuracy_when_learnt": card.figures.accuracy if own else None,
                    "accuracy": curves.get(task.name, []),
                    "forced": card.forced,
                    "kept_examples": {what: part.examples for what, part in card.kept.items()} if own else {},
                }
            )
    return {
        "version": version.number,
        "kind": version.predictor.kind,
        "classes": list(labels(version)),
        "tasks": found,
        "history": history(versions),
    }


def labels(version: Version) -> tuple[str, ...]:
    """Returns the classes that a version knows; a language model has none."""
    return version.predictor.labels if isinstance(version.predictor, Predictor) else ()


def accuracies(lineage: list[Card]) -> dict[str, list[dict[str, Any]]]:
    """Returns, for each task, its accuracy right after it was learnt and after each later task.

    They are those on the kept probes; for the newest task, and one without probes, that on all of its held-out examples.
    """
    curves: dict[str, list[dict[str, Any]]] = {}
    for card in lineage:
        for change in card.gate.tasks if card.gate is not None else ():
            points = curves.get(change.name)
            if points is None:
                continue  # labelled data that was given as a probe, and is no task
            if len(points) == 1 and not points[0]["probes"]:
                points[0] = {**points[0], "accuracy": change.before, "examples": change.examples, "probes": True}
            points.append(_point(card, change.after, change.examples, probes=True))
        if card.figures.accuracy is not None and len(card.tasks) == 1:
            total = sum(figures.total for figures in card.figures.classes.values())
            curves[card.name] = [_point(card, card.figures.accuracy, total, probes=False)]
    return curves


def _point(card: Card, accuracy: float, examples: int, *, probes: bool) -> dict[str, Any]:
    return {"after": card.name, "accuracy": accuracy, "examples": examples, "probes": probes}


def forgetting(lineage: list[Card]) -> float | None:
    """Returns the mean over earlier tasks of the best accuracy minus the newest one; None where nothing was measured."""
    losses = [
        max(point["accuracy"] for point in points) - points[-1]["accuracy"]
        for points in accuracies(lineage).values()
        if len(points) > 1
    ]
    return sum(losses) / len(losses) if losses else None


def history(versions: Versions) -> list[dict[str, Any]]:
    """Returns what happened to the model, the oldest first."""
    try:
        events = versions.store.events()
    except (OSError, ValueError):
        return []
    return [{key: event[key] for key in TOLD if key in event} for event in events[-MOST_EVENTS:]]


def card(versions: Versions) -> dict[str, Any]:
    """Returns the card of the served version."""
    version = versions.current
    facts, newest = version.facts, version.predictor.card
    predictor = version.predictor
    asked = {"chat_template": predictor.reader.chats} if isinstance(predictor, LanguagePredictor) else {}
    return {
        "name": versions.path.resolve().name,
        "kind": facts.kind,
        "version": version.number,
        "task": newest.name,
        "created": newest.created,
        "served_since": version.since,
        "checked": version.checked,
        "refused": refused(versions.refused),
        "versions": list(facts.versions),
        "tasks": sum(len(one.tasks) for one in version.lineage),
        "classes": len(labels(version)),
        "base": {
            "name": PurePath(facts.base.name).name,
            "hash": facts.base.hash,
            "parameters": facts.base.parameters,
            "licence": facts.base.licence,
        },
        "method": facts.config.method["name"],
        "precision": facts.config.precision,
        "stored_parameters": newest.stored_parameters,
        "accuracy": newest.figures.accuracy,
        "calibration_error": newest.figures.calibration_error,
        "forgetting": forgetting(version.lineage),
        "forced": newest.forced,
        "gate": gate(newest.gate),
        **asked,
    }


def gate(found: GateResult | None) -> dict[str, Any] | None:
    """Returns what the gate has found, without limits that are not set."""
    if found is None:
        return None
    content: dict[str, Any] = found.model_dump(mode="json")
    return {**content, "accepted": found.accepted}


def refused(found: Refused | None) -> dict[str, Any] | None:
    return None if found is None else {"version": found.version, "reason": found.reason}


def predictions_of(version: Version, names: list[str | None] | None, predictions: list[Any]) -> dict[str, Any]:
    """Returns the body of a response to /predict. names: of the uploaded files; None for texts."""
    found = []
    for number, prediction in enumerate(predictions):
        best = prediction.guesses[0]
        entry: dict[str, Any] = {} if names is None else {"name": names[number]}
        entry |= {"class": best.label, "probability": best.probability, "task": best.task}
        entry["top"] = [{"class": g.label, "probability": g.probability, "task": g.task} for g in prediction.guesses]
        found.append(entry)
    return {"version": version.number, "predictions": found}
