"""Guards: what could make a comparison worthless, looked for in every one and said at the top of its page.

- A test example among the training examples, exactly or nearly (`lamina.data.leaks`).
- Predictions that depend on the other examples of the batch: every run tries it at its end (`BatchRecord`).
- A backbone that has seen the data: what is known of its pre-training.

That nothing is chosen on test examples, and that class order, split and seed are pinned in the record, holds by construction.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from lamina import runs
from lamina.compare.rows import Run
from lamina.config import RunConfig
from lamina.config.schema import StreamConfig
from lamina.data.leaks import SMALLEST, Leaks, has_near, leaks
from lamina.files import replace_text
from lamina.record import Record
from lamina.report.text import count

SEEN = {
    "nano": "trained on 98,000 training images of Tiny ImageNet and on the scores of an ImageNet-1k model, so classes of "
    "everyday objects and animals are not new to it",
    "in21k": "ImageNet-21k has nearly all classes of CIFAR-100, ImageNet-R and ImageNet-A. CUB-200 shares images with "
    "ImageNet, test images too",
    "in1k": "ImageNet-1k has the classes of ImageNet-R and ImageNet-A. CUB-200 shares images with ImageNet, test images too",
    "dinov2": "LVD-142M was collected around ImageNet, CUB-200, Stanford Cars, Flowers, Pets and others, by similarity",
    "clip": "trained on pairs from the web, among which common test images occur",
}
"""What is known of the pre-training of a backbone, by a part of its name."""
MOST = 8
"""Most domains that a warning names."""


def look(config: RunConfig, folder: Path, say: Callable[[str], None] = lambda _: None) -> Leaks:
    """Returns the leaks of the data of a configuration, within the domains of its stream. They are kept in this folder, and
    looked for again where the data has changed, or near copies could not be looked for. say: is told before a search."""
    source = runs.open_source(config)
    domains = _domains(config.stream)
    part = (
        ""
        if domains is None
        else "-" + hashlib.blake2b(json.dumps(sorted(domains)).encode(), digest_size=6).hexdigest()
    )
    file = folder / f"{source.fingerprint}-{source.stamp}{part}-leaks.json"
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.get("searched", False) or ("searched" in found and not has_near(source)):
            return Leaks(**found | {"examples": tuple(map(tuple, found["examples"]))})
    say(f"looking for copies of test examples among the training examples of {source.name}, once")
    made = leaks(source, domains)
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, json.dumps(asdict(made)) + "\n", shared=True)
    return made


def _domains(stream: StreamConfig) -> Sequence[str] | None:
    """Returns the domains that a stream learns from; None for all."""
    if stream.scenario == "domain":
        return stream.domains
    if stream.scenario == "mixed" and stream.plan and all(task.domains for task in stream.plan):
        return [name for task in stream.plan for name in task.domains or ()]
    return None


def _words(name: str) -> list[str]:
    """Returns the words of the last part of a backbone's name."""
    return re.split(r"[^a-z0-9]+", name.lower().rstrip("/").rpartition("/")[2])


def warnings(stream: str, found: Leaks | None, rows: Mapping[str, Iterable[Run]]) -> Iterator[str]:
    """Yields why the figures of a stream may mislead. found: None where the data was not looked at."""
    if found is not None and found.exact + (found.near or 0):
        parts = [f"{found.exact:,} of {found.tests:,} test examples are also training examples"] * bool(found.exact)
        if found.near:
            others = (
                f"{found.near:,} more are" if found.exact else f"{found.near:,} of {found.tests:,} test examples are"
            )
            parts.append(f"{others} nearly the same as one")
        if not found.exact:
            parts[0] += " of the training examples"
        ours, theirs = found.examples[0]
        ranked = sorted(found.domains.items(), key=lambda one: -one[1])
        of = ", ".join(f"{number:,} in {name}" for name, number in ranked[:MOST])
        of += f" and {count(len(ranked) - MOST, 'more domain')}" if len(ranked) > MOST else ""
        more = f" By domain: {of}." if of else ""
        yield f"Leak in the data (stream {stream}): {', and '.join(parts)} (such as {ours}, like {theirs}).{more}"
    for name, of_row in rows.items():
        tried = [run.record.batch for run in of_row if run.record.batch is not None]
        if dependent := sum(one.dependent for one in tried):
            what = f"{dependent} of {sum(one.examples for one in tried)} predictions of `{name}` on {stream}"
            yield f"Leak through the batch: {what} have scores that depend on the other examples."


def facts(found: Mapping[str, Leaks | None], records: Iterable[Record]) -> list[tuple[str, str]]:
    """Returns what the guards found, as lines below a table."""
    records = list(records)
    said = []
    for stream, one in found.items():
        if one is None:
            continue
        why = f"images below {SMALLEST} pixels" if one.searched else "pip install 'lamina[guards]'"
        near = f"near copies not looked for ({why})" if one.near is None else f"{one.near:,} near"
        said.append(f"{stream}: {one.exact:,} exact, {near}, of {one.tests:,}")
    tried = [record.batch for record in records if record.batch is not None]
    lines = [("Test examples among the training examples", "; ".join(said))] * bool(said)
    if tried:
        examples, dependent = sum(one.examples for one in tried), sum(one.dependent for one in tried)
        lines.append(
            ("Predictions that depend on the batch", f"{dependent} of {examples} tried in {count(len(tried), 'run')}")
        )
    names = {record.backbone.name for record in records if record.backbone}
    seen = [f"{name}: {text}" for name in sorted(names) for part, text in SEEN.items() if part in _words(name)]
    return lines + ([("Pre-training", "; ".join(seen))] if seen else [])
