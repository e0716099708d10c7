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
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from lamina import __version__
from lamina.errors import ModelError
from lamina.files import fsync, replace_text

TOLERANCE = 1e-3
"""Largest difference of two scores, in units of how far the scores of an output spread over the inputs (standard deviation)."""
ROUNDING = 1e-5
"""And on top, of the score itself: a network in float32 is computed to no more than that."""
FACTS = "export.json"


class Subject(Protocol):
    """What is exported."""

    @property
    def origin(self) -> str:
        """The inputs that an export is compared on, in words."""
        ...

    @property
    def sentence(self) -> str:
        """What it is, for the README: `version 3 of a model: method ...`."""
        ...

    @property
    def facts_to_write(self) -> dict[str, Any]:
        """What `export.json` says of it."""
        ...

    @property
    def first_note(self) -> str | None:
        """What a user should know about the precision, before all else."""
        ...


S = TypeVar("S", bound=Subject)


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
    """Share of inputs with the same predicted class, or the same generated tokens."""
    same: str = "class"
    """What is the same for them."""

    def __str__(self) -> str:
        return (
            f"{self.by}: largest difference {self.largest:.1e} (scores spread by {self.spread:.2g}), same {self.same} for "
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
class Draft(Generic[S]):
    """An export on its way."""

    out: Path
    """Where it will lie."""
    folder: Path
    """Where it lies now."""
    format: str
    opened: S
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    code: str = ""
    otherwise: str = "`--format onnx` depends on none of them."
    """What to do where the installed libraries compute something else."""

    def compare(
        self,
        by: str,
        reference: Sequence[Tensor],
        found: Sequence[Tensor],
        labels: Sequence[str],
        inputs: str | None = None,
        written: tuple[float, str] | None = None,
    ) -> None:
        """Compare scores (b, j) of every batch. labels: the class of every output. inputs: what they are, if they are not those
        of the model as opened. Minus infinity says that an output is not used. written: the share of inputs for which something
        else than the predicted class is the same, and what. Raises ModelError where a score differs by more than TOLERANCE, is
        NaN or infinite, or the predicted class differs though the model's scores are clearly apart."""
        wanted_nj, got_nj = torch.cat([part.double() for part in reference]), torch.cat([p.double() for p in found])
        if wanted_nj.shape != got_nj.shape:
            raise ModelError(
                f"{by} computes scores of shape {tuple(got_nj.shape)}, and the model {tuple(wanted_nj.shape)}, so nothing was "
                f"written. The installed versions of the libraries may compute this architecture differently; try another "
                f"--format."
            )
        used = wanted_nj > -torch.inf
        for whose, scores_nj in (("the model", wanted_nj), (by, got_nj)):
            wrong = int((~(scores_nj < torch.inf)).sum())
            if wrong:
                raise ModelError(
                    f"{whose} computes {wrong} of {scores_nj.numel()} scores as NaN or infinity, so nothing was written. Go "
                    f"back with `lamina rollback`, or give other --inputs."
                )
        if not torch.equal(used, got_nj > -torch.inf):
            wrong = int((used != (got_nj > -torch.inf)).sum())
            raise ModelError(
                f"{by} uses other outputs than the model for an input ({wrong} of {used.numel()} scores), so nothing was "
                f"written. `--format onnx` writes models without a router."
            )
        zero = wanted_nj.new_zeros(())
        difference_nj = torch.where(used, wanted_nj - got_nj, zero).abs()
        limit_nj = torch.where(used, TOLERANCE * spread_of(wanted_nj, used) + ROUNDING * wanted_nj.abs(), zero)
        name = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        class_j = torch.tensor([name[label] for label in labels])
        best_n = wanted_nj.argmax(1, keepdim=True)
        same = class_j[best_n[:, 0]] == class_j[got_nj.argmax(1)]
        others_nj = wanted_nj.masked_fill(class_j == class_j[best_n], -torch.inf)
        clear = wanted_nj.amax(1) - others_nj.amax(1) > limit_nj.amax(1)
        spread = float(wanted_nj[used].std(correction=0))
        agreement, what = written or (float(same.double().mean()), "class")
        one = Difference(by, inputs or self.opened.origin, float(difference_nj.max()), spread, agreement, what)
        if bool((difference_nj > limit_nj).any()) or bool((~same & clear).any()):
            row, column = divmod(int((difference_nj - limit_nj).argmax()), len(labels))
            raise ModelError(
                f"{one}. A score of {labels[column]!r} differs by {float(difference_nj[row, column]):.1e}, and "
                f"{float(limit_nj[row, column]):.1e} is allowed, so nothing was written. The installed versions of the "
                f"libraries may compute this architecture differently; {self.otherwise}"
            )
        self.differences.append(one)


def spread_of(scores_nj: Tensor, used: Tensor) -> float:
    """Returns how far the scores of an output spread over the inputs. An output's own mean, its bias among it, has no part in
    that. Where there is one input only, it is the spread over the outputs."""
    kept_nj = torch.where(used, scores_nj, scores_nj.new_zeros(()))
    along = 0 if len(scores_nj) > 1 else 1
    mean_nj = kept_nj.sum(along, keepdim=True) / used.sum(along, keepdim=True).clamp(min=1)
    return float((kept_nj - mean_nj)[used].square().mean().sqrt())


@contextmanager
def drafted(out: Path, format_: str, opened: S) -> Iterator[Draft[S]]:
    """Yields a draft in a temporary folder. When the context ends without an error, it gets its name; else it is removed. The
    next export to the same place removes what a crash has left.

    Raises ModelError where it cannot be written.
    """
    place = out.absolute()
    temporary = place.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        draft = Draft(out, temporary, format_, opened)
        if opened.first_note is not None:
            draft.notes.append(opened.first_note)
        yield draft
        write_json(temporary / FACTS, _facts(draft))
        replace_text(temporary / "README.md", _readme(draft))
        readable = (temporary / FACTS).stat().st_mode
        for path in sorted(temporary.rglob("*")):
            if path.suffix == ".safetensors":  # safetensors makes private files
                path.chmod(readable)
            fsync(path)
        os.rename(temporary, place)
        fsync(place.parent)
    except OSError as error:
        if error.errno is None:  # of a library, about something else
            raise ModelError(f"the export to {out} failed: {told(error)}. Nothing was written.") from error
        raise ModelError(f"{out} cannot be written: {error}. Make room or choose another path.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def finished(draft: Draft[S]) -> Exported:
    """Returns what a draft will be when it has its name."""
    return Exported(draft.out, draft.format, tuple(draft.differences), tuple(draft.notes), draft.code)


def refuse_existing(out: Path) -> None:
    """Raises ModelError where something is at this path."""
    if out.exists() or out.is_symlink():
        raise ModelError(f"{out} exists already. Choose another path, or remove it.")


def told(error: BaseException) -> str:
    """Returns type and message of another library's error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _facts(draft: Draft[S]) -> dict[str, Any]:
    return {
        "format": draft.format,
        "lamina": __version__,
        **draft.opened.facts_to_write,
        **draft.facts,
        "differences": [asdict(one) for one in draft.differences],
        "notes": draft.notes,
    }


def _readme(draft: Draft[S]) -> str:
    lines = [
        f"# {draft.out.name}",
        "",
        f"Exported by lamina {__version__} as `{draft.format}` from {draft.opened.sentence}.",
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
