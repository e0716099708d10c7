"""Examples that a model keeps of a task: held-out ones to measure later tasks on (probes), and training ones to rehearse.

Images are kept as decoded and downscaled for the backbone, texts as token ids, instructions as token ids and as text; so
predictions for them are the same to the last bit as for the originals.

Shape letters: n examples.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamina import data
from lamina.data import ImageTransform, InstructionTokens, KeptInstructions, PixelStore, PixelTable, Ragged, TokenTable
from lamina.model.card import Kept
from lamina.types import Augment, Examples, Instruction, Instructions, Ints

PROBES, REHEARSAL = "probes", "rehearsal"


class NoTable:
    """The table of a task of which no examples are kept."""

    def inputs(self, rows: Ints, augment: Augment | None) -> dict[str, Tensor]:
        raise AssertionError(f"{len(rows)} rows were asked for ({augment}), and none is kept")

    def lengths(self, rows: Ints) -> Ints:
        return np.zeros(len(rows), np.int64)


def nothing() -> Examples:
    """Returns no examples."""
    return Examples(NoTable(), np.zeros(0, np.int64), np.zeros(0, np.int64))


def packed(examples: Examples) -> dict[str, Tensor]:
    """Returns these examples as tensors. `unpacked` is the inverse."""
    table, rows_n = examples.table, examples.rows_n
    found = {
        "labels_n": torch.from_numpy(examples.labels_n.copy()),
        "names_n": torch.from_numpy(examples.known_as_n.copy()),
    }
    if isinstance(table, PixelTable):
        pixels = [table.store.image(row).reshape(-1) for row in rows_n.tolist()]
        return found | {
            "sizes_n2": torch.from_numpy(table.store.sizes_n2[rows_n].copy()),
            "pixels": torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *pixels])),
        }
    if isinstance(table, InstructionTokens):
        return found | _packed_instructions(table, rows_n)
    assert isinstance(table, TokenTable)
    lengths_n = table.lengths(rows_n)
    ids = [table.ids[table.starts[row] : table.starts[row + 1]] for row in rows_n.tolist()]
    return found | {
        "lengths_n": torch.from_numpy(lengths_n),
        "ids": torch.from_numpy(np.concatenate([np.zeros(0, np.int32), *ids])),
        "padding": torch.tensor([table.pad_id, table.max_length]),
    }


def _packed_instructions(table: InstructionTokens, rows_n: Ints) -> dict[str, Tensor]:
    assert isinstance(table, Instructions)
    sets = list(dict.fromkeys(k for k in table.sets_n[rows_n].tolist() if k >= 0))
    first = {k: next(row for row in rows_n.tolist() if table.sets_n[row] == k) for k in sets}
    options = [table.option_ids(first[k]) for k in sets]
    read = [table.read(row) for row in rows_n.tolist()]
    texts = json.dumps([[one.prompt, one.completion, one.options] for one in read], ensure_ascii=False).encode()
    lists = {
        "prompt": [table.prompts.row(row) for row in rows_n.tolist()],
        "completion": [table.completions.row(row) for row in rows_n.tolist()],
        "option": [ids for own in options for ids in own],
    }
    found: dict[str, Tensor] = {}
    for what, ids in lists.items():
        flat = data.ragged(ids)
        found |= {f"{what}_starts": torch.from_numpy(flat.starts), f"{what}_ids": torch.from_numpy(flat.ids)}
    return found | {
        "set_starts": torch.from_numpy(np.cumsum([0, *map(len, options)], dtype=np.int64)),
        "sets_n": torch.tensor([sets.index(k) if k >= 0 else -1 for k in table.sets_n[rows_n].tolist()]).long(),
        "right_n": torch.from_numpy(table.right_n[rows_n].copy()),
        "stops": torch.tensor(table.stops).long(),
        "padding": torch.tensor([table.pad_id, table.max_length]),
        "texts": torch.from_numpy(np.frombuffer(texts, np.uint8).copy()),
    }


def _unpacked_instructions(tensors: Mapping[str, Tensor], tokenise: Any) -> KeptInstructions:
    arrays = {name: value.numpy() for name, value in tensors.items()}
    read = json.loads(arrays["texts"].tobytes())
    pad_id, max_length = tensors["padding"].tolist()
    return KeptInstructions(
        instructions=[
            Instruction(prompt=prompt, completion=completion, options=tuple(options))
            for prompt, completion, options in read
        ],
        tokenise=tokenise,
        prompts=Ragged(arrays["prompt_ids"], arrays["prompt_starts"]),
        completions=Ragged(arrays["completion_ids"], arrays["completion_starts"]),
        options=Ragged(arrays["option_ids"], arrays["option_starts"]),
        set_starts=arrays["set_starts"],
        sets_n=arrays["sets_n"],
        right_n=arrays["right_n"],
        stops=tuple(tensors["stops"].tolist()),
        pad_id=pad_id,
        max_length=max_length,
    )


def facts_of(tensors: Mapping[str, Tensor]) -> Kept:
    """Returns how many examples these are, and their bytes."""
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    return Kept(examples=len(tensors["labels_n"]), bytes=size)


def unpacked(tensors: Mapping[str, Tensor] | None, transform: ImageTransform | None, tokenise: Any = None) -> Examples:
    """Returns the examples that `packed` returned; none for None. transform: for images. tokenise: the tokenizer, for
    instructions."""
    if tensors is None:
        return nothing()
    labels_n, names_n = tensors["labels_n"].numpy(), tensors["names_n"].numpy()
    rows_n = np.arange(len(labels_n))
    if transform is not None:
        store = PixelStore(tensors["pixels"].numpy(), tensors["sizes_n2"].numpy())
        return Examples(data.PixelTable(store, transform, names_n), rows_n, labels_n, names_n)
    if "prompt_ids" in tensors:
        return Examples(_unpacked_instructions(tensors, tokenise), rows_n, labels_n, names_n)
    starts = np.cumsum([0, *tensors["lengths_n"].tolist()], dtype=np.int64)
    pad_id, max_length = tensors["padding"].tolist()
    return Examples(TokenTable(tensors["ids"].numpy(), starts, pad_id, max_length), rows_n, labels_n, names_n)
