"""Small models that have learnt two tasks, of any family and method, and a tokenizer for those of texts."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.models import CLASSES, FEW, SMALL, images
from torch import nn

from lamina.model import Model

WORDS = ("sun", "rain", "snow", "fog", "bread", "salt", "soup", "oven", "ball", "goal", "team", "score")
TOPICS = {"ant": WORDS[:3], "bee": WORDS[3:6], "cat": WORDS[6:9], "dog": WORDS[9:]}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def slow(value: object) -> Any:
    """A case that `make test` leaves to `make test-slow`."""
    return pytest.param(value, marks=pytest.mark.slow)


def with_tokenizer(raw: nn.Module, folder: Path) -> Path:
    """A model of texts in a folder, with a tokenizer of a few words."""
    from transformers import BertTokenizerFast

    raw.save_pretrained(folder)
    (folder / "words.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    BertTokenizerFast(str(folder / "words.txt")).save_pretrained(folder)
    return folder


def texts(file: Path, classes: tuple[str, ...], seed: int = 0) -> Path:
    """A CSV file of texts whose words tell their class."""
    draw = np.random.default_rng(seed)
    with file.open("w", newline="") as opened:
        rows = csv.writer(opened)
        rows.writerow(["text", "label"])
        for label in classes:
            for _ in range(10):
                words = [
                    draw.choice(TOPICS[label] if draw.random() < 0.8 else WORDS) for _ in range(draw.integers(2, 7))
                ]
                rows.writerow([" ".join(words), label])
    return file


def taught(
    path: Path,
    base: Path,
    kind: str = "image",
    method: str = "olora",
    settings: Mapping[str, Any] | None = None,
    *,
    again: bool = True,
) -> Model:
    """A model that has learnt two tasks. again: a class of the first is learnt again in the second."""
    more: dict[str, Any] = {"probes.per_class": 3, "consolidation.classifier": "own", "consolidation.layers": 1}
    more |= (
        {"consolidation.merging": "none", "consolidation.drift": "none"} | FEW.get(method, {}) | dict(settings or {})
    )
    small = {key: value for key, value in SMALL.items() if kind == "image" or key != "backbone.image_size"}
    model = Model.create(path, backbone=str(base), method=method, settings={**small, "training.epochs": 1, **more})
    for number, classes in enumerate((CLASSES[:2], CLASSES[1:4] if again else CLASSES[2:4])):
        make, end = (images, "parquet") if kind == "image" else (texts, "csv")
        file = make(path.parent / f"{path.name}-{number}.{end}", classes, seed=number)
        model.learn(file, name=f"task {number}", force=True)
    return model
