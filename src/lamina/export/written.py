"""How an export is written: into a new folder, compared with the model on real inputs, and only then under its name.

Shape letters: b batch, j outputs of the head.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamina import __version__
from lamina.errors import ModelError
from lamina.export.opened import Opened
from lamina.files import fsync, replace_text

TOLERANCE = 1e-3
"""Largest difference of two scores, in units of the spread of all scores (their standard deviation)."""
FACTS = "export.json"


@dataclass(frozen=True)
class Difference:
    """Scores computed from the written files, compared with those of the model in float32."""

    by: str
    """What has computed them."""
    inputs: str
    largest: float
    """Largest absolute difference of two scores."""
    spread: float
    """Standard deviation of the scores."""
    agreement: float
    """Share of inputs with the same predicted class."""

    def __str__(self) -> str:
        return (
            f"{self.by}: largest difference {self.largest:.1e} (scores spread by {self.spread:.2g}), same class for "
            f"{self.agreement:.1%} of {self.inputs}"
        )


@dataclass(frozen=True)
class Exported:
    """An export that was written and compared."""

    path: Path
    format: str
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    """What a user should know."""
    code: str
    """A few lines that use it."""


@dataclass
class Draft:
    """An export on its way."""

    out: Path
    """Where it will lie."""
    folder: Path
    """Where it lies now."""
    format: str
    opened: Opened
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    code: str = ""

    def compare(
        self,
        by: str,
        reference: Sequence[Tensor],
        found: Sequence[Tensor],
        labels: Sequence[str],
        inputs: str | None = None,
    ) -> None:
        """Compare scores (b, j) of every batch. labels: the class of every output. inputs: what they are, if they are not those
        of the model as opened. Raises ModelError where the scores differ by more than TOLERANCE, or are not finite."""
        wanted_nj, got_nj = torch.cat([part.double() for part in reference]), torch.cat([p.double() for p in found])
        if wanted_nj.shape != got_nj.shape:
            raise ModelError(
                f"{by} computes scores of shape {tuple(got_nj.shape)}, and the model {tuple(wanted_nj.shape)}."
            )
        both = torch.isfinite(wanted_nj)
        if not torch.equal(both, torch.isfinite(got_nj)):
            raise ModelError(f"{by} computes scores that are not finite. Nothing was written.")
        largest = float((wanted_nj - got_nj)[both].abs().max())
        spread = float(wanted_nj[both].std(correction=0))
        name = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        class_j = torch.tensor([name[label] for label in labels])
        same = class_j[wanted_nj.argmax(1)] == class_j[got_nj.argmax(1)]
        one = Difference(by, inputs or self.opened.origin, largest, spread, float(same.double().mean()))
        if not largest <= TOLERANCE * max(spread, 1e-6):
            raise ModelError(
                f"{one}. That is more than {TOLERANCE:g} of their spread, so nothing was written. The installed versions of "
                f"the libraries may compute this architecture differently; `--format onnx` depends on none of them."
            )
        self.differences.append(one)


@contextmanager
def drafted(out: Path, format_: str, opened: Opened) -> Iterator[Draft]:
    """Yields a draft in a temporary folder. When the context ends without an error, it gets its name; else it is removed.

    Raises ModelError where something is at `out` already, or it cannot be written.
    """
    refuse_existing(out)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        draft = Draft(out, temporary, format_, opened)
        if opened.as_run is not None:
            draft.notes.append(
                f"The export is of float32. The model runs in bf16 here, and names the same class for {opened.as_run:.1%} of "
                f"{opened.origin}."
            )
        yield draft
        write_json(temporary / FACTS, _facts(draft))
        replace_text(temporary / "README.md", _readme(draft))
        for path in sorted(temporary.rglob("*")):
            fsync(path)
        os.rename(temporary, out)
        fsync(out.parent)
    except OSError as error:
        raise ModelError(f"{out} cannot be written: {error}. Make room or choose another path.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def finished(draft: Draft) -> Exported:
    """Returns what a draft will be when it has its name."""
    return Exported(draft.out, draft.format, tuple(draft.differences), tuple(draft.notes), draft.code)


def refuse_existing(out: Path) -> None:
    """Raises ModelError where something is at this path."""
    if out.exists() or out.is_symlink():
        raise ModelError(f"{out} exists already. Choose another path, or remove it.")


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _facts(draft: Draft) -> dict[str, Any]:
    opened = draft.opened
    return {
        "format": draft.format,
        "lamina": __version__,
        "model_version": opened.card.version,
        "method": opened.facts.config.method["name"],
        "base": {"name": opened.facts.base.name, "sha256": opened.facts.base.hash},
        "tasks": list(dict.fromkeys(output.task for output in opened.learner.outputs)),
        "labels": list(opened.predictor.labels),
        **draft.facts,
        "differences": [asdict(one) for one in draft.differences],
        "notes": draft.notes,
    }


def _readme(draft: Draft) -> str:
    opened = draft.opened
    lines = [
        f"# {draft.out.name}",
        "",
        f"Exported by lamina {__version__} as `{draft.format}` from version {opened.card.version} of a model: method "
        f"`{opened.facts.config.method['name']}`, base `{opened.facts.base.name}`, {len(opened.predictor.labels)} classes.",
        "",
        "```python" if draft.code and not draft.code.startswith("python ") else "```",
        draft.code,
        "```",
        "",
        "Compared with the model, in float32, when it was written:",
        "",
        *(f"- {one}" for one in draft.differences),
    ]
    if draft.notes:
        lines += ["", "Notes:", "", *(f"- {note}" for note in draft.notes)]
    return "\n".join(lines) + "\n"
