"""Token ids of instructions, and the batches that are made of them.

Shape letters: n rows, b rows of a batch, t tokens, m options, s tokens of an option.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamina.data.tokens import MULTIPLE
from lamina.types import Augment, Instruction, Ints


@dataclass(frozen=True)
class Ragged:
    """Lists of token ids, one after another; list k is ids[starts[k] : starts[k + 1]]."""

    ids: NDArray[np.int32]
    starts: Ints

    def __len__(self) -> int:
        return len(self.starts) - 1

    def lengths(self, rows: Ints) -> Ints:
        return self.starts[rows + 1] - self.starts[rows]

    def row(self, k: int) -> NDArray[np.int32]:
        return self.ids[self.starts[k] : self.starts[k + 1]]


def ragged(lists: Sequence[NDArray[np.int32]]) -> Ragged:
    """Returns these lists of token ids, one after another."""
    starts = np.cumsum([0, *map(len, lists)], dtype=np.int64)
    return Ragged(np.concatenate([np.zeros(0, np.int32), *lists]), starts)


def cut(ids: NDArray[np.int32], room: int) -> NDArray[np.int32]:
    """Returns these tokens without their middle, if they are more than there is room for."""
    last = room // 2
    return ids if len(ids) <= room else np.concatenate([ids[: room - last], ids[len(ids) - last :]])


class InstructionTokens:
    """Token ids of prompts, completions and options, and how they are padded.

    options: of all sets of options; set k has the options set_starts[k] to set_starts[k + 1]. sets_n: the set of every row, -1
    for none. right_n: the position of the right option, -1 for none. stops: tokens that completions end with. max_length: the
    most tokens of a row. tokenise: the tokenizer that made the ids.
    """

    augments = False

    def __init__(
        self,
        *,
        prompts: Ragged,
        completions: Ragged,
        options: Ragged,
        set_starts: Ints,
        sets_n: Ints,
        right_n: Ints,
        stops: tuple[int, ...],
        pad_id: int,
        max_length: int,
        tokenise: Any = None,
    ) -> None:
        self.prompts, self.completions, self.options = prompts, completions, options
        self.set_starts, self.sets_n, self.right_n = set_starts, sets_n, right_n
        self.stops, self.pad_id, self.max_length, self.tokenise = stops, pad_id, max_length, tokenise

    def __len__(self) -> int:
        return len(self.prompts)

    def lengths(self, rows: Ints) -> Ints:
        lengths_b: Ints = np.minimum(self.prompts.lengths(rows) + self.completions.lengths(rows), self.max_length)
        return lengths_b

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns these tokens as text, without special tokens."""
        return str(self.tokenise.decode(list(tokens), skip_special_tokens=True))

    def expected(self, row: int) -> str:
        """Returns the completion of a row as its tokens read, without special tokens and surrounding white space."""
        return self.decode(self.completions.row(row).tolist()).strip()

    def inputs(self, rows: Ints, augment: Augment | None) -> dict[str, Tensor]:  # noqa: ARG002 - texts have no augmentation
        """Returns `input_ids`, `attention_mask` and `completion_mask` (b, t) int64, padded on the right to the longest, rounded
        up to a multiple of 8 and at most `max_length`."""
        completions = [self.completions.row(k) for k in rows]
        prompts = [
            cut(self.prompts.row(k), self.max_length - len(ids)) for k, ids in zip(rows, completions, strict=True)
        ]
        inputs = self._padded([np.concatenate(both) for both in zip(prompts, completions, strict=True)])
        place_t = np.arange(inputs["input_ids"].shape[1])
        asked_bt = place_t < np.array([len(ids) for ids in prompts])[:, None]
        given_bt = place_t < self.lengths(rows)[:, None]
        return {**inputs, "completion_mask": torch.from_numpy((given_bt & ~asked_bt).astype(np.int64))}

    def questions(self, rows: Ints) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the prompts, as `inputs` does, with `option_ids` and `option_mask` (b, m, s) int64; and the position (b,) of
        the right option, -1 where a row has no options, or its completion is none of them."""
        sets = [self.option_ids(k) for k in rows]
        m = max(map(len, sets), default=0)
        s = max((len(ids) for options in sets for ids in options), default=0)
        ids_bms = np.full((len(rows), m, s), self.pad_id, np.int64)
        mask_bms = np.zeros((len(rows), m, s), np.int64)
        for b, options in enumerate(sets):
            for k, ids in enumerate(options):
                ids_bms[b, k, : len(ids)] = ids
                mask_bms[b, k, : len(ids)] = 1
        inputs = self._padded([self.prompts.row(k) for k in rows])
        options_ = {"option_ids": torch.from_numpy(ids_bms), "option_mask": torch.from_numpy(mask_bms)}
        return {**inputs, **options_}, torch.from_numpy(self.right_n[rows])

    def option_ids(self, row: int) -> list[NDArray[np.int32]]:
        """The token ids of the options of a row."""
        k = int(self.sets_n[row])
        return [] if k < 0 else [self.options.row(o) for o in range(self.set_starts[k], self.set_starts[k + 1])]

    def _padded(self, lists: list[NDArray[np.int32]]) -> dict[str, Tensor]:
        lengths_b = np.array([len(ids) for ids in lists], np.int64)
        longest = int(lengths_b.max(initial=1))
        t = min(-(-longest // MULTIPLE) * MULTIPLE, self.max_length)
        mask_bt = np.arange(t) < lengths_b[:, None]
        ids_bt = np.full((len(lists), t), self.pad_id, np.int64)
        if lists:
            ids_bt[mask_bt] = np.concatenate(lists)
        return {"input_ids": torch.from_numpy(ids_bt), "attention_mask": torch.from_numpy(mask_bt.astype(np.int64))}


class KeptInstructions(InstructionTokens):
    """Instructions that are kept as token ids and as text, without the data that they come from.

    instructions: of every row. The other arguments are those of `InstructionTokens`.
    """

    def __init__(self, *, instructions: Sequence[Instruction], **tokens: Any) -> None:
        super().__init__(**tokens)
        self.instructions = tuple(instructions)

    def read(self, row: int) -> Instruction:
        """Returns the instruction of a row as text."""
        return self.instructions[row]
