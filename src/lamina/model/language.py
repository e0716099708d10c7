"""LanguagePredictor: one version of a language model in memory, ready to complete prompts and to rank options.

Shape letters: n examples, b batch, m options.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lamina.data import Chat, Prompt, PromptReader
from lamina.data.instruction_rows import check_options
from lamina.engine.completions import Examiner, questions
from lamina.engine.consolidate import Consolidation
from lamina.errors import ConfigError, DataError, ModelError, TrainingError
from lamina.learner import LanguageLearner, Learner
from lamina.model.deployed import Deployed
from lamina.model.gate import Outcomes
from lamina.types import Batch, Examples, Ints

INCOMPLETE = "\ufffd"
"""Stands in decoded text for bytes that are no character yet."""
End = Literal["stop", "length"]


class Ranked(NamedTuple):
    """An option of a prompt."""

    option: str
    log_likelihood: float
    """log p(option | prompt), its end included."""
    probability: float
    """Softmax of the log-likelihoods of all options: how they compare, not how likely any of them is."""


@dataclass(frozen=True)
class Completion:
    """The completion of one prompt: generated text, or the ranked options; or why there is none."""

    text: str = ""
    """Generated; of ranked options, the best one."""
    ended: End | None = None
    """stop: the model or a stop text ended it. length: it reached the most tokens. None where nothing was generated, or where
    it was broken off."""
    prompt_tokens: int = 0
    tokens: int = 0
    """Generated tokens, without the one that ends a text."""
    options: tuple[Ranked, ...] = ()
    """The best first."""
    error: str | None = None


@dataclass(frozen=True)
class Asked:
    """A prompt, and how much may be generated for it. stop: texts that end the completion, and are no part of it."""

    prompt: Prompt
    most: int
    stop: tuple[str, ...] = ()


@dataclass(eq=False)
class Writing:
    """A completion while it is generated. decode: turns tokens into text."""

    asked: Asked
    decode: Callable[[Sequence[int]], str]
    stops: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    """What is certain by now."""
    sent: str = ""
    ended: End | None = None
    broken_off: bool = False

    @property
    def done(self) -> bool:
        return self.ended is not None or self.broken_off

    def add(self, token: int) -> str:
        """Take the next token. Returns the text that is certain by now and was not returned before."""
        if token in self.stops:
            self.ended = "stop"
        else:
            self.tokens.append(token)
            if len(self.tokens) >= self.asked.most:
                self.ended = "length"
        text = self._decoded()
        places = [place for stop in self.asked.stop if (place := text.find(stop)) >= 0]
        if places:
            self.ended, text = "stop", text[: min(places)]
        self.text = text.rstrip(INCOMPLETE) if self.ended else self._certain(text)
        if self.sent.startswith(self.text):
            return ""
        # Some tokenizers decode earlier tokens otherwise when more follow. What was sent cannot be taken back.
        same = sum(1 for _ in takewhile(bool, map(str.__eq__, self.sent, self.text)))
        new, self.sent = self.text[same:], self.text
        return new

    def _decoded(self) -> str:
        text = self.decode(self.tokens)
        return text.removeprefix(" ") if self.asked.prompt.spaced else text

    def _certain(self, text: str) -> str:
        """Returns the beginning of a text that no later token changes."""
        text = text.rstrip(INCOMPLETE)
        held = max((_overlap(text, stop) for stop in self.asked.stop), default=0)
        return text[: len(text) - held]

    def completion(self) -> Completion:
        return Completion(self.text, self.ended, len(self.asked.prompt.ids), len(self.tokens))


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of a text that is the beginning of a stop text."""
    return next((k for k in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:k])), 0)


class Unaware(NamedTuple):
    """What is deployed, where the task is never given."""

    deployed: Consolidation

    @property
    def selects(self) -> bool:
        return False

    def predicting(self, learner: Learner, batch: Batch, task: str | None = None) -> AbstractContextManager[None]:
        return self.deployed.predicting(learner, batch, task)


def outcomes_of(
    learner: Learner, deployed: Consolidation, examples: Examples, batch_size: int, longest: int
) -> Outcomes:
    """Returns which of these instructions are completed correctly: the best option is the right one, or the generated text is
    an exact match. longest: the most tokens that are generated."""
    assert isinstance(learner, LanguageLearner)
    if not len(examples):
        return Outcomes(examples.labels_n, examples.labels_n, None)

    def batches(part: Examples) -> Iterator[Batch]:
        for start in range(0, len(part), batch_size):
            yield questions(part, np.arange(start, min(start + batch_size, len(part)))).to(learner.device)

    found = Examiner(learner, Unaware(deployed), "", longest).ask(examples, batches)
    right_n = found.predictions.predicted_n == found.predictions.labels_n
    predicted_n: Ints = np.where(right_n, examples.labels_n, -1)
    return Outcomes(examples.labels_n, predicted_n, None, found.rouge_l)


def first_milliseconds(learner: Learner, deployed: Consolidation, examples: Examples, repeats: int = 7) -> float:
    """Returns the least time of one prediction for the first of these instructions: to rank its options, or to the first token
    of a text."""
    assert isinstance(learner, LanguageLearner)
    batch = questions(examples, np.arange(1)).to(learner.device)
    ranked, times = batch.inputs["option_ids"].shape[1] > 0, []
    with learner.folded():
        for _ in range(repeats):
            started = time.perf_counter()
            with deployed.predicting(learner, batch):
                if ranked:
                    learner.option_scores(batch).cpu()
                else:
                    learner.generate(batch, 1, (), 0)
            times.append(time.perf_counter() - started)
    return 1000 * min(times)


class LanguagePredictor(Deployed):
    """A version of a language model in memory.

    Raises ModelError for a version without a task, and DataError for a tokenizer that cannot be used.
    """

    learner: LanguageLearner

    def prepare(self) -> None:
        backbone = self.backbone
        if backbone.tokenizer is None:
            raise ModelError(f"backbone {backbone.name!r} has no tokenizer beside its weights. Put it there.")
        self.reader = PromptReader(
            backbone.tokenizer,
            positions=backbone.positions,
            vocabulary=backbone.vocabulary,
            form=self.config.data.form,
            module=backbone.module,
        )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks that it has learnt."""
        return tuple(self.learner.head.tasks)

    # -- predictions --------------------------------------------------------------------------------------------------

    def complete(
        self,
        prompts: Iterable[str | Chat],
        options: Sequence[str] | Sequence[Sequence[str]] | None = None,
        *,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        chat: bool | None = None,
        each: Callable[[int, str], bool] | None = None,
    ) -> list[Completion]:
        """Returns a completion of each prompt, a text or a chat; one that cannot be read has an error.

        options: texts to rank, for all prompts or one list for each; without them, text is generated. max_new_tokens: by
        default evaluation.max_new_tokens. stop: a text that ends a completion, or several. chat: whether texts are
        rendered with the chat template; by default as data.form says. each: is called with the number of a prompt and its
        newest text; returns whether to break off. Raises ConfigError for a
        max_new_tokens that is not allowed, and for an empty stop text.
        """
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stops:
            raise ConfigError("stop holds an empty text, which would end every completion at once. Leave it out.")
        asked = [one if isinstance(one, str) else tuple(one) for one in prompts]
        most = self.config.evaluation.max_new_tokens if max_new_tokens is None else max_new_tokens
        if max_new_tokens is not None and not (isinstance(most, int) and 1 <= most <= self.reader.positions):
            raise ConfigError(
                f"max_new_tokens is {most!r}; allowed are 1 to {self.reader.positions}, the positions that the backbone has "
                f"for prompt and completion together. Leave it out for {self.config.evaluation.max_new_tokens}."
            )
        found: list[Completion] = [Completion()] * len(asked)
        ranked: list[int] = []
        written: list[int] = []
        read: dict[int, Prompt] = {}
        for k, own in zip(range(len(asked)), _each_options(options, len(asked)), strict=True):
            try:
                where = "the request" if len(asked) == 1 else f"request {k + 1}"
                read[k] = self.reader.read(asked[k], own, chat=chat, where=where)
            except DataError as error:
                found[k] = Completion(error=str(error))
                continue
            (ranked if own else written).append(k)
        size = self.config.evaluation.batch_size
        for numbers, predict in ((ranked, self._rank), (written, self._write)):
            for start in range(0, len(numbers), size):
                part = numbers[start : start + size]
                for k, one in zip(part, predict([Asked(read[k], most, stops) for k in part], part, each), strict=True):
                    found[k] = one
        return found

    def _write(
        self, asked: Sequence[Asked], numbers: Sequence[int], each: Callable[[int, str], bool] | None
    ) -> list[Completion]:
        return self.generate(asked, None if each is None else lambda k, text: each(numbers[k], text))

    def _rank(
        self, asked: Sequence[Asked], numbers: Sequence[int], each: Callable[[int, str], bool] | None
    ) -> list[Completion]:
        del numbers, each
        return self.rank([one.prompt for one in asked])

    def rank(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """Returns the options of each prompt of a batch, the best first. Raises TrainingError for likelihoods that are not
        finite."""
        batch = self._batch(prompts)
        with self.lock, self.learner.folded(), self.consolidation.predicting(self.learner, batch):
            scores_bm = self.learner.option_scores(batch).cpu()
        found = []
        for prompt, scores_m in zip(prompts, scores_bm, strict=True):
            own_m = scores_m[: len(prompt.options)]
            if not torch.isfinite(own_m).all():
                raise TrainingError(
                    "a log-likelihood is NaN or infinite: the weights are damaged. Go back with `lamina rollback`."
                )
            rows = zip(prompt.options, own_m.tolist(), own_m.softmax(0).tolist(), strict=True)
            ranked = sorted((Ranked(*row) for row in rows), key=lambda one: -one.log_likelihood)
            found.append(Completion(ranked[0].option, None, len(prompt.ids), 0, tuple(ranked)))
        return found

    def generate(self, asked: Sequence[Asked], each: Callable[[int, str], bool] | None = None) -> list[Completion]:
        """Returns the completions of a batch of prompts, greedily. each: is called with the position of a prompt in the batch
        and its newest text; returns whether to break it off."""
        room = [min(one.most, self.reader.positions - len(one.prompt.ids)) for one in asked]
        writings = [
            Writing(Asked(one.prompt, most, one.stop), self.reader.text, self.reader.stops)
            for one, most in zip(asked, room, strict=True)
        ]
        batch = self._batch([one.prompt for one in asked])

        def take(token_b: Tensor) -> Tensor:
            for k, (writing, token) in enumerate(zip(writings, token_b.tolist(), strict=True)):
                if writing.done:
                    continue
                new = writing.add(token)
                if each is not None and each(k, new):
                    writing.broken_off = True
            return torch.tensor([writing.done for writing in writings], device=token_b.device)

        with self.lock, self.learner.folded(), self.consolidation.predicting(self.learner, batch):
            self.learner.generate(batch, max(room), self.reader.stops, self.reader.pad_id, take)
        return [writing.completion() for writing in writings]

    def _batch(self, prompts: Sequence[Prompt]) -> Batch:
        labels_b = torch.zeros(len(prompts), dtype=torch.int64)
        return Batch(inputs=self.reader.questions(prompts), labels_b=labels_b).to(self.learner.device)

    def check_finite(self) -> None:
        """Raises TrainingError where the log-likelihood of a text is not finite."""
        options = [" ".join(("one", "two", "three")[: k + 1]) for k in range(2)]
        self.rank([self.reader.read("Count.", options, chat=False)])

    # -- measuring ----------------------------------------------------------------------------------------------------

    def outcomes(self, examples: Examples) -> Outcomes:
        """Returns which of these instructions are completed correctly."""
        section = self.config.evaluation
        with self.lock:
            return outcomes_of(self.learner, self.consolidation, examples, section.batch_size, section.max_new_tokens)

    def milliseconds(self, examples: Examples, repeats: int = 7) -> float:
        """Returns the least time of one prediction, for the first of these instructions."""
        with self.lock:
            return first_milliseconds(self.learner, self.consolidation, examples, repeats)


def _each_options(options: Sequence[str] | Sequence[Sequence[str]] | None, count: int) -> list[Sequence[str]]:
    """Returns the options of every prompt."""
    if options is None:
        return [()] * count
    if isinstance(options, str):
        raise DataError(f"options is the text {options!r}. Give a list of texts.")
    if all(isinstance(one, str) for one in options):
        return [check_options(options, "options")] * count if options else [()] * count
    if len(options) != count:
        raise DataError(
            f"there are {len(options)} lists of options for {count} prompts. Give one list for each prompt."
        )
    return [list(one) for one in options]
