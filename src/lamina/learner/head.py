"""Head: a growing classifier with one block of output units per task.

Every output unit belongs to one task and one class. A class's score is the maximum over its outputs. The scenarios differ
only in which classes the outputs name: new classes per task, the same classes in a new domain, or both.

Shape letters: b batch, d width, j outputs of all blocks, c classes.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lamina.types import Task


class Output(NamedTuple):
    """An output unit of the head: one per class and task."""

    task: str
    label: int


class Head(nn.Module):
    """A growing linear classifier. Float32 throughout, whatever the precision of the backbone."""

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        """device: of its weights; the CPU by default."""
        super().__init__()
        self.width, self.device = width, device or torch.device("cpu")
        self.blocks = nn.ModuleList()
        self.tasks: list[str] = []
        self.outputs: list[Output] = []

    def add(self, task: str, classes: Sequence[int]) -> nn.Linear:
        """Append a block with one output per class, and return it.

        It is initialised as PyTorch initialises linear layers, from the CPU's global generator (which the engine seeds).
        Raises ValueError if the task has a block already.
        """
        if task in self.tasks:
            raise ValueError(f"task {task!r} has a block in the head already")
        block = nn.Linear(self.width, len(classes)).to(self.device)
        self.blocks.append(block)
        self.tasks.append(task)
        self.outputs += [Output(task, label) for label in classes]
        return block

    def block(self, task: str) -> nn.Linear:
        found = self.blocks[self.tasks.index(task)]
        assert isinstance(found, nn.Linear)
        return found

    def freeze(self) -> None:
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def forward(self, features_bd: Tensor) -> Tensor:
        """Returns the scores of all outputs, (b, j)."""
        return torch.cat([block(features_bd) for block in self.blocks], 1)


def local_labels(task: Task, labels_b: Tensor) -> Tensor:
    """Returns the positions (b,) of class ids among the task's own outputs."""
    return _positions(task.classes, labels_b.device)[labels_b]


@lru_cache(maxsize=8)
def _positions(classes: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns the position of every class id up to the largest of these, -1 for the others. Cached, because a GPU would
    wait for a new tensor in every step."""
    order = torch.full((max(classes) + 1,), -1)
    order[list(classes)] = torch.arange(len(classes))
    return order.to(device)


def drawn(log_bc: Tensor, uniform_b: Tensor) -> Tensor:
    """Returns one label (b,) for each line of log-probabilities, drawn by inverting its distribution at uniform numbers."""
    return (log_bc.detach().double().exp().cumsum(1) < uniform_b[:, None]).sum(1).clamp_max(log_bc.shape[1] - 1)


def class_scores(scores_bj: Tensor, outputs: Sequence[Output], classes: Sequence[int]) -> Tensor:
    """Returns the maximum over the outputs of each of these classes, (b, c); minus infinity for a class without outputs."""
    columns_j = _columns(tuple(output.label for output in outputs), tuple(classes), scores_bj.device)
    empty_bc = scores_bj.new_full((len(scores_bj), len(classes)), -torch.inf)
    return empty_bc.scatter_reduce(1, columns_j.expand(len(scores_bj), -1), scores_bj, "amax")


@lru_cache(maxsize=8)
def _columns(labels: tuple[int, ...], classes: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns the position (j,) of each label among the classes. Cached, because a GPU would wait for a new tensor in every
    step."""
    column = {label: position for position, label in enumerate(classes)}
    return torch.tensor([column[label] for label in labels], device=device)
