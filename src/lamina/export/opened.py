"""Opened: a version of a model in float32, with the inputs that its exports are compared on.

Shape letters: b batch, d width, j outputs of the head, n examples.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamina.data import PixelTable
from lamina.data.decoding import decode
from lamina.data.inputs import image_files, read_file
from lamina.errors import DataError, ModelError
from lamina.learner import Learner, class_scores
from lamina.model import Card, Facts, Model, Predictor, kept
from lamina.model.learning import open_version
from lamina.runs.setup import image_transform
from lamina.types import Batch

MOST = 128
"""Inputs that an export is compared on."""
PART = 32
"""Of them in one batch."""
SENTENCES = (
    "Where is my order?",
    "please cancel the subscription that I started last month, and send the money back to my account",
    "The quick brown fox jumps over the lazy dog.",
    "How much does it cost to send a parcel of 2 kg to another country?",
    "good morning",
    "I would like to know what the weather will be like tomorrow in the mountains.",
    "transfer 250 to savings",
    "No, that is not what I meant!",
)


@dataclass
class Opened:
    """One version of a model, computed in float32 on the CPU.

    Use it as a context: it holds threads.
    """

    path: Path
    facts: Facts
    card: Card
    predictor: Predictor
    batches: tuple[Batch, ...]
    """Inputs to compare on."""
    origin: str
    """What they are, in words."""
    labelled: bool
    """Whether their labels are known."""
    images: tuple[NDArray[np.uint8], ...] = ()
    """The first of them as decoded images (h, w, 3); none for texts."""
    as_run: float | None = None
    """Share of inputs with the same predicted class in the precision that the model runs in; None if that is float32."""
    scores: tuple[Tensor, ...] = ()
    """The scores (b, j) of all outputs, as deployed, for every batch."""

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self.predictor.close()

    @property
    def learner(self) -> Learner:
        return self.predictor.learner

    @property
    def sentence(self) -> str:
        """What it is, for the README of an export."""
        return (
            f"version {self.predictor.version} of a model: method `{self.facts.config.method['name']}`, base "
            f"`{self.facts.base.name}`, {len(self.predictor.labels)} classes"
        )

    @property
    def facts_to_write(self) -> dict[str, Any]:
        """What `export.json` says of the model."""
        return {
            "model_version": self.predictor.version,
            "method": self.facts.config.method["name"],
            "base": {"name": self.facts.base.name, "sha256": self.facts.base.hash},
            "tasks": list(dict.fromkeys(output.task for output in self.learner.outputs)),
            "labels": list(self.predictor.labels),
        }

    @property
    def first_note(self) -> str | None:
        """What a user should know where the model runs in another precision."""
        if self.as_run is None:
            return None
        return (
            f"The export is of float32. The model runs in bf16 here, and names the same class for {self.as_run:.1%} of "
            f"{self.origin}."
        )

    @property
    def count(self) -> int:
        """The number of inputs to compare on."""
        return sum(len(batch) for batch in self.batches)

    def features(self, layers: int = 1) -> list[Tensor]:
        """Returns the features (b, d) of every batch, of the last `layers` blocks."""
        with self.learner.folded():
            return [self.learner.features(batch, layers) for batch in self.batches]

    def accuracy(self, predicted: Sequence[Tensor]) -> float | None:
        """Returns the share of inputs whose predicted class id (b,) is right; None where labels are unknown."""
        if not self.labelled:
            return None
        right = [(found == batch.labels_b).sum() for found, batch in zip(predicted, self.batches, strict=True)]
        return int(torch.stack(right).sum()) / self.count

    def deployed_classes(self) -> list[Tensor]:
        """Returns the class ids (b,) that the model predicts for every batch."""
        classes = self.predictor.classes
        ids = torch.tensor(classes)
        return [ids[class_scores(scores_bj, self.learner.outputs, classes).argmax(1)] for scores_bj in self.scores]


def open_model(path: str | os.PathLike[str], inputs: str | os.PathLike[str] | None = None) -> Opened:
    """Returns the newest version of a model in float32, and inputs: those given, else its probes, else generated ones.

    inputs: an image, a folder of images, or a file with a text per line.
    Raises ModelError where the model has learnt nothing, and DataError for inputs that cannot be read.
    """
    model = Model(path)
    facts = model.store.facts()
    if facts.head is None:
        raise ModelError(f"{model.path} has learnt no task yet. `lamina learn {model.path} DATA` teaches it one.")
    exact = facts.model_copy(update={"config": facts.config.model_copy(update={"precision": "fp32"})})
    card = model.store.card(facts.head)
    predictor = open_version(model.store, exact, card, "cpu")
    try:
        opened = Opened(model.path, exact, card, predictor, (), "", False)
        if inputs is not None:
            _read(opened, Path(inputs))
        elif not _probes(opened, model):
            _generate(opened)
        opened.scores = tuple(predictor.scores(batch) for batch in opened.batches)
        if facts.config.precision == "bf16":
            opened.as_run = _as_run(opened, open_version(model.store, facts, card, "cpu"))
    except BaseException:
        predictor.close()
        raise
    return opened


def _as_run(opened: Opened, predictor: Predictor) -> float:
    """Returns the share of inputs for which a predictor in another precision names the same class."""
    try:
        mine = torch.cat(opened.deployed_classes())
        scores = [predictor.scores(batch) for batch in opened.batches]
        ids = torch.tensor(predictor.classes)
        outputs = predictor.learner.outputs
        theirs = torch.cat([ids[class_scores(part, outputs, predictor.classes).argmax(1)] for part in scores])
        return float((mine == theirs).double().mean())
    finally:
        predictor.close()


def _probes(opened: Opened, model: Model) -> bool:
    """Take the probes that the model keeps, evenly over its tasks. Returns whether there are any."""
    backbone = opened.learner.backbone
    transform = image_transform(opened.facts.config.run, backbone) if backbone.image is not None else None
    sets = []
    for card in model.cards:
        packed = model.store.kept(card.folder, kept.PROBES)
        if packed is not None:
            sets.append(kept.unpacked(packed, transform))
    if not sets:
        return False
    each, batches, images = max(1, MOST // len(sets)), list[Batch](), list[NDArray[np.uint8]]()
    for examples in sets:
        chosen_n = np.linspace(0, len(examples) - 1, min(each, len(examples))).astype(np.int64)
        batches += [examples.batch(chosen_n[start : start + PART]) for start in range(0, len(chosen_n), PART)]
        if isinstance(examples.table, PixelTable):
            images += [examples.table.store.image(int(row)) for row in examples.rows_n[chosen_n[:16]]]
    opened.batches, opened.images, opened.labelled = tuple(batches), tuple(images), True
    opened.origin = f"{opened.count} probes of {len(sets)} task{'s' if len(sets) > 1 else ''}"
    return True


def _read(opened: Opened, path: Path) -> None:
    if opened.predictor.kind == "image":
        contents = [read_file(file) for file in image_files(path)[:MOST]]
        size = opened.learner.backbone.image.size if opened.learner.backbone.image else 64
        opened.images = tuple(decode(content, max(64, 2 * size)) for content in contents[:16])
        _take(opened, contents, f"images from {path}")
        return
    _take(opened, lines_of(path, "text")[:MOST], f"texts from {path}")


def lines_of(path: Path, what: str) -> list[str]:
    """Returns the lines of a file that are not blank. what: a line is, such as "text", for messages.

    Raises DataError where there are none, or the file cannot be read as UTF-8."""
    if not path.is_file():
        raise DataError(f"{path} is no file. Give a file with a {what} per line.")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read as UTF-8 text ({error}). Save it as UTF-8, a {what} per line."
        ) from error
    if not any(lines):
        raise DataError(f"{path} holds no {what}. Give a file with a {what} per line.")
    return [line for line in lines if line]


def _generate(opened: Opened) -> None:
    """Make inputs of noise, which are good enough to compare numbers, and say nothing of accuracy."""
    if opened.predictor.kind == "text":
        _take(opened, SENTENCES, "sentences, the same for every model, since it keeps no probes")
        return
    image = opened.learner.backbone.image
    assert image is not None
    draws = np.random.default_rng(0)
    coarse = [draws.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(PART)]
    side = -(-image.size // 8)
    opened.images = tuple(np.kron(one, np.ones((side, side, 1), np.uint8)) for one in coarse)
    _take(opened, opened.images, "images of noise, since it keeps no probes")


def _take(opened: Opened, payloads: Sequence[str | bytes | NDArray[np.uint8]], what: str) -> None:
    parts = [payloads[start : start + PART] for start in range(0, len(payloads), PART)]
    found = [opened.predictor.read(part) for part in parts]
    wrong = next((error for _, errors in found for error in errors if error is not None), None)
    if wrong is not None or not found:
        raise DataError(f"{what}: {wrong or 'there are none'}. Give others with --inputs.")
    opened.batches = tuple(batch for batch, _ in found if batch is not None)
    opened.origin = f"{opened.count} {what}"
