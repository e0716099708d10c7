"""Examples that a model keeps of a task: held-out ones to measure later tasks on (probes), and training ones to rehearse.

Images are kept as decoded and downscaled for the backbone, texts as token ids; so predictions for them are the same to the last
bit as for the originals.

Shape letters: n examples.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lamina import data
from lamina.data import ImageTransform, PixelStore, PixelTable, TokenTable
from lamina.model.card import Kept
from lamina.types import Augment, Examples, Ints

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
    assert isinstance(table, TokenTable)
    lengths_n = table.lengths(rows_n)
    ids = [table.ids[table.starts[row] : table.starts[row + 1]] for row in rows_n.tolist()]
    return found | {
        "lengths_n": torch.from_numpy(lengths_n),
        "ids": torch.from_numpy(np.concatenate([np.zeros(0, np.int32), *ids])),
        "padding": torch.tensor([table.pad_id, table.max_length]),
    }


def facts_of(tensors: Mapping[str, Tensor]) -> Kept:
    """Returns how many examples these are, and their bytes."""
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    return Kept(examples=len(tensors["labels_n"]), bytes=size)


def unpacked(tensors: Mapping[str, Tensor] | None, transform: ImageTransform | None) -> Examples:
    """Returns the examples that `packed` returned; none for None. transform: for images."""
    if tensors is None:
        return nothing()
    labels_n, names_n = tensors["labels_n"].numpy(), tensors["names_n"].numpy()
    rows_n = np.arange(len(labels_n))
    if transform is not None:
        store = PixelStore(tensors["pixels"].numpy(), tensors["sizes_n2"].numpy())
        return Examples(data.PixelTable(store, transform, names_n), rows_n, labels_n, names_n)
    starts = np.cumsum([0, *tensors["lengths_n"].tolist()], dtype=np.int64)
    pad_id, max_length = tensors["padding"].tolist()
    return Examples(TokenTable(tensors["ids"].numpy(), starts, pad_id, max_length), rows_n, labels_n, names_n)
