"""AccuracyMatrix, and every figure of continual learning as a pure function of it.

Notation, with tasks counted 0..T-1: a[i, j] is the accuracy on the test data of task j after learning task i.
The functions take the matrix as it stands, so they also hold for a stream that has not ended: T is then the number of
tasks learnt so far. Accuracies are fractions in [0, 1] and are never rounded.

Sources: ACC_i and its mean (InfLoRA, Liang & Li, CVPR 2024, section 4.1); forgetting (Chaudhry et al., ECCV 2018, eq. 3:
the maximum is over the models *before* the last, so a task that improved counts negative); BWT and FWT (Lopez-Paz &
Ranzato, NeurIPS 2017, eqs. 3 and 4); interval (Wilson, 1927).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.types import Ints

Floats = NDArray[np.float64]

DEFINITIONS: dict[str, str] = {
    "final_accuracy": "mean over tasks j of a[T-1, j]: accuracy after the last task, every task counting the same",
    "final_accuracy_micro": "correct answers over all test examples of all tasks after the last task",
    "average_accuracy": "mean over i of ACC_i, where ACC_i is the mean over j <= i of a[i, j]",
    "average_accuracy_micro": "the same mean over i, with ACC_i counted over examples instead of tasks",
    "forgetting": "mean over j < T-1 of (best a[i, j] for i < T-1) minus a[T-1, j]; negative where a task improved",
    "backward_transfer": "mean over j < T-1 of a[T-1, j] minus a[j, j]",
    "forward_transfer": "mean over j > 0 of a[j-1, j] minus chance: accuracy on a task before learning it",
    "learning_accuracy": "mean over j of a[j, j]: how well each task was learnt when it was new",
    "task_aware_accuracy": "final accuracy if the task's identity is given at test time",
    "task_inference_accuracy": "share of test examples, after the last task, whose winning output belongs to their own task",
}


@dataclass(frozen=True)
class AccuracyMatrix:
    """Counts of right answers: row i after learning task i, column j on the test data of task j.

    correct_ij, total_ij: (tasks learnt, tasks measured) int64, at least as many columns as rows. total is 0 where
    nothing was measured, which is usual above the diagonal.
    """

    correct_ij: Ints
    total_ij: Ints

    def __post_init__(self) -> None:
        shape = self.correct_ij.shape
        if shape != self.total_ij.shape or len(shape) != 2 or shape[1] < shape[0]:
            raise ValueError(
                f"counts must have one shape with columns for all rows, got {shape} and {self.total_ij.shape}"
            )
        if (self.correct_ij < 0).any() or (self.correct_ij > self.total_ij).any():
            raise ValueError("each count of right answers must lie between 0 and its total")

    @classmethod
    def empty(cls) -> "AccuracyMatrix":
        return cls(np.zeros((0, 0), np.int64), np.zeros((0, 0), np.int64))

    @property
    def tasks(self) -> int:
        """How many tasks have been learnt."""
        return len(self.correct_ij)

    @property
    def accuracy_ij(self) -> Floats:
        """a[i, j], float64; nan where nothing was measured."""
        shares: Floats = np.where(self.total_ij > 0, self.correct_ij / np.maximum(self.total_ij, 1), np.nan)
        return shares

    def with_row(self, counts: dict[int, tuple[int, int]]) -> "AccuracyMatrix":
        """The matrix one task later. counts: for each measured task j, (right answers, examples)."""
        rows = self.tasks + 1
        columns = max([rows, self.correct_ij.shape[1], *(j + 1 for j in counts)])
        correct, total = np.zeros((rows, columns), np.int64), np.zeros((rows, columns), np.int64)
        correct[:-1, : self.correct_ij.shape[1]] = self.correct_ij
        total[:-1, : self.total_ij.shape[1]] = self.total_ij
        for j, (right, seen) in counts.items():
            correct[-1, j], total[-1, j] = right, seen
        return AccuracyMatrix(correct, total)

    def as_dict(self) -> dict[str, Any]:
        return {"correct": self.correct_ij.tolist(), "total": self.total_ij.tolist()}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "AccuracyMatrix":
        rows = len(record["correct"])
        correct, total = (
            np.array(record[key], np.int64).reshape(rows, -1 if rows else 0) for key in ("correct", "total")
        )
        return cls(correct, total)


def incremental_accuracy(matrix: AccuracyMatrix) -> Floats:
    """ACC_i for every i: mean over j <= i of a[i, j]. Shape (T,)."""
    return np.array([matrix.accuracy_ij[i, : i + 1].mean() for i in range(matrix.tasks)])


def incremental_accuracy_micro(matrix: AccuracyMatrix) -> Floats:
    """ACC_i counted over examples: right answers on tasks j <= i over their number. Shape (T,)."""
    correct, total = np.tril(matrix.correct_ij).sum(1), np.tril(matrix.total_ij).sum(1)
    shares: Floats = correct / np.maximum(total, 1)
    return shares


def final_accuracy(matrix: AccuracyMatrix) -> float:
    return float(incremental_accuracy(matrix)[-1])


def final_accuracy_micro(matrix: AccuracyMatrix) -> float:
    return float(incremental_accuracy_micro(matrix)[-1])


def average_accuracy(matrix: AccuracyMatrix) -> float:
    return float(incremental_accuracy(matrix).mean())


def average_accuracy_micro(matrix: AccuracyMatrix) -> float:
    return float(incremental_accuracy_micro(matrix).mean())


def forgetting_after(matrix: AccuracyMatrix) -> Floats:
    """Forgetting if the stream had ended at each task i; 0 for the first. Shape (T,)."""
    a = matrix.accuracy_ij
    drops = [0.0]
    for i in range(1, matrix.tasks):
        best = [np.nanmax(a[j:i, j]) for j in range(i)]
        drops.append(float(np.mean([best[j] - a[i, j] for j in range(i)])))
    return np.array(drops[: matrix.tasks])


def forgetting_by_task(matrix: AccuracyMatrix) -> Floats:
    """For each task j: best accuracy before the last model minus the last accuracy; nan for the last task. Shape (T,)."""
    a, last = matrix.accuracy_ij, matrix.tasks - 1
    return np.array([np.nanmax(a[j:last, j]) - a[last, j] if j < last else np.nan for j in range(matrix.tasks)])


def forgetting(matrix: AccuracyMatrix) -> float:
    """0 for a single task, where nothing could be forgotten."""
    return float(forgetting_after(matrix)[-1])


def backward_transfer(matrix: AccuracyMatrix) -> float:
    """0 for a single task."""
    a, last = matrix.accuracy_ij, matrix.tasks - 1
    return float(np.mean(a[last, :last] - np.diag(a)[:last])) if last > 0 else 0.0


def forward_transfer(matrix: AccuracyMatrix, chance_t: Floats) -> float:
    """chance_t: accuracy of guessing on each task, shape (T,). nan unless a[j-1, j] was measured for every j > 0."""
    a = matrix.accuracy_ij
    gains = [a[j - 1, j] - chance_t[j] for j in range(1, matrix.tasks)]
    return float(np.mean(gains)) if gains else math.nan


def learning_accuracy(matrix: AccuracyMatrix) -> float:
    return float(np.diag(matrix.accuracy_ij).mean())


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Interval for a proportion; z = 1.96 gives 95 %. (0, 1) where nothing was measured."""
    if total == 0:
        return 0.0, 1.0
    p = correct / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def negative_flips(before_n: Ints, after_n: Ints, labels_n: Ints) -> float:
    """Share of examples that were right before an update and are wrong after it (Yan et al., CVPR 2021). Shapes (n,)."""
    return float(np.mean((before_n == labels_n) & (after_n != labels_n))) if len(labels_n) else 0.0


def summary(matrix: AccuracyMatrix) -> dict[str, float]:
    """The figures every run reports, by the names in DEFINITIONS."""
    return {
        "final_accuracy": final_accuracy(matrix),
        "final_accuracy_micro": final_accuracy_micro(matrix),
        "average_accuracy": average_accuracy(matrix),
        "average_accuracy_micro": average_accuracy_micro(matrix),
        "forgetting": forgetting(matrix),
        "backward_transfer": backward_transfer(matrix),
        "learning_accuracy": learning_accuracy(matrix),
    }
