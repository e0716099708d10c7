"""Prompts that a language model is to complete, or to rank options for, without a known completion.

They are rendered and tokenised as those of instructions are. They are never cut: a prompt that is too long is refused.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lamina.data.instruction_rows import row_of
from lamina.data.instruction_table import Form, Renderer
from lamina.data.instruction_tokens import InstructionTokens, ragged
from lamina.data.records import Columns
from lamina.data.tokens import check_vocabulary, limit_of, load_tokenizer, reason_of
from lamina.errors import DataError

Chat: TypeAlias = Sequence[Mapping[str, str]]
"""Messages: {role, content}."""
_STAND_IN = "x"
"""Stands for the completion."""


class TooLong(DataError):
    """A prompt has more tokens than the backbone has positions for. tokens: how many, options included."""

    def __init__(self, message: str, tokens: int) -> None:
        super().__init__(message)
        self.tokens = tokens


def stop_tokens(own: Iterable[int], module: Any) -> tuple[int, ...]:
    """Returns the tokens that end a text: those that completions end with, and those that the base's generation_config.json
    names. own: of the completions. module: of the backbone."""
    named = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    named = [named] if isinstance(named, int) else named or ()
    return tuple(dict.fromkeys((*own, *named)))


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as token ids."""

    ids: NDArray[np.int32]
    options: tuple[str, ...] = ()
    """The texts to rank; empty where text is to be generated."""
    option_ids: tuple[NDArray[np.int32], ...] = ()
    spaced: bool = False
    """Whether completions begin with a space that is no part of their text."""


class PromptReader:
    """Turns texts and chats into prompts for a language model.

    module: of the backbone, which may name further tokens that end a text. Raises DataError for a tokenizer that cannot be
    used.
    """

    def __init__(
        self,
        tokenizer: Path | str,
        *,
        positions: int | None,
        vocabulary: int | None,
        form: Form = "plain",
        module: Any = None,
    ) -> None:
        self.name, self.vocabulary, self.form = tokenizer, vocabulary, form
        self.tokenise: Any = load_tokenizer(tokenizer)
        self._lock = threading.Lock()
        """Fast tokenizers refuse two threads at a time."""
        self._decoder: Any = load_tokenizer(tokenizer)
        """One of its own: else the text that is generated would wait while a long prompt is tokenised."""
        self._decoding = threading.Lock()
        self._renderers: dict[Form, Renderer] = {
            "plain": Renderer(self.tokenise, tokenizer, "plain"),
            "chat": Renderer(self.tokenise, tokenizer, "chat"),
        }
        limit = limit_of(self.tokenise, tokenizer)
        self.positions = limit if positions is None else min(limit, positions)
        """Most tokens of a prompt and its completion."""
        eos = int(self.tokenise.eos_token_id)
        self.pad_id = int(self.tokenise.pad_token_id if self.tokenise.pad_token_id is not None else eos)
        ends = {eos, self._end_of_turn()} if self.chats else {eos}
        self.stops = stop_tokens(sorted(ends), module)
        """Tokens that end a completion."""

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self.tokenise.chat_template)

    def _end_of_turn(self) -> int:
        row = row_of({"prompt": _STAND_IN, "completion": _STAND_IN}, Columns(), "a chat")
        try:
            rendered = self._renderers["chat"].render(row, "a chat")
        except (
            DataError
        ):  # a template that demands, for example, a system prompt; whatever is asked later is judged then
            return int(self.tokenise.eos_token_id)
        (ids,) = self._renderers["chat"].ids([rendered.completion])
        return int(ids[-1]) if rendered.ended else int(self.tokenise.eos_token_id)

    def read(
        self, prompt: str | Chat, options: Sequence[str] = (), *, chat: bool | None = None, where: str = "the request"
    ) -> Prompt:
        """Returns a prompt as token ids.

        options: texts to rank; without them, text is to be generated. chat: whether a text is rendered as one message of a
        user; by default as `data.form` says. Raises DataError where it is blank, no text, or refused by the chat template, and
        for options that are blank or not distinct; also for a text of a chat that holds a special token, which could pretend to
        be another turn. Raises TooLong where the backbone has no position for a completion.
        """
        if isinstance(prompt, str) and not prompt.strip():
            raise DataError(f"the prompt of {where} is blank. Give a text")
        form: Form = self.form if chat is None else "chat" if chat else "plain"
        reply = options[0] if options else _STAND_IN
        record: dict[str, Any] = {"options": list(options) or None}
        if isinstance(prompt, str):
            record |= {"prompt": prompt, "completion": reply}
        else:
            record |= {"messages": [*map(dict, prompt), {"role": "assistant", "content": reply}]}
        rendered = (renderer := self._renderers[form]).render(row_of(record, Columns(), where), where)
        try:
            with self._lock:
                ids, *option_ids = renderer.ids([rendered.prompt, *rendered.options])
        except Exception as error:  # the tokenizers library raises bare exceptions
            raise DataError(f"the tokenizer {self.name} cannot tokenise {where} ({reason_of(error)})") from error
        asked = np.array(ids if rendered.chat else [*renderer.before, *ids], np.int32)
        if not len(asked):
            raise DataError(f"{where} comes to no token. Give a text")
        ending = [] if rendered.ended else [self.tokenise.eos_token_id]
        listed = tuple(np.array([*option, *ending], np.int32) for option in option_ids)
        if self.vocabulary is not None:
            check_vocabulary(self.tokenise, np.concatenate([asked, *listed]), self.vocabulary, self.name)
        longest = max(map(len, listed), default=1)
        if len(asked) + longest > self.positions:
            what = "its longest option" if listed else "a completion"
            raise TooLong(
                f"{where} has {len(asked)} tokens, and {what} needs {longest} more; the backbone has positions for "
                f"{self.positions}. Shorten it",
                len(asked) + longest,
            )
        spaced = not rendered.chat and rendered.completion[:1] == " "
        return Prompt(asked, tuple(options), listed, spaced)

    def questions(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Returns these prompts as the inputs of one batch of questions, padded on the right."""
        sizes = [len(prompt.option_ids) for prompt in prompts]
        table = InstructionTokens(
            prompts=ragged([prompt.ids for prompt in prompts]),
            completions=ragged([np.zeros(0, np.int32) for _ in prompts]),
            options=ragged([ids for prompt in prompts for ids in prompt.option_ids]),
            set_starts=np.cumsum([0, *sizes], dtype=np.int64),
            sets_n=np.arange(len(prompts)),
            right_n=np.full(len(prompts), -1),
            stops=self.stops,
            pad_id=self.pad_id,
            max_length=self.positions,
        )
        return table.questions(np.arange(len(prompts)))[0]

    def text(self, tokens: Sequence[int]) -> str:
        """Returns these tokens as text, without special tokens."""
        with self._decoding:
            return str(self._decoder.decode(list(tokens), skip_special_tokens=True))
