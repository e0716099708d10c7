"""A growing classifier: one block of rows per task, every row mapped to a class.

A class's score is the largest of its rows. That makes the scenarios one thing: new classes per task, the same classes
in a new domain, or both, differ only in which classes the rows name.

Shape letters: b batch, d width, r rows of all blocks, c classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Row(NamedTuple):
    task: str
    label: int


class Head(nn.Module):
    """Float32 throughout, whatever the backbone computes in."""

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        """device: where its rows are; the processor if not said."""
        super().__init__()
        self.width, self.device = width, device or torch.device("cpu")
        self.blocks = nn.ModuleList()
        self.tasks: list[str] = []
        self.rows: list[Row] = []

    def add(self, task: str, classes: Sequence[int]) -> nn.Linear:
        """Append a block with one row per class, drawn by PyTorch's default for linear layers from the global
        generator of the processor (which the engine seeds), whatever the device. Raises ValueError if the task has a
        block already."""
        if task in self.tasks:
            raise ValueError(f"task {task!r} has a block in the head already")
        block = nn.Linear(self.width, len(classes)).to(self.device)
        self.blocks.append(block)
        self.tasks.append(task)
        self.rows += [Row(task, label) for label in classes]
        return block

    def block(self, task: str) -> nn.Linear:
        found = self.blocks[self.tasks.index(task)]
        assert isinstance(found, nn.Linear)
        return found

    def freeze(self) -> None:
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def forward(self, features_bd: Tensor) -> Tensor:
        """Scores of all rows of all blocks, (b, r)."""
        return torch.cat([block(features_bd) for block in self.blocks], 1)


def class_scores(scores_br: Tensor, rows: Sequence[Row], classes: Sequence[int]) -> Tensor:
    """(b, c): for each of these classes the largest of its rows; minus infinity for a class without rows."""
    column = {label: position for position, label in enumerate(classes)}
    columns_r = torch.tensor([column[row.label] for row in rows], device=scores_br.device)
    empty_bc = scores_br.new_full((len(scores_br), len(classes)), -torch.inf)
    return empty_bc.scatter_reduce(1, columns_r.expand(len(scores_br), -1), scores_br, "amax")
