"""Predictor: one version of a model in memory, ready to predict.

Shape letters: b batch, j outputs of the head, c classes.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamina import backbones, data
from lamina.backbones import Backbone
from lamina.config import RunConfig
from lamina.data import ImageTransform, PixelStore, PixelTable
from lamina.data.arrays import ArrayItems
from lamina.data.decoding import DAMAGE, decode
from lamina.data.inputs import Item
from lamina.data.records import Source
from lamina.engine.consolidate import Consolidation
from lamina.errors import DataError, ModelError, TrainingError
from lamina.learner import Learner, class_scores
from lamina.maths import classifiers
from lamina.maths.calibration import left_out_scores
from lamina.methods.base import hashed_order
from lamina.model.card import Facts
from lamina.model.deployed import Deployed
from lamina.model.gate import Outcomes
from lamina.runs.setup import image_transform
from lamina.types import Batch, Examples, Task

DECODERS = 4
"""Threads that decode images while others compute."""
CALIBRATION = 512
"""Most training examples that the temperature is fitted on."""


class Guess(NamedTuple):
    """A class with its probability, and the task that the winning output of the class belongs to."""

    label: str
    probability: float
    task: str


@dataclass(frozen=True)
class Prediction:
    """What a model says about one input: its best guesses, the best first; or why it can say nothing."""

    guesses: tuple[Guess, ...] = ()
    error: str | None = None

    @property
    def label(self) -> str:
        return self._best().label

    @property
    def probability(self) -> float:
        return self._best().probability

    @property
    def task(self) -> str:
        return self._best().task

    def _best(self) -> Guess:
        if not self.guesses:
            raise DataError(self.error or "nothing was predicted")
        return self.guesses[0]


class Predictor(Deployed):
    """A version of a classifier in memory. Raises ModelError for a version without a task."""

    def prepare(self) -> None:
        self.classes = tuple(dict.fromkeys(output.label for output in self.learner.outputs))
        if not self.classes:
            raise ModelError("the model has learnt no task yet, so it cannot predict. `lamina learn` teaches it one.")
        columns = [[j for j, o in enumerate(self.learner.outputs) if o.label == label] for label in self.classes]
        most = max(map(len, columns))
        self._outputs_cm = torch.tensor([own + own[:1] * (most - len(own)) for own in columns])
        """The outputs of every class; the first one again where a class has fewer than others."""
        self._reader = Reader(self.config, self.backbone)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes that it knows, in the order in which they came."""
        return tuple(self.class_names[label] for label in self.classes)

    # -- predictions --------------------------------------------------------------------------------------------------

    def predict(self, inputs: Iterable[Item], top: int = 1) -> list[Prediction]:
        """Returns a prediction for each encoded or decoded image, or text. One that cannot be read has an error."""
        return list(self.stream(inputs, top))

    def stream(self, inputs: Iterable[Item], top: int = 1) -> Iterator[Prediction]:
        """Yields what `predict` returns, as it comes. Inputs are read ahead by one batch."""
        for batch, errors in self._reader.batches(inputs, self.config.evaluation.batch_size):
            found = iter(self.predictions(batch, top) if batch is not None else ())
            for error in errors:
                yield Prediction(error=error) if error is not None else next(found)

    def predictions(self, batch: Batch, top: int = 1) -> list[Prediction]:
        """Returns a prediction for every example of a batch."""
        scores_bj = self.scores(batch)
        probabilities_bc = (class_scores(scores_bj, self.learner.outputs, self.classes) / self.temperature).softmax(1)
        best_bk = probabilities_bc.topk(min(top, len(self.classes)), 1)
        winners_bk = scores_bj[:, self._outputs_cm].argmax(2).gather(1, best_bk.indices)
        winners_bk = self._outputs_cm[best_bk.indices, winners_bk]
        tasks, labels = [output.task for output in self.learner.outputs], self.labels
        return [
            Prediction(tuple(Guess(labels[c], chance, tasks[j]) for chance, c, j in zip(*row, strict=True)))
            for row in zip(best_bk.values.tolist(), best_bk.indices.tolist(), winners_bk.tolist(), strict=True)
        ]

    def scores(self, batch: Batch) -> Tensor:
        """Returns the scores of all outputs, (b, j), on the CPU. Raises TrainingError for scores that are not finite."""
        with self.lock, torch.no_grad():
            scores_bj = self.consolidation.predict(self.learner, batch.to(self.learner.device)).cpu()
        if not (scores_bj < torch.inf).all():
            raise TrainingError(
                "a score is NaN or infinite: the weights or the input are damaged. Go back with `lamina rollback`."
            )
        return scores_bj

    def outcomes(self, examples: Examples) -> Outcomes:
        """Returns the predictions for labelled examples, whose labels are class ids of the model."""
        size = self.config.evaluation.batch_size
        with self.lock:
            return outcomes(self.learner, self.consolidation, examples, size, self.temperature)

    def milliseconds(self, examples: Examples, repeats: int = 7) -> float:
        """Returns the least time of one prediction, for the first of these examples."""
        with self.lock:
            return milliseconds(self.learner, self.consolidation, examples, repeats)

    def read(self, inputs: Sequence[Item]) -> tuple[Batch | None, list[str | None]]:
        """Returns the inputs that can be read as one batch, and for each input None or why it cannot be read."""
        return self._reader.read(inputs)


class Reader:
    """Turns encoded images or texts into batches for a backbone. Raises DataError where texts have no tokenizer."""

    def __init__(self, config: RunConfig, backbone: Backbone) -> None:
        self.backbone, self.config = backbone, config
        self.transform: ImageTransform | None = None
        self.tokenizer: Any = None
        if backbone.image is not None:
            self.transform = image_transform(config, backbone)
        elif backbone.tokenizer is None:
            raise DataError(f"backbone {backbone.name!r} has no tokenizer beside its weights")
        else:
            self.tokenizer = data.load_tokenizer(backbone.tokenizer)

    def batches(self, inputs: Iterable[Item], size: int) -> Iterator[tuple[Batch | None, list[str | None]]]:
        """Yields batches of at most `size` inputs, the next one being read while one is in use."""
        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(DECODERS) as pool:
            waiting = None
            for part in _parts(inputs, size):
                following = ahead.submit(self.read, part, pool)
                if waiting is not None:
                    yield waiting.result()
                waiting = following
            if waiting is not None:
                yield waiting.result()

    def read(
        self, inputs: Sequence[Item], pool: ThreadPoolExecutor | None = None
    ) -> tuple[Batch | None, list[str | None]]:
        """Returns the inputs that can be read as one batch (None if there is none), and for each None or what is wrong."""
        if self.transform is None:
            return self._read_texts(inputs)
        found = list(pool.map(self._decoded, inputs) if pool else map(self._decoded, inputs))
        images = [image for image in found if not isinstance(image, str)]
        errors = [image if isinstance(image, str) else None for image in found]
        if not images:
            return None, errors
        sizes_n2 = np.array([image.shape[:2] for image in images], np.int64)
        store = PixelStore(np.concatenate([image.reshape(-1) for image in images]), sizes_n2)
        inputs_b = PixelTable(store, self.transform).inputs(np.arange(len(images)), None)
        return Batch(inputs=inputs_b, labels_b=torch.zeros(len(images), dtype=torch.int64)), errors

    def _decoded(self, payload: Item) -> NDArray[np.uint8] | str:
        assert self.transform is not None
        if isinstance(payload, DataError):
            return str(payload)
        if isinstance(payload, str):
            return "a text, where the model takes images"
        try:
            return decode(payload, max(64, 2 * self.transform.size))
        except DAMAGE as error:
            return (str(error) or type(error).__name__).splitlines()[0]

    def _read_texts(self, inputs: Sequence[Item]) -> tuple[Batch | None, list[str | None]]:
        texts, errors = list[str](), list[str | None]()
        for text in inputs:
            error = None
            if isinstance(text, DataError):
                error = str(text)
            elif not isinstance(text, str):
                error = "an image, where the model takes texts"
            elif not text.strip():
                error = "an empty text"
            else:
                try:
                    text.encode()
                except UnicodeEncodeError as wrong:
                    error = f"not valid Unicode ({wrong.reason})"
            errors.append(error)
            if error is None and isinstance(text, str):
                texts.append(text)
        if not texts:
            return None, errors
        zeros_n = np.zeros(len(texts), np.int64)
        source = Source(
            kind="text",
            name="input",
            items=ArrayItems("input", texts),
            labels_n=zeros_n,
            splits_n=zeros_n,
            domains_n=zeros_n,
            class_names=("?",),
            domain_names=("all",),
            fingerprint="",
        )
        table = data.tokenise_once(
            source,
            self.tokenizer,
            self.config.data.text_length,
            positions=self.backbone.positions,
            vocabulary=self.backbone.vocabulary,
        )
        rows_n = np.arange(len(texts))
        return Batch(inputs=table.inputs(rows_n, None), labels_b=torch.zeros(len(texts), dtype=torch.int64)), errors


def outcomes(
    learner: Learner, deployed: Consolidation, examples: Examples, batch_size: int, temperature: float = 1.0
) -> Outcomes:
    """Returns the predictions of what is deployed for labelled examples, in their order."""
    classes = tuple(dict.fromkeys(output.label for output in learner.outputs))
    class_c = np.array(classes)
    order_n = np.argsort(examples.lengths(), kind="stable")
    predicted_n, confidence_n = np.zeros(len(examples), np.int64), np.zeros(len(examples))
    with learner.folded():
        for start in range(0, len(examples), batch_size):
            positions_b = order_n[start : start + batch_size]
            batch = examples.batch(positions_b).to(learner.device)
            scores_bj = deployed.predict(learner, batch).cpu()
            best = (class_scores(scores_bj, learner.outputs, classes) / temperature).softmax(1).max(1)
            predicted_n[positions_b] = class_c[best.indices.numpy()]
            confidence_n[positions_b] = best.values.double().numpy()
    return Outcomes(examples.labels_n, predicted_n, confidence_n)


def temperature_of(learner: Learner, deployed: Consolidation, task: Task, batch_size: int) -> float:
    """Returns the temperature of the newest task's classifier: at least 1, and 1 for classifiers that are not LDA.

    It is fitted on training examples, each left out of the statistics it is scored with: see `maths/calibration.py`.
    """
    if deployed.config.classifier != "lda":
        return 1.0
    statistics = deployed.statistics(learner)
    assert statistics is not None
    outputs = {output.label: place for place, output in enumerate(learner.outputs) if output.task == task.name}
    places_n = np.array([outputs[label] for label in task.train.labels_n.tolist()], np.int64)
    several_n = statistics.counts_j.numpy()[places_n] > 1
    order_n = hashed_order(task.train, 0)
    examples = task.train.select(order_n[several_n[order_n]][:CALIBRATION])
    if not len(examples):
        return 1.0
    output_n = torch.tensor([outputs[label] for label in examples.labels_n.tolist()])
    found = []
    with learner.folded():
        for start in range(0, len(examples), batch_size):
            batch = examples.batch(np.arange(start, min(start + batch_size, len(examples))))
            found.append(deployed.features(learner, batch.to(learner.device)).cpu())
    scores_nj = left_out_scores(statistics, torch.cat(found), output_n)
    classes = tuple(dict.fromkeys(output.label for output in learner.outputs))
    class_n = torch.tensor([classes.index(label) for label in examples.labels_n.tolist()])
    return max(1.0, classifiers.temperature(class_scores(scores_nj, learner.outputs, classes), class_n))


def milliseconds(learner: Learner, deployed: Consolidation, examples: Examples, repeats: int = 7) -> float:
    """Returns the least time of one prediction, for the first of these examples."""
    batch = examples.batch(np.arange(1)).to(learner.device)
    times = []
    with learner.folded():
        for _ in range(repeats):
            started = time.perf_counter()
            deployed.predict(learner, batch).cpu()
            times.append(time.perf_counter() - started)
    return 1000 * min(times)


def load_backbone(facts: Facts, path: Path) -> Backbone:
    """Returns the backbone of a model. path: its directory. Raises ModelError where other weights are in its place, and
    BackboneError where there are none."""
    section = facts.config.backbone
    name = str(path / "base") if facts.base.embedded else section.name
    backbone = backbones.load(
        name, image_size=section.image_size, pooling=section.pooling, mean=section.mean, std=section.std
    )
    check_hash(backbone, facts, path)
    return backbone


def check_hash(backbone: Backbone, facts: Facts, path: Path) -> None:
    """Raises ModelError for weights that are not those of the model in the directory `path`."""
    if backbone.hash != facts.base.hash:
        raise ModelError(
            f"the weights at {backbone.name} are not those of this model: their hash is {backbone.hash[:12]}, and it was made "
            f"with {facts.base.hash[:12]}. Put the right ones there, or say where they are: "
            f"`lamina configure {path} --backbone PLACE`."
        )


def _parts(inputs: Iterable[Item], size: int) -> Iterator[list[Item]]:
    part: list[Item] = []
    for item in inputs:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
