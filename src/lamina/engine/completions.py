"""Predictions of a language model on one task: the best option of each prompt, or generated text.

Shape letters: n examples, b batch, m options.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lamina.data.prompts import stop_tokens
from lamina.engine.evaluate import Predictions
from lamina.errors import TrainingError
from lamina.learner import LanguageLearner, Learner
from lamina.types import Batch, Examples, Instruction, Instructions, Ints

SHOWN = 5
"""Examples of each task whose predictions are recorded."""


class Deployed(Protocol):
    """A method, or consolidation around it."""

    @property
    def selects(self) -> bool:
        """Whether `predicting` depends on the task, if it is given."""
        ...

    def predicting(self, learner: Learner, batch: Batch, task: str | None = None) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class ShownPrediction:
    """The prediction for one example, as text."""

    row: int
    prompt: str
    expected: str
    predicted: str


@dataclass(frozen=True)
class Completions:
    """Predictions of one model for the examples of one task."""

    predictions: Predictions
    """The label is the position of the right option, the prediction that of the best one. For an example without options the
    label is 0, and the prediction is 0 for an exact match and 1 otherwise."""
    rouge_l: float | None
    """Mean ROUGE-L (F1) of the generated texts; None where nothing was generated, or rouge-score is not installed."""
    shown: tuple[ShownPrediction, ...]
    """A few examples, evenly spaced."""


def questions(examples: Examples, positions: Ints) -> Batch:
    """Returns the prompts of these examples with their options. Raises TypeError where they are no instructions."""
    if not isinstance(examples.table, Instructions):
        raise TypeError("only instructions can be asked as questions")
    inputs, right_b = examples.table.questions(examples.rows_n[positions])
    return Batch(inputs=inputs, labels_b=right_b)


Found = tuple[Ints, Ints, Ints, list[str]]
"""Right option, best option, best option if the task is given, and the predicted texts."""


@dataclass(frozen=True)
class Examiner:
    """Evaluates a language model on one task. longest: the most tokens that are generated."""

    learner: LanguageLearner
    deployed: Deployed
    task: str
    longest: int

    def ask(self, examples: Examples, batches: Callable[[Examples], Iterable[Batch]]) -> Completions:
        """Returns the predictions for all examples, with live branches folded. Options are compared by log-likelihood; text is
        generated greedily where there are none. The expected completions are compared only afterwards.

        batches: cuts the examples it is given into batches of questions.
        Raises TrainingError where a log-likelihood is not finite.
        """
        table = examples.table
        assert isinstance(table, Instructions)
        read = [table.read(int(row)) for row in examples.rows_n]
        # A chat template may write something before each reply. Generated text begins with it, too.
        read = [one if one.options else replace(one, completion=table.expected(int(row)))
                for one, row in zip(read, examples.rows_n, strict=True)]  # fmt: skip
        order_n = np.argsort(examples.lengths(), kind="stable")
        ranked_n = np.array([bool(read[k].options) for k in order_n], dtype=bool)
        texts: list[str] = [""] * len(read)
        labels_n, predicted_n, aware_n = (np.zeros(len(read), np.int64) for _ in range(3))
        with self.learner.folded():
            for predict, positions_n in ((self.ranked, order_n[ranked_n]), (self.generated, order_n[~ranked_n])):
                start = 0
                for batch in batches(examples.select(positions_n)) if len(positions_n) else ():
                    own_b = positions_n[start : start + len(batch)]
                    start += len(batch)
                    found = predict(batch, [read[k] for k in own_b], table)
                    labels_n[own_b], predicted_n[own_b], aware_n[own_b], found_texts = found
                    for k, text in zip(own_b, found_texts, strict=True):
                        texts[k] = text
        free = [(one.completion, text) for one, text in zip(read, texts, strict=True) if not one.options]
        chosen = np.unique(np.linspace(0, len(read) - 1, SHOWN).astype(int)) if read else ()
        shown = tuple(
            ShownPrediction(int(examples.rows_n[k]), read[k].prompt, read[k].completion, texts[k]) for k in chosen
        )
        return Completions(Predictions(labels_n, predicted_n, aware_n, None), rouge_l(free), shown)

    def ranked(self, batch: Batch, read: Sequence[Instruction], _: Instructions) -> Found:
        """Returns the best options of a batch."""
        with self.deployed.predicting(self.learner, batch):
            best_b = self._checked(self.learner.option_scores(batch)).argmax(1)
        aware_b = best_b
        if self.deployed.selects:
            with self.deployed.predicting(self.learner, batch, self.task):
                aware_b = self._checked(self.learner.option_scores(batch)).argmax(1)
        texts = [one.options[k] for one, k in zip(read, best_b.tolist(), strict=True)]
        return batch.labels_b.cpu().numpy(), best_b.numpy(), aware_b.numpy(), texts

    def generated(self, batch: Batch, read: Sequence[Instruction], table: Instructions) -> Found:
        """Returns the texts generated for a batch."""
        stops = stop_tokens(table.stops, self.learner.backbone.module)

        def written(task: str | None) -> list[str]:
            with self.deployed.predicting(self.learner, batch, task):
                found = self.learner.generate(batch, self.longest, stops, table.pad_id)
            return [table.decode(ids) for ids in found]

        def wrong_b(texts: list[str]) -> Ints:
            return np.array([text.strip() != one.completion for one, text in zip(read, texts, strict=True)], np.int64)

        texts = written(None)
        aware = written(self.task) if self.deployed.selects else texts
        return np.zeros(len(read), np.int64), wrong_b(texts), wrong_b(aware), texts

    def _checked(self, scores_bm: Tensor) -> Tensor:
        scores_bm = scores_bm.cpu()
        if not (scores_bm < torch.inf).all() or not (scores_bm.amax(1) > -torch.inf).all():
            raise TrainingError(
                f"the log-likelihood of an option of task {self.task!r} is NaN or infinite. Training diverged: use a smaller "
                f"training.lr, or training.clip=1."
            )
        return scores_bm


def rouge_l(pairs: list[tuple[str, str]]) -> float | None:
    """Returns the mean ROUGE-L (F1, without stemming) of (expected, predicted) texts; None for no pairs, and if rouge-score is
    not installed."""
    if not pairs:
        return None
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return None
    scorer = RougeScorer(["rougeL"])
    return float(np.mean([scorer.score(expected, text)["rougeL"].fmeasure for expected, text in pairs]))
