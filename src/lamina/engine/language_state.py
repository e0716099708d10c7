"""LanguageState: what is measured of language models only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Shown:
    """An example whose predictions are recorded."""

    task: int
    row: int
    """In the data."""
    prompt: str
    expected: str
    predicted: tuple[str, ...]
    """Before the stream, and after each task that the example was measured after."""


@dataclass(frozen=True, kw_only=True)
class LanguageState:
    """What is measured of language models only."""

    zero_shot: tuple[tuple[int, int], ...]
    """Correct predictions and examples of each task, before the stream."""
    rouge_l: tuple[tuple[float | None, ...], ...] = ()
    """Mean ROUGE-L of each task before the stream and after each task; None where no text was generated."""
    perplexity: tuple[float, ...] = ()
    """Of a text from outside the stream, before it and after each task."""
    shown: tuple[Shown, ...] = ()

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "LanguageState":
        return cls(
            zero_shot=tuple((int(right), int(total)) for right, total in content["zero_shot"]),
            rouge_l=tuple(tuple(row) for row in content["rouge_l"]),
            perplexity=tuple(content["perplexity"]),
            shown=tuple(Shown(**{**one, "predicted": tuple(one["predicted"])}) for one in content["shown"]),
        )
