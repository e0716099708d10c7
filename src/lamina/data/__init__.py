"""From what the user points at to labelled data: sources, decoded pixels, tokens, transforms, and the audit."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from lamina.data.audit import Audit, audit, render
from lamina.data.instruction_table import Form, InstructionTable, tokenise_instructions, truncation
from lamina.data.instruction_tokens import InstructionTokens, KeptInstructions, Ragged, ragged
from lamina.data.instructions import Message, Row, as_instructions, instructions_from
from lamina.data.pixels import PixelStore, decode_once, default_cache
from lamina.data.prompts import Chat, Prompt, PromptReader, TooLong
from lamina.data.sources import Columns, Source, from_arrays, open_source
from lamina.data.summary import as_dict, describe_source, difference, kinds
from lamina.data.tokens import TokenTable, load_tokenizer, text_windows, tokenise_once
from lamina.data.transforms import ImageTransform, PixelTable
from lamina.errors import ConfigError, DataError
from lamina.types import Augment, Ints, LabelledData, Table

__all__ = [
    "Audit",
    "Chat",
    "Columns",
    "Form",
    "ImageTransform",
    "InstructionTable",
    "InstructionTokens",
    "KeptInstructions",
    "Message",
    "PixelStore",
    "PixelTable",
    "Prompt",
    "PromptReader",
    "Ragged",
    "Row",
    "Source",
    "TokenTable",
    "TooLong",
    "as_dict",
    "as_instructions",
    "audit",
    "default_cache",
    "describe_source",
    "difference",
    "from_arrays",
    "instructions_from",
    "kinds",
    "load_images",
    "load_instructions",
    "load_texts",
    "load_tokenizer",
    "open_source",
    "ragged",
    "render",
    "text_windows",
    "tokenise_instructions",
    "tokenise_once",
    "truncation",
    "undecoded",
]


def load_images(
    source: Source,
    transform: ImageTransform,
    *,
    cache: Path | None = None,
    store_px: int | None = None,
    on_damaged: Literal["error", "skip"] = "error",
    progress: Callable[[int, int], None] | None = None,
) -> LabelledData:
    """The images of a source, decoded once, behind a transform. Rows are 0..n-1 of the images that are kept.

    cache: where decoded images are kept, `default_cache()` if None. store_px: the largest short side kept; if None,
    twice the transform's size (at least 64), so that a random crop of a quarter of the area still needs no enlarging.

    Raises DataError for texts, for a damaged image unless on_damaged is skip, and if skipping leaves none to train on;
    ConfigError for an on_damaged or store_px that is not allowed.
    """
    if source.kind != "image":
        raise DataError(
            f"{source.name} holds {kinds(source.kind)}, where images are needed. Use a backbone that takes them, or other data"
        )
    if on_damaged not in ("error", "skip"):
        raise ConfigError(f"data.on_damaged = {on_damaged!r}; allowed are error and skip")
    store_px = max(64, 2 * transform.size) if store_px is None else store_px
    if store_px < 1:
        raise ConfigError(f"store_px = {store_px}; it must be 1 or more")
    store, keep = decode_once(
        source, store_px=store_px, cache=cache or default_cache(), on_damaged=on_damaged, progress=progress
    )
    if (source.splits_n == 0).any() and not (source.splits_n[keep] == 0).any():
        raise DataError(f"no training image of {source.name} can be decoded; `lamina data check SOURCE` lists them")
    return _labelled(source, PixelTable(store, transform), keep, store.skipped)


def load_texts(
    source: Source,
    tokenizer: Path | str,
    *,
    max_length: int = 128,
    positions: int | None = None,
    vocabulary: int | None = None,
) -> LabelledData:
    """The texts of a source, tokenised once. Rows are those of the source.

    positions: the most tokens the backbone has positions for. vocabulary: the number of tokens its embedding has.

    Raises DataError for images, if there is no tokenizer, and for a token beyond the vocabulary; ConfigError for a
    max_length that tokenizer or backbone do not allow.
    """
    if source.kind != "text":
        raise DataError(
            f"{source.name} holds {kinds(source.kind)}, where texts are needed. Use a backbone that takes them, or other data"
        )
    table = tokenise_once(source, tokenizer, max_length, positions=positions, vocabulary=vocabulary)
    return _labelled(source, table, np.arange(len(source)), ())


def load_instructions(
    source: Source,
    tokenizer: Path | str,
    *,
    max_length: int | None = None,
    positions: int | None = None,
    vocabulary: int | None = None,
    form: Form = "plain",
    used: Ints | None = None,
) -> LabelledData:
    """The instructions of a source, tokenised once. Rows are those of the source.

    used: the rows that are tokenised; all if None.
    max_length: the most tokens of a prompt and its completion together; 512 if None, or what tokenizer and backbone allow.
    positions: the most tokens the backbone has positions for. vocabulary: the number of tokens its embedding has. form:
    whether a prompt that is a text is tokenised as it is (plain), or as a chat of one message (chat).

    Raises DataError for images and labelled texts, if there is no tokenizer or it cannot be used, for a row that leaves no
    room for its prompt, and for a token beyond the vocabulary; ConfigError for a max_length or form that is not allowed.
    """
    if source.kind != "instructions":
        remedy = " Make instructions of them with as_instructions" if source.kind == "text" else " Use other data"
        raise DataError(f"{source.name} holds {kinds(source.kind)}, where instructions are needed.{remedy}")
    table = tokenise_instructions(
        source, tokenizer, max_length=max_length, positions=positions, vocabulary=vocabulary, form=form, used=used
    )
    return _labelled(source, table, np.arange(len(source)), (), also=table.digest)


def undecoded(source: Source) -> LabelledData:
    """The labels of a source without its images, texts or instructions: enough to plan a stream, and quick."""
    return _labelled(source, _Undecoded(), np.arange(len(source)), ())


class _Undecoded:
    """There is nothing to read: asking for it is a mistake of ours."""

    augments = False

    def inputs(self, rows: Ints, augment: Augment | None) -> dict[str, Tensor]:
        raise AssertionError(f"rows {rows[:3]} were asked for (augment = {augment}), and nothing is decoded")

    def lengths(self, rows: Ints) -> Ints:
        raise AssertionError(f"lengths of rows {rows[:3]} were asked for, and nothing is decoded")


def _labelled(source: Source, table: Table, keep: Ints, skipped: tuple[str, ...], also: bytes = b"") -> LabelledData:
    left_out = np.setdiff1d(np.arange(len(source)), keep)
    told = source.fingerprint.encode() + left_out.astype("<i8").tobytes() + also
    return LabelledData(
        kind=source.kind,
        name=source.name,
        table=table,
        labels_n=source.labels_n[keep],
        splits_n=source.splits_n[keep],
        domains_n=source.domains_n[keep],
        class_names=source.class_names,
        domain_names=source.domain_names,
        fingerprint=hashlib.blake2b(told, digest_size=16).hexdigest(),
        skipped=skipped,
    )
