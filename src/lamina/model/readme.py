"""The model card: README.md in the directory of a model, in the Hub's metadata format, written again after every change."""

import json
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lamina.data.names import listed, shown
from lamina.files import replace_text
from lamina.methods import METHODS
from lamina.model.card import Card, Facts
from lamina.model.store import README, Store

PIPELINE = {"image": "image-classification", "text": "text-classification", "language": "text-generation"}
KINDS = {"image": "An image classifier", "text": "A text classifier", "language": "A language model"}
_MOST = 30
"""Classes that are named one by one."""


def write(store: Store) -> None:
    """Write the card anew."""
    facts = store.facts()
    replace_text(store.path / README, text(store.path.resolve().name, facts, store.lineage(facts.head)))


def text(name: str, facts: Facts, cards: Sequence[Card]) -> str:
    """Returns the model card of a model of this name, in Markdown."""
    method = METHODS[facts.config.method["name"]]
    classes = list(dict.fromkeys(label for card in cards for task in card.tasks for label in task.classes))
    language = facts.kind == "language"
    knows = f"{sum(len(card.tasks) for card in cards)} tasks" if language else f"{len(classes)} classes"
    parts = [
        _metadata(name, facts, cards),
        f"# {_plain(name)}\n",
        f"{KINDS[facts.kind]} that learns task after task: version {facts.version}, "
        f"{knows}. Pre-trained weights are frozen; `{method.name}` ({method.paper.title}, {method.paper.venue}) "
        "adds low-rank adapters.\n",
        "## What it knows\n",
        (_instructions(cards) if language else _tasks(cards)) if cards else "Nothing yet.\n",
    ]
    if classes and not language:
        parts.append(f"Classes: {_plain(listed(classes, _MOST))}\n")
    if len(cards) > 1:
        parts += ["## What was forgotten\n", _forgetting(cards)]
    parts += ["## Data and licence\n", _data(facts, cards), "## Use\n", _use(name, facts)]
    return "\n".join(parts)


def curves(cards: Sequence[Card]) -> Mapping[str, list[tuple[str, float]]]:
    """Returns, for every task with probes, its accuracy on them: before the next task, and after each later one, with the name
    of the task that was learnt last."""
    found: dict[str, list[tuple[str, float]]] = {}
    for previous, card in pairwise(cards):
        for change in card.gate.tasks if card.gate else ():
            found.setdefault(change.name, [(previous.name, change.before)]).append((card.name, change.after))
    return found


def _metadata(name: str, facts: Facts, cards: Sequence[Card]) -> str:
    """Returns the block that the Hub reads. JSON is YAML, so values are quoted by it."""
    fields = {
        "library_name": "lamina",
        "pipeline_tag": PIPELINE[facts.kind],
        "tags": ["continual-learning", "lora", facts.config.method["name"]],
        "base_model": facts.base.name,
        "license": facts.base.licence or "unknown",
    }
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
    accuracy = cards[-1].figures.accuracy if cards else None
    if accuracy is not None:
        result = {
            "task": {"type": PIPELINE[facts.kind]},
            "dataset": {"name": cards[-1].name, "type": cards[-1].name},
            "metrics": [{"type": "accuracy", "value": round(accuracy, 4)}],
        }
        lines.append(f"model-index: {json.dumps([{'name': name, 'results': [result]}], ensure_ascii=False)}")
    return "---\n" + "\n".join(lines) + "\n---\n"


def _tasks(cards: Sequence[Card]) -> str:
    lines = [
        "| task | learnt | classes | new | training examples | accuracy when learnt | calibration error | gate |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for card in cards:
        for task in card.tasks:
            gate = "forced" if card.forced else "imported" if card.imported_from else "passed" if card.gate else "-"
            lines.append(
                f"| {_plain(task.name)} | {card.created[:10]} | {len(task.classes)} | {len(task.new_classes)} | "
                f"{task.examples.get('train', 0)} | {_share(task.accuracy)} | "
                f"{_number(card.figures.calibration_error)} | {gate} |"
            )
    lines.append("\nAccuracy when learnt: on held-out examples of the task, among all classes known then.\n")
    return "\n".join(lines)


def _instructions(cards: Sequence[Card]) -> str:
    lines = ["| task | learnt | training examples | accuracy when learnt | gate |", "|---|---|---:|---:|---|"]
    for card in cards:
        for task in card.tasks:
            gate = "forced" if card.forced else "imported" if card.imported_from else "passed" if card.gate else "-"
            lines.append(
                f"| {_plain(task.name)} | {card.created[:10]} | {task.examples.get('train', 0)} | {_share(task.accuracy)} | "
                f"{gate} |"
            )
    lines.append(
        "\nAccuracy when learnt: share of held-out examples with the right option, or with an exact match. "
        "Calibration does not apply to a language model.\n"
    )
    return "\n".join(lines)


def _forgetting(cards: Sequence[Card]) -> str:
    found = curves(cards)
    if not found:
        return "Not measured: the model keeps no probes.\n"
    lines = ["| task | before the next task | now | change |", "|---|---:|---:|---:|"]
    for name, points in found.items():
        first, last = points[0][1], points[-1][1]
        lines.append(f"| {_plain(name)} | {first:.1%} | {last:.1%} | {100 * (last - first):+.1f} points |")
    lines.append(
        "\nMeasured on held-out examples that the model keeps of each task (probes), or on data given for it.\n"
    )
    return "\n".join(lines)


def _data(facts: Facts, cards: Sequence[Card]) -> str:
    lines = [
        f"- backbone: `{facts.base.name}`, {facts.base.parameters:,} parameters, sha256 `{facts.base.hash}`, licence: "
        f"{facts.base.licence or 'its files do not say'}"
    ]
    for card in cards:
        source = Path(card.data).name if card.data else "unknown source"
        lines.append(f"- {_plain(card.name)}: {_plain(source)}, fingerprint `{card.fingerprint}`")
    kept = {
        what: sum(card.kept[what].examples for card in cards if what in card.kept) for what in ("probes", "rehearsal")
    }
    held = ", ".join(f"{count} {what}" for what, count in kept.items() if count)
    lines.append(f"- examples kept when their tasks were learnt: {held or 'none'}")
    return "\n".join(lines) + "\n"


def _use(name: str, facts: Facts) -> str:
    quoted, python_name = shlex.quote(name), json.dumps(name, ensure_ascii=False)
    if facts.kind == "language":
        chat = ", chat=True" if facts.config.data.form == "chat" else ""
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": "..."}]} if chat else {"prompt": "..."}
        body = shlex.quote(json.dumps({"model": name, **asked}, ensure_ascii=False))
        return (
            f"```sh\nlamina predict {quoted} '...'{' --chat' * bool(chat)}\n"
            f"lamina serve {quoted}     # an OpenAI-compatible API\n"
            f"curl --json {body} \\\n"
            f"  http://127.0.0.1:8000/v1/{'chat/' * bool(chat)}completions\n```\n\n```python\nfrom lamina import Model\n\n"
            f'(completion,) = Model({python_name}).complete("..."{chat})\nprint(completion.text)\n```\n'
        )
    given = "photo.jpg" if facts.kind == "image" else '--text "..."'
    python = '"photo.jpg"' if facts.kind == "image" else '["..."]'
    return (
        f"```sh\nlamina predict {quoted} {given}\nlamina serve {quoted}\n```\n\n```python\nfrom lamina import Model\n\n"
        f"print(Model({python_name}).predict({python}))\n```\n"
    )


def _plain(text: str) -> str:
    """Returns text that Markdown and HTML show as it is."""
    told = shown(text, len(text))
    for sign in "\\`*_[]<>|#":
        told = told.replace(sign, f"\\{sign}" if sign not in "<>" else {"<": "&lt;", ">": "&gt;"}[sign])
    return told


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
