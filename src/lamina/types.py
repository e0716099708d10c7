"""The data types that all parts share: Batch, Instruction, Examples, LabelledData, Task. All are immutable.

Shape letters used here: n examples, b batch, c channels, h w pixels, t tokens, m options, s tokens of an option.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class Augment(NamedTuple):
    """Names one random augmentation of every example. It is a function of (seed, epoch, example), without any state."""

    seed: int
    epoch: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Examples ready for a backbone.

    `inputs` holds `pixel_values` (b, c, h, w) float32 already normalised for the backbone, or `input_ids` and
    `attention_mask` (b, t) int64. Instructions also have `completion_mask` (b, t), which is 1 on the tokens of the
    completion. Questions hold the prompts alone, and in `option_ids` and `option_mask` (b, m, s) the tokens of the options.
    `labels_b` are class ids: positions in the dataset's list of class names; for questions, the position of the right
    option, -1 where there are no options.
    """

    inputs: Mapping[str, Tensor]
    labels_b: Tensor
    memo: MutableMapping[str, Tensor] | None = field(default=None, compare=False)
    """What was computed of this batch before and never changes, on the CPU. None: nothing is remembered."""

    def __len__(self) -> int:
        return len(self.labels_b)

    def to(self, device: torch.device) -> "Batch":
        """Returns the same examples on this device. The CPU does not wait for a copy to a GPU."""

        def moved(value: Tensor) -> Tensor:
            if device.type == "cuda" and value.device.type == "cpu":
                return value.pin_memory().to(device, non_blocking=True)
            return value.to(device)

        inputs = {name: moved(value) for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, labels_b=moved(self.labels_b))

    def select(self, keep_b: Tensor | slice) -> "Batch":
        """Returns the examples where keep_b (b,) is true, or of a slice."""
        inputs = {name: value[keep_b] for name, value in self.inputs.items()}
        return Batch(inputs=inputs, labels_b=self.labels_b[keep_b])


Kind = Literal["image", "text", "instructions"]
"""What the examples of a dataset are."""


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """A prompt and the completion that a language model is to give."""

    prompt: str
    """Whole: the messages of a chat as the tokenizer's chat template renders them."""
    completion: str
    options: tuple[str, ...] = ()
    """The candidate completions. Empty: any text is allowed."""


class Table(Protocol):
    """The inputs of a dataset, decoded once (images) or tokenised once (texts)."""

    def inputs(self, rows: Ints, augment: Augment | None) -> dict[str, Tensor]:
        """Returns the inputs of these rows: with `augment` after the training transform, drawn for (seed, epoch, row), else
        after the evaluation transform. The inputs of a row never depend on the other rows (padding of texts aside)."""
        ...

    def lengths(self, rows: Ints) -> Ints:
        """Returns the number of tokens of each row; all 1 for images."""
        ...


@runtime_checkable
class Instructions(Table, Protocol):
    """A table of instructions. `inputs` returns prompts with their completions, padded on the right."""

    pad_id: int
    stops: tuple[int, ...]
    """Tokens that end a completion."""

    def questions(self, rows: Ints) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the prompts of these rows, padded on the right, with the tokens of their options (m = 0 where no row has
        any), and the position (b,) of the right option, -1 where a row has no options."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns these tokens as text, without special tokens."""
        ...

    def expected(self, row: int) -> str:
        """Returns the completion of a row as its tokens read, without special tokens and surrounding white space."""
        ...

    def read(self, row: int) -> Instruction:
        """Returns the instruction of a row, as text."""
        ...


@dataclass(frozen=True)
class Examples:
    """Labelled examples of one split of one task: rows of a table and their class ids."""

    table: Table
    rows_n: Ints
    labels_n: Ints
    names_n: Ints | None = None
    """The number by which each example is known to random draws; its row by default."""

    def __len__(self) -> int:
        return len(self.rows_n)

    @property
    def known_as_n(self) -> Ints:
        """The number by which each example is known to random draws, (n,)."""
        return self.rows_n if self.names_n is None else self.names_n

    def batch(self, positions: Ints, augment: Augment | None = None) -> Batch:
        return Batch(
            inputs=self.table.inputs(self.rows_n[positions], augment),
            labels_b=torch.from_numpy(self.labels_n[positions]),
        )

    def lengths(self) -> Ints:
        """Returns the number of tokens of each example, (n,); all 1 for images."""
        return self.table.lengths(self.rows_n)

    def select(self, keep: Ints | NDArray[np.bool_]) -> "Examples":
        names_n = None if self.names_n is None else self.names_n[keep]
        return Examples(self.table, self.rows_n[keep], self.labels_n[keep], names_n)


@dataclass(frozen=True, kw_only=True)
class LabelledData:
    """A whole dataset, to be cut into tasks.

    labels_n: class id of every row; splits_n: 0 train, 1 val, 2 test (positions in SPLITS); domains_n: domain id of
    every row (all 0 where there is one domain). `fingerprint` changes with every file, label and split.
    """

    kind: Kind
    name: str
    table: Table
    labels_n: Ints
    splits_n: Ints
    domains_n: Ints
    class_names: tuple[str, ...]
    domain_names: tuple[str, ...]
    fingerprint: str
    skipped: tuple[str, ...] = ()
    """Where each damaged item was that the user asked to skip."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of a stream: new classes, known classes in a new domain, or both."""

    name: str
    classes: tuple[int, ...]
    """Class ids, in the order of this task's outputs in the head."""
    train: Examples
    val: Examples
    test: Examples
    domain: str | None = None

    def split(self, name: Split) -> Examples:
        return {"train": self.train, "val": self.val, "test": self.test}[name]
