"""Tokenises every text once. Shape letters: n texts, b texts of a batch, t tokens."""

import math
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lamina.data.names import shown
from lamina.data.records import Source
from lamina.data.summary import count
from lamina.errors import ConfigError, DataError
from lamina.types import Augment, Ints

_CHUNK = 4096
MULTIPLE = 8
_FIRST_READ = 4096
_PER_TOKEN = 32
"""Characters of a text that are read first, and for each token that is kept."""
_WINDOW = 512
LONGEST = 2**20
"""Characters of a text that are ever read."""


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
        t = min(-(-longest // MULTIPLE) * MULTIPLE, self.max_length)
        mask_bt = np.arange(t) < lengths_b[:, None]
        ids_bt = np.full((len(rows), t), self.pad_id, np.int64)
        if len(rows):
            # A mask selects in row order, which is the order of the texts put end to end.
            ids_bt[mask_bt] = np.concatenate([self.ids[self.starts[row] : self.starts[row + 1]] for row in rows])
        return {"input_ids": torch.from_numpy(ids_bt), "attention_mask": torch.from_numpy(mask_bt.astype(np.int64))}


def tokenise_once(
    source: Source,
    tokenizer: Path | str | Any,
    max_length: int = 128,
    *,
    positions: int | None = None,
    vocabulary: int | None = None,
) -> TokenTable:
    """The token ids of every text of a source, cut at `max_length` tokens (special tokens included).

    tokenizer: a folder, a name on the Hugging Face hub, or what `load_tokenizer` returned. positions: the most tokens the
    backbone has positions for. vocabulary: the number of tokens its embedding has.

    Raises DataError if there is no tokenizer or it is damaged, for a text without a token, and for a token beyond the
    vocabulary; ConfigError if max_length is more than tokenizer or backbone allow, or leaves no room for a text.
    """
    tokenise = load_tokenizer(tokenizer) if isinstance(tokenizer, Path | str) else tokenizer
    tokenizer = tokenizer if isinstance(tokenizer, Path | str) else str(tokenise.name_or_path)
    special = int(tokenise.num_special_tokens_to_add())
    check_length(max_length, special, limit_of(tokenise, tokenizer), positions, tokenizer)
    pieces: list[NDArray[np.int32]] = []
    lengths: list[int] = []
    for start in range(0, len(source), _CHUNK):
        rows = range(start, min(start + _CHUNK, len(source)))
        texts = [_text(source, row) for row in rows]
        try:
            ids_by_row = _ids(tokenise, texts, max_length)
        except Exception as error:
            # The tokenizers library raises bare exceptions, for example where the token for unknown words is missing.
            raise DataError(
                f"the tokenizer {tokenizer} cannot tokenise the texts from {source.where(rows[0])} to"
                f" {source.where(rows[-1])} ({reason_of(error)}). Correct its tokenizer.json, or use another tokenizer"
            ) from error
        empty = next((row for row, ids in zip(rows, ids_by_row, strict=True) if not len(ids)), None)
        if empty is not None:
            raise DataError(f"{source.where(empty)} comes to no token. Remove the row, or put a text in it")
        lengths.extend(len(ids) for ids in ids_by_row)
        pieces.append(np.fromiter((token for ids in ids_by_row for token in ids), np.int32))
        if vocabulary is not None:
            check_vocabulary(tokenise, pieces[-1], vocabulary, tokenizer)
    starts = np.cumsum([0, *lengths], dtype=np.int64)
    # Padding is masked, so a tokenizer without a padding token may use any.
    pad_id = tokenise.pad_token_id if tokenise.pad_token_id is not None else 0
    if vocabulary is not None:
        check_vocabulary(tokenise, np.array([pad_id]), vocabulary, tokenizer)
    return TokenTable(np.concatenate(pieces), starts, int(pad_id), max_length)


def limit_of(tokenise: Any, tokenizer: Path | str) -> int:
    """Returns the most tokens that the tokenizer allows; 10^30 without a limit. Raises DataError for what is no number."""
    said = tokenise.model_max_length
    if isinstance(said, bool) or not isinstance(said, int | float) or not 1 <= said < math.inf:
        raise DataError(
            f"the tokenizer {tokenizer} has the model_max_length {shown(repr(said))} in tokenizer_config.json; allowed is a"
            " number, 1 or more. Correct it, or remove it"
        )
    return int(said)


def check_length(max_length: int, special: int, limit: int, positions: int | None, tokenizer: Path | str) -> None:
    """Raises ConfigError for a max_length that tokenizer or backbone do not allow, or that leaves no room for a text.

    special: how many tokens of its own the tokenizer adds to every text.
    """
    most = limit if positions is None else min(limit, positions)
    if special < max_length <= most:
        return
    if max_length <= special:
        raise ConfigError(
            f"data.max_length is {max_length}; the tokenizer {tokenizer} adds {count(special, 'token')} of its own to every"
            f" text, and the text needs one at least. Set it to at least {special + 1}"
        )
    told = f"the tokenizer {tokenizer} allows " + (f"1 to {limit}" if limit < 2**31 else "any number")
    if positions is not None:
        told += f" and the backbone has positions for {positions}"
    raise ConfigError(f"data.max_length is {max_length}; {told}. Set it to at most {most}")


def check_vocabulary(tokenise: Any, ids: NDArray[Any], vocabulary: int, tokenizer: Path | str) -> None:
    """Raises DataError, naming the token, for an id that the embedding has no entry for."""
    beyond = ids[(ids < 0) | (ids >= vocabulary)]
    if len(beyond):
        token = str(tokenise.convert_ids_to_tokens(int(beyond[0])))
        raise DataError(
            f"the tokenizer {tokenizer} gives the token {shown(token)!r} the id {beyond[0]}; the backbone's embedding has the"
            f" ids 0 to {vocabulary - 1}. Use the tokenizer that belongs to the weights"
        )


def _text(source: Source, row: int) -> str:
    text = str(source.read(row))[:LONGEST]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{source.where(row)} is not valid Unicode ({error.reason}). Correct the text") from error
    return text


def _ids(tokenise: Any, texts: list[str], max_length: int) -> list[list[int]]:
    """The token ids of these texts. Of a long text only its beginning is read: as much as decides the tokens kept."""

    def of(cut: list[str]) -> list[list[int]]:
        told = tokenise(
            cut, truncation=True, max_length=max_length, return_attention_mask=False, return_token_type_ids=False
        )
        ids: list[list[int]] = told["input_ids"]
        return ids

    read = max(_FIRST_READ, _PER_TOKEN * max_length)
    found = of([text[:read] for text in texts])
    open_rows = [k for k, text in enumerate(texts) if len(text) > read]
    while open_rows:
        # Tokens that fill the row, and stay the same if twice as much is read, are those of the whole text.
        read *= 2
        longer = of([texts[k][:read] for k in open_rows])
        still = [
            k
            for k, ids in zip(open_rows, longer, strict=True)
            if len(texts[k]) > read and (len(ids) < max_length or ids != found[k])
        ]
        for k, ids in zip(open_rows, longer, strict=True):
            found[k] = ids
        open_rows = still
    return found


def reason_of(error: Exception) -> str:
    """Returns the first line of what an error says."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def load_tokenizer(where: Path | str) -> Any:
    """Returns the tokenizer of a folder, or of a name on the Hugging Face hub. Raises DataError if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(where), trust_remote_code=False)
    except Exception as error:
        # The tokenizers library raises bare exceptions for damaged files.
        raise DataError(
            f"no tokenizer can be loaded from {where} ({reason_of(error)}). Point at a folder with tokenizer.json (or the files"
            " save_pretrained writes), or at a name on the Hugging Face hub"
        ) from error


def text_windows(
    file: str | None, tokenizer: Path | str, *, positions: int | None = None, vocabulary: int | None = None
) -> tuple[Tensor, ...]:
    """Returns the tokens of a text file, or of the short English text that lamina carries, in windows (t,) of at most 512
    tokens. Every window begins with what the tokenizer puts before a text, such as BOS.

    Raises DataError for a file that cannot be read, or that comes to fewer than two tokens.
    """
    name = "the text that lamina carries" if file is None else f"evaluation.text = {file!r}"
    try:
        carried = resources.files("lamina") / "assets" / "general.txt"
        text = carried.read_text("utf-8") if file is None else Path(file).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{name} cannot be read as UTF-8 text ({reason_of(error)}). Correct the path, or leave it out"
        ) from error
    tokenise = load_tokenizer(tokenizer)
    ids = [int(token) for token in tokenise(text[:LONGEST], add_special_tokens=False, verbose=False)["input_ids"]]
    if len(ids) < 2:
        raise DataError(f"{name} comes to {count(len(ids), 'token')}; two are needed at least")
    whole = [int(token) for token in tokenise(text[:LONGEST], verbose=False)["input_ids"]]
    before = whole[: next((k for k in range(len(whole)) if whole[k : k + len(ids)] == ids), 0)]
    if vocabulary is not None:
        check_vocabulary(tokenise, np.array([*before, *ids]), vocabulary, tokenizer)
    size = min(_WINDOW, positions or _WINDOW) - len(before)
    parts = [before + ids[start : start + size] for start in range(0, len(ids), size)]
    return tuple(torch.tensor(part) for part in parts if len(part) > 1)
