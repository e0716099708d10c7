"""Tokenises every instruction once.

Shape letters: n rows.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lamina.data.instruction_rows import rank_of, unicode_of
from lamina.data.instruction_tokens import InstructionTokens, cut, ragged
from lamina.data.names import shown
from lamina.data.records import Row, Source
from lamina.data.tokens import LONGEST, check_length, check_vocabulary, limit_of, load_tokenizer, reason_of
from lamina.errors import ConfigError, DataError
from lamina.types import SPLITS, Instruction, Ints, LabelledData

Form = Literal["plain", "chat"]
DEFAULT_LENGTH = 512
_CHUNK = 1024
_PROBES = ("a", "1", ".")
"""Texts that show what a tokenizer puts around a text. One of them comes to a token."""
_STAND_IN = "LaminaCompletion"
"""Stands for a completion while a chat template is asked what it writes around it."""


@dataclass(frozen=True)
class Rendered:
    """The texts of an instruction, as they are tokenised."""

    prompt: str
    completion: str
    options: tuple[str, ...]
    chat: bool
    """Whether the chat template made them, with all special tokens that belong there."""
    ended: bool
    """Whether the completion ends with the template's end of a turn."""


class Renderer:
    """What a tokenizer makes of instructions: their texts, and the tokens of these.

    Raises DataError for a tokenizer without a token for the end of a text (EOS); ConfigError for another form.
    """

    def __init__(self, tokenise: Any, name: Path | str, form: Form) -> None:
        if form not in ("plain", "chat"):
            raise ConfigError(f"data.form is {form!r}; allowed are plain and chat")
        if tokenise.eos_token_id is None:
            raise DataError(
                f"the tokenizer {name} has no token for the end of a text (EOS), with which every completion ends. Set"
                " eos_token in its tokenizer_config.json to the token that the model was trained with"
            )
        self.tokenise, self.name, self.form = tokenise, name, form
        probe, bare = next(
            ((probe, ids) for probe, ids in zip(_PROBES, self.ids(_PROBES), strict=True) if ids), (_PROBES[0], [])
        )
        whole = list(tokenise(probe)["input_ids"])
        places = [k for k in range(len(whole)) if whole[k : k + len(bare)] == bare]
        self.before: list[int] = whole[: places[0]] if places else []
        """What the tokenizer puts before a text, such as BOS."""
        first = tokenise.convert_ids_to_tokens(bare[:1])
        self.spaced = bool(first) and str(first[0]).startswith("\u2581")
        """Whether the tokenizer puts a space before every text by itself."""
        added = getattr(tokenise, "added_tokens_decoder", {}).values()
        self.special = frozenset({*tokenise.all_special_tokens, *(str(one) for one in added if one.special)} - {""})
        """Special tokens as text."""

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of texts, without special tokens around them."""
        if not texts:
            return []
        told = self.tokenise(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        found: list[list[int]] = told["input_ids"]
        return found

    def render(self, row: Row, where: str) -> Rendered:
        """Returns the texts of an instruction. Raises DataError where there is no chat template, or it fails, and for a text of
        a chat that holds a special token, which could pretend to be another turn.

        A completion of plain text that follows a prompt without white space at its end has a space in front. A completion
        of a chat is what the template writes after the start of the assistant's turn, without white space after its end of
        the turn.
        """
        for what, text in (("completion", row.completion), *(("option", option) for option in row.options)):
            unicode_of(text, what, where)
        if isinstance(row.prompt, str):
            unicode_of(row.prompt, "prompt", where)
        if isinstance(row.prompt, str) and self.form == "plain":
            glued = self.spaced or row.prompt[-1:].isspace()

            def after(text: str) -> str:
                return text if glued or text[:1].isspace() else f" {text}"

            options = tuple(map(after, row.options))
            return Rendered(row.prompt, after(row.completion), options, chat=False, ended=False)
        messages = [("user", row.prompt)] if isinstance(row.prompt, str) else list(row.prompt)
        self._refuse_special([*(content for _, content in messages), row.completion, *row.options], where)
        prompt = self._chat(messages, where, start=True)
        head, tail = self._around(messages, prompt, where)
        completion, *options_ = (f"{head}{text}{tail}" for text in (row.completion, *row.options))
        return Rendered(prompt, completion, tuple(options_), chat=True, ended=bool(tail))

    def _refuse_special(self, texts: Sequence[str], where: str) -> None:
        starts = {token[:1] for token in self.special}
        for text in texts:  # few texts hold the first character of any
            found = next((t for t in self.special if t in text), None) if starts & set(text) else None
            if found is not None:
                raise DataError(
                    f"{where} holds {shown(found)!r}, a special token of the tokenizer. In a chat only the template writes "
                    "those. Remove it"
                )

    def _around(self, messages: list[Any], prompt: str, where: str) -> tuple[str, str]:
        """What the template writes before a completion, after the start of the turn, and after it."""
        whole = self._chat([*messages, ("assistant", _STAND_IN)], where, start=False)
        continues = whole.startswith(prompt)
        head, found, tail = (whole[len(prompt) :] if continues else whole).rpartition(_STAND_IN)
        if not found:
            raise DataError(
                f"the chat template of the tokenizer {self.name} does not write the reply to {where}. Use another template, or,"
                " where prompts are texts, data.form=plain"
            )
        # Some templates start the turn differently where the reply is there already.
        return head if continues else "", tail.rstrip()

    def _chat(self, messages: Sequence[Any], where: str, *, start: bool) -> str:
        if not self.tokenise.chat_template:
            raise DataError(
                f"{where} is a chat, and the tokenizer {self.name} has no chat template. Use the tokenizer of a model that was"
                " trained on chats, put chat_template.jinja beside tokenizer.json, or, where prompts are texts, set"
                " data.form=plain"
            )
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            text = self.tokenise.apply_chat_template(turns, tokenize=False, add_generation_prompt=start)
        except Exception as error:
            # A template may raise anything, for example for a role that its model does not know.
            raise DataError(
                f"the chat template of the tokenizer {self.name} refuses {where} ({shown(reason_of(error), 200)}). Correct the"
                " messages, or the template"
            ) from error
        return str(text)


class InstructionTable(InstructionTokens):
    """Token ids of all prompts, completions and options.

    Prompts and completions are tokenised apart, so that the tokens of a prompt are the same in training and in ranking.
    Every completion and every option ends with EOS, or with the chat template's end of a turn.
    """

    def __init__(self, source: Source, renderer: Renderer, tokens: "_Tokens", *, pad_id: int, max_length: int) -> None:
        completions = ragged(tokens.completions)
        ends = np.unique(completions.starts[1:])
        super().__init__(
            prompts=ragged(tokens.prompts),
            completions=completions,
            options=ragged(tokens.options),
            set_starts=np.array([0, *tokens.set_ends], np.int64),
            sets_n=np.array(tokens.sets, np.int64),
            right_n=np.array(tokens.right, np.int64),
            stops=tuple(sorted({int(completions.ids[end - 1]) for end in ends if end})),
            pad_id=pad_id,
            max_length=max_length,
            tokenise=renderer.tokenise,
        )
        self.source, self.renderer = source, renderer
        self._read: dict[int, Instruction] = {}
        """Texts that were asked for: those of the test examples, evaluation after evaluation."""
        self.truncated_n = np.array(tokens.truncated, np.bool_)
        """Whether the middle of a prompt was cut, (n,)."""

    def read(self, row: int) -> Instruction:
        """Returns the instruction of a row as text. Its prompt is whole, also where the tokens are cut."""
        if row not in self._read:
            found = _row(self.source, row)
            prompt = self.renderer.render(found, self.source.where(row)).prompt
            self._read[row] = Instruction(prompt=prompt, completion=found.completion, options=found.options)
        return self._read[row]

    @property
    def digest(self) -> bytes:
        """A hash of all tokens: it changes with the tokenizer, its chat template, and how much is cut."""
        told = hashlib.blake2b(digest_size=16)
        for part in (self.prompts, self.completions, self.options):
            told.update(part.ids.tobytes() + part.starts.tobytes())
        return told.digest()


def tokenise_instructions(
    source: Source,
    tokenizer: Path | str | Any,
    *,
    max_length: int | None = None,
    positions: int | None = None,
    vocabulary: int | None = None,
    form: Form = "plain",
    used: Ints | None = None,
) -> InstructionTable:
    """Returns the token ids of every instruction of a source; of the rows that are `used` only, if they are given.

    A row has at most max_length tokens: the middle of a longer prompt is cut, never the completion or an option. None: 512,
    or as many as backbone and tokenizer allow, if that is less. The other arguments are those of `load_instructions`.

    Raises DataError if there is no tokenizer, it is damaged or has no EOS, for a completion that leaves no room for a
    prompt, and for a token beyond the vocabulary; ConfigError if max_length is more than tokenizer or backbone allow.
    """
    tokenise = load_tokenizer(tokenizer) if isinstance(tokenizer, Path | str) else tokenizer
    name = tokenizer if isinstance(tokenizer, Path | str) else str(tokenise.name_or_path)
    limit = limit_of(tokenise, name)
    if max_length is None:
        max_length = min(DEFAULT_LENGTH, limit, positions or DEFAULT_LENGTH)
    try:
        renderer = Renderer(tokenise, name, form)
    except (ConfigError, DataError):
        raise
    except Exception as error:
        raise _untokenised(name, f"the text {_PROBES[0]!r}", error) from error
    # Every completion ends with a token.
    check_length(max_length, len(renderer.before) + 1, limit, positions, name)
    pad_id = int(tokenise.pad_token_id if tokenise.pad_token_id is not None else tokenise.eos_token_id)
    if vocabulary is not None:
        check_vocabulary(tokenise, np.array([pad_id, *renderer.before]), vocabulary, name)
    tokens = _Tokens(renderer, max_length)
    wanted = np.arange(len(source)) if used is None else np.unique(used)
    for start in range(0, len(wanted), _CHUNK):
        rows = [int(row) for row in wanted[start : start + _CHUNK]]
        before, known = len(tokens.prompts), len(tokens.options)
        tokens.add([_row(source, row) for row in rows], [source.where(row) for row in rows])
        if vocabulary is not None:
            latest = [*tokens.prompts[before:], *tokens.completions[before:], *tokens.options[known:]]
            check_vocabulary(tokenise, np.concatenate(latest), vocabulary, name)
    tokens.spread(wanted, len(source))
    return InstructionTable(source, renderer, tokens, pad_id=pad_id, max_length=max_length)


def truncation(data: LabelledData) -> dict[str, int]:
    """Returns the number of prompts that were cut, by split. Raises TypeError where the data are no instructions."""
    if not isinstance(data.table, InstructionTable):
        raise TypeError("only instructions have prompts that are cut")
    return {name: int(data.table.truncated_n[data.splits_n == k].sum()) for k, name in enumerate(SPLITS)}


def _row(source: Source, row: int) -> Row:
    found = source.read(row)
    assert isinstance(found, Row)
    return found


def _untokenised(name: Path | str, what: str, error: Exception) -> DataError:
    # The tokenizers library raises bare exceptions, for example where the token for unknown words is missing.
    return DataError(
        f"the tokenizer {name} cannot tokenise {what} ({reason_of(error)}). Correct its tokenizer.json, or use another"
        " tokenizer"
    )


@dataclass
class _Tokens:
    """Collects the token ids of rows."""

    renderer: Renderer
    max_length: int
    prompts: list[NDArray[np.int32]] = field(default_factory=list)
    completions: list[NDArray[np.int32]] = field(default_factory=list)
    options: list[NDArray[np.int32]] = field(default_factory=list)
    set_ends: list[int] = field(default_factory=list)
    sets: list[int] = field(default_factory=list)
    right: list[int] = field(default_factory=list)
    truncated: list[bool] = field(default_factory=list)
    known: dict[tuple[str, ...], int] = field(default_factory=dict)
    """Options as they are tokenised, and the number of their set."""

    def add(self, rows: Sequence[Row], where: Sequence[str]) -> None:
        rendered = [self.renderer.render(row, place) for row, place in zip(rows, where, strict=True)]
        new = list(dict.fromkeys(r.options for r in rendered if r.options and r.options not in self.known))
        ended = {r.options: r.ended for r in rendered}
        try:
            prompts = self.renderer.ids([_within_reach(r.prompt) for r in rendered])
            completions = self.renderer.ids([r.completion for r in rendered])
            options = self.renderer.ids([option for options in new for option in options])
        except Exception as error:
            raise _untokenised(self.renderer.name, f"the rows from {where[0]} to {where[-1]}", error) from error
        at = 0
        for texts in new:
            self.options += [self._ended(ids, ended[texts]) for ids in options[at : at + len(texts)]]
            at += len(texts)
            self.known[texts] = len(self.set_ends)
            self.set_ends.append(len(self.options))
        for row, place, r, prompt, completion in zip(rows, where, rendered, prompts, completions, strict=True):
            self._add(row, place, r, prompt, completion)

    def spread(self, rows: Ints, count: int) -> None:
        """Make these the tokens of the given rows out of `count`; the others have none."""
        place = {int(row): k for k, row in enumerate(rows)}
        empty = np.zeros(0, np.int32)

        def at(values: list[Any], other: Any) -> list[Any]:
            return [values[place[row]] if row in place else other for row in range(count)]

        self.prompts, self.completions = at(self.prompts, empty), at(self.completions, empty)
        self.sets, self.right, self.truncated = at(self.sets, -1), at(self.right, -1), at(self.truncated, False)

    def _add(self, row: Row, where: str, rendered: Rendered, prompt: list[int], completion: list[int]) -> None:
        if not completion:
            raise DataError(f"the completion of {where} comes to no token. Remove the row, or put a text in it")
        asked = np.array(prompt if rendered.chat else [*self.renderer.before, *prompt], np.int32)
        if not len(asked):
            raise DataError(f"the prompt of {where} comes to no token. Remove the row, or put a text in it")
        given = self._ended(completion, rendered.ended)
        which = self.known[rendered.options] if rendered.options else -1
        first = self.set_ends[which - 1] if which > 0 else 0
        listed = self.options[first : self.set_ends[which]] if which >= 0 else []
        longest = max(len(given), *map(len, listed), 0)
        room = self.max_length - longest
        if room < 1:
            raise DataError(
                f"{where} has a completion or an option of {longest} tokens, its end included; data.max_length is"
                f" {self.max_length}, which leaves no room for the prompt of {len(asked)} tokens. Shorten it, or set"
                " data.max_length higher"
            )
        self.truncated.append(len(asked) > room or len(rendered.prompt) > LONGEST)
        # Without options, a prompt that is asked must not tell how long its completion is: it is cut for training only.
        self.prompts.append(cut(asked, room if listed else self.max_length - 1))
        self.completions.append(given)
        self.sets.append(which)
        self.right.append(rank_of(row.completion, row.options))

    def _ended(self, ids: list[int], ended: bool) -> NDArray[np.int32]:
        return np.array(ids if ended else [*ids, self.renderer.tokenise.eos_token_id], np.int32)


def _within_reach(prompt: str) -> str:
    """The prompt; of a very long one its beginning and its end, since the middle is cut in any case."""
    half = LONGEST // 2
    return prompt if len(prompt) <= LONGEST else prompt[:half] + prompt[-half:]
