"""Tiny causal language models, and a stream of three tasks of instructions that they can learn, made without a network."""

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.instructions import make_tokenizer
from tests.unit.backbones.languages import LANGUAGES
from torch import Tensor

from lamina import data
from lamina.backbones import Backbone, load
from lamina.data.streams import Stream, domain_plan, make_stream
from lamina.data.tokens import load_tokenizer
from lamina.types import Examples

POSITIONS, VOCABULARY = 96, 320
OPTIONS = {"film": ("positive", "negative"), "city": ("Paris", "Madrid", "Paris is it"), "note": ()}
"""Of the three tasks. Two options of the second begin alike; the third has none, so that text is generated."""
TEXT = "The capital of France is Paris. The film is a joy from the first minute to the last, and so is the city."


@cache
def tokenizer() -> Path:
    """Returns the folder of the tiny tokenizer."""
    return make_tokenizer(Path(tempfile.mkdtemp(prefix="lamina-tokenizer-")))


def raw_language(name: str, **settings: Any) -> Any:
    """Returns transformers' own tiny model of this family. settings: of its configuration."""
    row = LANGUAGES[name]
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS}
    return replace(row, settings={**row.settings, **sizes, **settings}).raw()


def save_language(name: str, folder: Path, **settings: Any) -> Path:
    """Saves a tiny model of this family with its tokenizer. Returns the folder. settings: of its configuration."""
    raw_language(name, **settings).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@cache
def _loaded(name: str) -> Backbone:
    with tempfile.TemporaryDirectory() as folder:
        return load(str(save_language(name, Path(folder))))


def tiny_language(name: str) -> Backbone:
    """Returns a tiny frozen model of this family: 2 blocks, 32 wide, 96 positions, and the tokens of `tokenizer`."""
    return copy.deepcopy(_loaded(name))


def records(train: int = 10, test: int = 5) -> list[dict[str, Any]]:
    """Returns the rows of the three tasks. The prompt says what is right; the last row of "city" has fewer options."""
    found: list[dict[str, Any]] = []
    said = {"film": ("a joy", "a bore"), "city": ("France", "Spain", "it"), "note": ("yes", "no")}
    for domain, options in OPTIONS.items():
        answers = options or ("a joy", "no")
        for k in range(train + test):
            right = k % len(answers)
            row = {
                "prompt": f"{'so ' * (k * 7 % 4)}{said[domain][right]} {k}?",
                "completion": answers[right],
                "domain": domain,
                "split": "train" if k < train else "test",
            }
            if options:
                row["options"] = [*options]
            found.append(row)
    fewer = next(row for row in reversed(found) if row["domain"] == "city" and row["completion"] == "Madrid")
    fewer["options"] = [*OPTIONS["city"][:2]]
    return found


@cache
def language_stream() -> Stream:
    """Returns the stream of three domains, tokenised as runs tokenise it: 10 training and 5 test examples each."""
    return stream_of(records())


def stream_of(rows: Sequence[dict[str, Any]], **settings: Any) -> Stream:
    """Returns the stream of the domains of these rows. settings: of `load_instructions`."""
    settings = {"positions": POSITIONS, "vocabulary": VOCABULARY} | settings
    labelled = data.load_instructions(data.instructions_from(rows), tokenizer(), **settings)
    return make_stream(labelled, domain_plan(labelled), "domain")


@cache
def text() -> Tensor:
    """Returns the tokens of a text from outside the stream."""
    return torch.tensor(load_tokenizer(tokenizer())(TEXT)["input_ids"])


def every(examples: Examples) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Returns the positions of all examples."""
    return np.arange(len(examples))
