"""Tokenises every text once. Shape letters: n texts, b texts of a batch, t tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamina.data.records import Source
from lamina.errors import ConfigError, DataError
from lamina.types import Augment, Ints

_CHUNK = 4096
_MULTIPLE = 8


class TokenTable:
    """Token ids of all texts, one after another; row k is ids[starts[k] : starts[k + 1]]."""

    augments = False

    def __init__(self, ids: NDArray[np.int32], starts: Ints, pad_id: int, max_length: int) -> None:
        self.ids = ids
        self.starts = starts
        self.pad_id = pad_id
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.starts) - 1

    def lengths(self, rows: Ints) -> Ints:
        return self.starts[rows + 1] - self.starts[rows]

    def inputs(self, rows: Ints, augment: Augment | None) -> dict[str, Tensor]:  # noqa: ARG002 - texts have no augmentation
        """`input_ids` and `attention_mask` (b, t) int64, padded to the longest, rounded up to a multiple of 8."""
        lengths_b = self.lengths(rows)
        longest = int(lengths_b.max(initial=1))
        # Few distinct lengths let kernels be reused; never more than the backbone has positions for.
        t = min(-(-longest // _MULTIPLE) * _MULTIPLE, self.max_length)
        mask_bt = np.arange(t) < lengths_b[:, None]
        ids_bt = np.full((len(rows), t), self.pad_id, np.int64)
        if len(rows):
            # A mask selects in row order, which is the order of the texts put end to end.
            ids_bt[mask_bt] = np.concatenate([self.ids[self.starts[row] : self.starts[row + 1]] for row in rows])
        return {"input_ids": torch.from_numpy(ids_bt), "attention_mask": torch.from_numpy(mask_bt.astype(np.int64))}


def tokenise_once(source: Source, tokenizer: Path | str, max_length: int = 128) -> TokenTable:
    """The token ids of every text of a source, cut at `max_length` tokens (special tokens included).

    tokenizer: a folder, or a name on the Hugging Face hub. Raises DataError if there is no tokenizer, ConfigError if
    max_length is not in what it allows.
    """
    tokenise = _tokenizer(tokenizer)
    limit = int(tokenise.model_max_length)
    if not 1 <= max_length <= limit:
        raise ConfigError(
            f"data.max_length is {max_length}; the tokenizer {tokenizer} allows 1 to {limit}. Set it to at most {limit}"
        )
    pieces: list[NDArray[np.int32]] = []
    lengths: list[int] = []
    for start in range(0, len(source), _CHUNK):
        texts = [str(source.read(i)) for i in range(start, min(start + _CHUNK, len(source)))]
        told = tokenise(
            texts, truncation=True, max_length=max_length, return_attention_mask=False, return_token_type_ids=False
        )
        lengths.extend(len(ids) for ids in told["input_ids"])
        pieces.append(np.fromiter((token for ids in told["input_ids"] for token in ids), np.int32))
    starts = np.cumsum([0, *lengths], dtype=np.int64)
    # Padding is masked, so a tokenizer without a padding token may use any.
    pad_id = tokenise.pad_token_id if tokenise.pad_token_id is not None else 0
    return TokenTable(np.concatenate(pieces), starts, int(pad_id), max_length)


def _tokenizer(where: Path | str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(where))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"no tokenizer can be loaded from {where} ({reason}). Point at a folder with tokenizer.json (or the files"
            " save_pretrained writes), or at a name on the Hugging Face hub"
        ) from error
