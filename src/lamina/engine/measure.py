"""Measure: what is measured before a stream and after each of its tasks, as a new state of the run."""

import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lamina.config import EvaluationConfig
from lamina.data.streams import Stream
from lamina.engine.completions import Completions, Examiner
from lamina.engine.consolidate import Consolidation
from lamina.engine.evaluate import Predictions, Predictor, correct_by_class, predict_all
from lamina.engine.language_state import LanguageState, Shown
from lamina.engine.state import RunState
from lamina.errors import TrainingError
from lamina.learner import LanguageLearner, Learner
from lamina.maths.metrics import negative_flips
from lamina.types import Batch, Examples, Task

Features = dict[int, list[Tensor]]
"""Features of the examples of every task, by its number, batch by batch."""
Memos = list[tuple[dict[str, Tensor], dict[str, Tensor]]]
"""What is remembered of each batch without its task, and given its task. The first never sees the second."""
Batches = Callable[[Examples, bool], Iterable[Batch]]
"""Cuts examples into batches; of questions if so."""


class Remembering:
    """Predicts as a unified classifier does, from features that are computed once. known: of the batches, in their order."""

    uses_task = False

    def __init__(self, deployed: Consolidation, known: list[Tensor]) -> None:
        self.deployed, self.known, self.number = deployed, known, 0

    def predict(self, learner: Learner, batch: Batch) -> Tensor:
        if self.number == len(self.known):
            self.known.append(self.deployed.features(learner, batch).to("cpu", copy=True))
        self.number += 1
        return self.deployed.scores(learner, self.known[self.number - 1])

    def predict_task_aware(self, learner: Learner, batch: Batch, task: str) -> Tensor:
        return self.deployed.predict_task_aware(learner, batch, task)


class Recalling:
    """Predicts as what is deployed, which remembers of each batch what never changes. memos: of the batches, in their order."""

    def __init__(self, deployed: Predictor, memos: Memos) -> None:
        self.deployed, self.memos, self.number = deployed, memos, 0

    @property
    def uses_task(self) -> bool:
        return self.deployed.uses_task

    def predict(self, learner: Learner, batch: Batch) -> Tensor:
        if self.number == len(self.memos):
            self.memos.append(({}, {}))
        self.number += 1
        return self.deployed.predict(learner, replace(batch, memo=self.memos[self.number - 1][0]))

    def predict_task_aware(self, learner: Learner, batch: Batch, task: str) -> Tensor:
        own, told = self.memos[self.number - 1]
        return self.deployed.predict_task_aware(learner, replace(batch, memo=ChainMap(told, own)), task)


@dataclass(frozen=True)
class Measure:
    """Measures a learner and what is deployed of its method on the tasks of a stream.

    text: tokens of a text from outside the stream in windows, whose perplexity is measured too (language models only). known:
    features that the learner still has; more are added. None if they are not to be kept. memos: what the method may remember of
    each batch, likewise.
    """

    learner: Learner
    deployed: Consolidation
    stream: Stream
    evaluation: EvaluationConfig
    batches: Batches
    text: Sequence[Tensor] = ()
    known: Features | None = None
    memos: dict[int, Memos] | None = None

    def before(self, state: RunState) -> RunState:
        """Returns the state with the predictions of a language model on all tasks before it has learnt any. Other models have
        no outputs yet."""
        if not isinstance(self.learner, LanguageLearner):
            return state
        with self.learner.folded():
            found = {j: self.completions(self.learner, task) for j, task in enumerate(self.stream)}
        counts = [(one.predictions.correct, len(one.predictions.labels_n)) for one in found.values()]
        language = LanguageState(zero_shot=tuple(counts), shown=())
        return replace(state, language=self._noted(self.learner, language, found))

    def after(self, state: RunState, task: int, last: Mapping[str, Tensor]) -> tuple[RunState, dict[str, Tensor]]:
        """Returns the state with what was measured after this task, and the predictions for all examples by number of their
        task. last: those after the task before."""
        measured = range(len(self.stream) if self.evaluation.unseen else task + 1)
        with self.learner.folded():  # folded once for all tasks
            if isinstance(self.learner, LanguageLearner):
                completions = {j: self.completions(self.learner, self.stream[j]) for j in measured}
                found = {j: one.predictions for j, one in completions.items()}
                assert state.language is not None
                state = replace(state, language=self._noted(self.learner, state.language, completions))
            else:
                found = {j: self.predictions(j) for j in measured}
        totals = {j: len(p.labels_n) for j, p in found.items()}
        inferred = [(found[j].task_inferred_n, j) for j in range(task + 1)]
        state = replace(
            state,
            matrix=state.matrix.with_row({j: (p.correct, totals[j]) for j, p in found.items()}),
            task_aware=state.task_aware.with_row({j: (p.task_aware_correct, totals[j]) for j, p in found.items()})
            if self.deployed.selects or not self.learner.generates
            else state.task_aware,  # a language model whose adapter does not depend on the task
            task_inference=(*state.task_inference, tuple(int(n.sum()) for n, _ in inferred if n is not None)),
        )
        flips = [negative_flips(last[str(j)].numpy(), found[j].predicted_n, found[j].labels_n) for j in range(task)]
        state = state.with_entry(
            negative_flips=sum(flips) / len(flips) if flips else None,
            accuracy_when_learnt=found[task].correct / max(totals[task], 1),
            class_correct=None if self.learner.generates else correct_by_class(found[task]),
        )
        return state, {str(j): torch.from_numpy(p.predicted_n) for j, p in found.items()}

    def predictions(self, number: int) -> Predictions:
        """Returns the predicted classes of a task's examples."""
        task = self.stream[number]
        return predict_all(
            self.learner,
            self._predictor(number),
            task.split(self.evaluation.split),
            lambda examples: self.batches(examples, False),
            task.name,
            task_aware=self.stream.task_aware,
        )

    def _predictor(self, number: int) -> Predictor:
        """Returns what predicts for a task: what is deployed, perhaps from known features or with what it remembers."""
        if self.known is not None:
            return Remembering(self.deployed, self.known.setdefault(number, []))
        return self.deployed if self.memos is None else Recalling(self.deployed, self.memos.setdefault(number, []))

    def completions(self, learner: LanguageLearner, task: Task) -> Completions:
        """Returns the predictions of a language model for the examples of a task."""
        examiner = Examiner(learner, self.deployed, task.name, self.evaluation.max_new_tokens)
        return examiner.ask(task.split(self.evaluation.split), lambda examples: self.batches(examples, True))

    def _perplexity(self, learner: LanguageLearner) -> float:
        """Returns the perplexity of the text. Raises TrainingError where it is not finite."""
        total, count = 0.0, 0
        for ids_t in self.text:
            ids_1t = ids_t[None].to(learner.device)
            inputs = {"input_ids": ids_1t, "attention_mask": torch.ones_like(ids_1t)}
            batch = Batch(inputs=inputs, labels_b=ids_1t.new_full((1,), -1))
            with self.deployed.predicting(learner, batch):
                lost, tokens = learner.text_loss(batch)
            total, count = total + lost, count + tokens
        found = float(torch.tensor(total / count, dtype=torch.float64).exp())
        if not math.isfinite(found):
            raise TrainingError(
                f"the perplexity of the text from outside the stream is {found}. Training diverged: use a smaller training.lr, "
                f"or training.clip=1."
            )
        return found

    def _noted(
        self, learner: LanguageLearner, before: LanguageState, found: Mapping[int, Completions]
    ) -> LanguageState:
        """Returns the state with one more row of predictions."""
        shown = {(one.task, one.row): one for one in before.shown}
        for j, completions in found.items():
            for one in completions.shown:
                new = Shown(task=j, row=one.row, prompt=one.prompt, expected=one.expected, predicted=())
                old = shown.get((j, one.row), new)
                shown[j, one.row] = replace(old, predicted=(*old.predicted, one.predicted))
        rouge = [found[j].rouge_l if j in found else None for j in range(len(self.stream))]
        perplexity = before.perplexity
        if self.text:
            perplexity = (*perplexity, self._perplexity(learner))
        return replace(
            before, shown=tuple(shown.values()), rouge_l=(*before.rouge_l, tuple(rouge)), perplexity=perplexity
        )
