"""What a language model answers to the examples of one task: the best option, or generated text; and its perplexity.

Shape letters: n examples, b batch, m options.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lamina.engine.evaluate import Predictions
from lamina.errors import TrainingError
from lamina.learner import LanguageLearner, Learner
from lamina.types import Batch, Examples, Instruction, Instructions, Ints

SHOWN = 5
"""Examples of each task whose answers are recorded."""


class Answering(Protocol):
    """A method, or what is deployed of it."""

    @property
    def selects(self) -> bool:
        """Whether `answering` depends on the task, if it is given."""
        ...

    def answering(self, learner: Learner, batch: Batch, task: str | None = None) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Answer:
    """The answer to one example, as text."""

    question: str
    wanted: str
    given: str


@dataclass(frozen=True)
class Answers:
    """Of one model to the examples of one task."""

    predictions: Predictions
    """With the position of the right option as label, and of the best one as prediction. For an example without options
    they are 0, and 0 where the generated text is what is wanted (else 1)."""
    rouge_l: float | None
    """Mean ROUGE-L (F1) of the generated texts; None where nothing was generated, or rouge-score is not installed."""
    shown: tuple[Answer, ...]
    """The answers to a few examples, evenly spaced."""


def questions(examples: Examples, positions: Ints) -> Batch:
    """Returns the prompts of these examples with their options. Raises TypeError where they are no instructions."""
    if not isinstance(examples.table, Instructions):
        raise TypeError("only instructions can be asked as questions")
    inputs, right_b = examples.table.questions(examples.rows_n[positions])
    return Batch(inputs=inputs, labels_b=right_b)


Found = tuple[Ints, Ints, Ints, list[str]]
"""Right and best option, the best if the task is given, and the answers as text."""


@dataclass(frozen=True)
class Examiner:
    """Asks a learner the questions of one task. longest: the most tokens that are generated."""

    learner: LanguageLearner
    predictor: Answering
    task: str
    longest: int

    def ask(self, examples: Examples, batches: Callable[[Examples], Iterable[Batch]]) -> Answers:
        """Returns the answers to all examples, with live branches folded. Where an example has options, their
        log-likelihoods are compared; otherwise text is generated greedily. The right answers are compared only afterwards.

        batches: cuts the examples it is given into batches of questions.
        Raises TrainingError where a log-likelihood is not finite.
        """
        table = examples.table
        assert isinstance(table, Instructions)
        read = [table.read(int(row)) for row in examples.rows_n]
        order_n = np.argsort(examples.lengths(), kind="stable")
        ranked_n = np.array([bool(read[k].options) for k in order_n], dtype=bool)
        given: list[str] = [""] * len(read)
        labels_n, predicted_n, aware_n = (np.zeros(len(read), np.int64) for _ in range(3))
        with self.learner.folded():
            for answer, positions_n in ((self.ranked, order_n[ranked_n]), (self.generated, order_n[~ranked_n])):
                start = 0
                for batch in batches(examples.select(positions_n)) if len(positions_n) else ():
                    own_b = positions_n[start : start + len(batch)]
                    start += len(batch)
                    found = answer(batch, [read[k] for k in own_b], table)
                    labels_n[own_b], predicted_n[own_b], aware_n[own_b], texts = found
                    for k, text in zip(own_b, texts, strict=True):
                        given[k] = text
        free = [(one.completion, text) for one, text in zip(read, given, strict=True) if not one.options]
        chosen = np.unique(np.linspace(0, len(read) - 1, SHOWN).astype(int)) if read else ()
        shown = tuple(Answer(read[k].prompt, read[k].completion, given[k]) for k in chosen)
        return Answers(Predictions(labels_n, predicted_n, aware_n, None), rouge_l(free), shown)

    def ranked(self, batch: Batch, read: Sequence[Instruction], _: Instructions) -> Found:
        with self.predictor.answering(self.learner, batch):
            best_b = self._checked(self.learner.option_scores(batch)).argmax(1)
        aware_b = best_b
        if self.predictor.selects:
            with self.predictor.answering(self.learner, batch, self.task):
                aware_b = self._checked(self.learner.option_scores(batch)).argmax(1)
        texts = [one.options[k] for one, k in zip(read, best_b.tolist(), strict=True)]
        return batch.labels_b.cpu().numpy(), best_b.numpy(), aware_b.numpy(), texts

    def generated(self, batch: Batch, read: Sequence[Instruction], table: Instructions) -> Found:
        def written(task: str | None) -> list[str]:
            with self.predictor.answering(self.learner, batch, task):
                return [
                    table.decode(ids) for ids in self.learner.generate(batch, self.longest, table.stops, table.pad_id)
                ]

        def wrong_b(texts: list[str]) -> Ints:
            pairs = zip(read, texts, strict=True)
            return np.array([plain(text) != plain(one.completion) for one, text in pairs], np.int64)

        texts = written(None)
        aware = written(self.task) if self.predictor.selects else texts
        return np.zeros(len(read), np.int64), wrong_b(texts), wrong_b(aware), texts

    def _checked(self, scores_bm: Tensor) -> Tensor:
        scores_bm = scores_bm.cpu()
        if not (scores_bm < torch.inf).all() or not (scores_bm.amax(1) > -torch.inf).all():
            raise TrainingError(
                f"the log-likelihood of an option of task {self.task!r} is NaN or infinite. Training diverged: use a smaller "
                f"training.lr, or training.clip=1."
            )
        return scores_bm


def plain(text: str) -> str:
    """Returns a text without white space at its ends, as exact matches are compared."""
    return text.strip()


def rouge_l(pairs: list[tuple[str, str]]) -> float | None:
    """Returns the mean ROUGE-L (F1, without stemming) of (wanted, given) texts; None for no pairs, and if rouge-score is not
    installed."""
    if not pairs:
        return None
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return None
    scorer = RougeScorer(["rougeL"])
    return float(np.mean([scorer.score(wanted, given)["rougeL"].fmeasure for wanted, given in pairs]))
