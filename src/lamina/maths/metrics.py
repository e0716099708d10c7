"""AccuracyMatrix, and every metric of continual learning as a pure function of it.

Notation, with tasks counted 0..T-1: a[i, j] is the accuracy on the test data of task j after learning task i.
The functions take the matrix as it stands, so they also hold for a stream that has not ended: T is then the number of
tasks learnt so far. Accuracies are fractions in [0, 1] and are never rounded.

Sources: ACC_i and its mean (InfLoRA, Liang & Li, CVPR 2024, section 4.1); forgetting (Chaudhry et al., ECCV 2018, eq. 3:
the maximum is over the models *before* the last, so a task that improved counts negative); BWT and FWT (Lopez-Paz &
Ranzato, NeurIPS 2017, eqs. 3 and 4); interval (Wilson, 1927).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.types import Ints

Floats = NDArray[np.float64]

FORMULAS: dict[str, str] = {
    "final_accuracy": "mean over j of a[T-1, j]",
    "final_accuracy_micro": "correct predictions over test examples of all tasks",
    "average_accuracy": "mean over i of ACC_i, with ACC_i the mean over j <= i of a[i, j]",
    "average_accuracy_micro": "mean over i of micro ACC_i: correct predictions over test examples of tasks j <= i",
    "forgetting": "mean over j < T-1 of max over i < T-1 of a[i, j], minus a[T-1, j]",
    "backward_transfer": "mean over j < T-1 of a[T-1, j] - a[j, j]",
    "forward_transfer": "mean over j > 0 of a[j-1, j] - chance",
    "backward_transfer_trace": "sum over j < T-1 of a[T-1, j] - a[j, j], divided by T",
    "learning_accuracy": "mean over j of a[j, j]",
    "task_aware_accuracy": "as final accuracy; only outputs of the example's task compete",
}
"""Each metric of DEFINITIONS as a formula, where there is one."""
DEFINITIONS: dict[str, str] = {
    "final_accuracy": "accuracy after the last task, averaged over tasks",
    "final_accuracy_micro": "accuracy after the last task, averaged over test examples",
    "average_accuracy": "accuracy on all tasks learnt so far, averaged over the stream",
    "average_accuracy_micro": "the same with micro accuracy: averaged over test examples instead of tasks",
    "forgetting": "best earlier accuracy on each task minus its final accuracy, averaged over all tasks but the last; "
    "negative where tasks improved",
    "backward_transfer": "final accuracy on each task minus its accuracy when learnt, averaged over all tasks but the last",
    "backward_transfer_trace": "backward transfer as the TRACE benchmark defines it: the sum is divided by the number of all "
    "tasks",
    "zero_shot_accuracy": "accuracy before the stream, averaged over tasks",
    "perplexity_before": "perplexity of a text from outside the stream, before it",
    "perplexity_after": "perplexity of the same text after the last task",
    "forward_transfer": "accuracy on each task just before it is learnt, minus chance (for language models: minus the accuracy "
    "before the stream), averaged over all tasks but the first",
    "learning_accuracy": "accuracy on each task just after it is learnt, averaged over tasks",
    "task_aware_accuracy": "final accuracy if the task's identity is given at test time",
    "task_inference_accuracy": "share of test examples whose highest-scoring output belongs to their own task, after the last "
    "task",
}


@dataclass(frozen=True, eq=False)
class AccuracyMatrix:
    """Counts of correct predictions: row i after learning task i, column j on the test data of task j.

    correct_ij, total_ij: (tasks learnt, tasks measured) int64, at least as many columns as rows. total is 0 where
    nothing was measured, which is usual above the diagonal.
    """

    correct_ij: Ints
    total_ij: Ints

    def __post_init__(self) -> None:
        shape = self.correct_ij.shape
        if shape != self.total_ij.shape or len(shape) != 2 or shape[1] < shape[0]:
            raise ValueError(
                f"correct and total must have one shape, with at least as many columns as rows, got {shape} and "
                f"{self.total_ij.shape}"
            )
        if (self.correct_ij < 0).any() or (self.correct_ij > self.total_ij).any():
            raise ValueError("each number of correct predictions must lie between 0 and its total")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AccuracyMatrix):
            return NotImplemented
        return np.array_equal(self.correct_ij, other.correct_ij) and np.array_equal(self.total_ij, other.total_ij)

    def __hash__(self) -> int:
        return hash((self.correct_ij.tobytes(), self.total_ij.tobytes()))

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
        """Returns the matrix one task later. counts: for each measured task j, (correct predictions, examples)."""
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
    def from_dict(cls, counts: Mapping[str, Any]) -> "AccuracyMatrix":
        """The inverse of `as_dict`. Raises ValueError for anything else."""
        if counts.keys() != {"correct", "total"}:
            raise ValueError(f"a matrix has the keys correct and total, got {', '.join(map(str, counts)) or 'none'}")
        return cls(_counts(counts["correct"]), _counts(counts["total"]))


def _counts(rows: object) -> Ints:
    """Returns rows of whole numbers as a matrix. Raises ValueError for anything else."""
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise ValueError("counts must be a list of lists")
    if not all(type(value) is int and abs(value) < 2**63 for row in rows for value in row):
        raise ValueError("counts must be whole numbers below 2^63")
    return np.array(rows, np.int64).reshape(len(rows), -1 if rows else 0)


def incremental_accuracy(matrix: AccuracyMatrix) -> Floats:
    """ACC_i for every i: mean over j <= i of a[i, j]. Shape (T,)."""
    return np.array([matrix.accuracy_ij[i, : i + 1].mean() for i in range(matrix.tasks)])


def incremental_accuracy_micro(matrix: AccuracyMatrix) -> Floats:
    """Micro ACC_i: correct predictions over test examples of tasks j <= i. Shape (T,)."""
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


def backward_transfer_trace(matrix: AccuracyMatrix) -> float:
    """Backward transfer of TRACE (Wang et al., 2023, arXiv 2310.06762): its sum runs over all T tasks, the last giving 0."""
    return backward_transfer(matrix) * (matrix.tasks - 1) / matrix.tasks


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
    """Returns the share of examples that are correct before an update and wrong after it. Shapes (n,). Yan et al., CVPR
    2021."""
    return float(np.mean((before_n == labels_n) & (after_n != labels_n))) if len(labels_n) else 0.0


def calibration_error(confidence_n: Floats, correct_n: NDArray[np.bool_], bins: int = 15) -> float:
    """Returns the expected calibration error (Naeini et al., AAAI 2015): over bins of equal width, the mean distance of
    accuracy from confidence, weighted by the examples in each. Shapes (n,). 0 where nothing was measured."""
    if not len(confidence_n):
        return 0.0
    bin_n = np.clip(np.ceil(confidence_n * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(bin_n, weights=correct_n - confidence_n, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence_n))


def summary(matrix: AccuracyMatrix) -> dict[str, float]:
    """Returns the metrics that every run has, by the names in DEFINITIONS."""
    return {
        "final_accuracy": final_accuracy(matrix),
        "final_accuracy_micro": final_accuracy_micro(matrix),
        "average_accuracy": average_accuracy(matrix),
        "average_accuracy_micro": average_accuracy_micro(matrix),
        "forgetting": forgetting(matrix),
        "backward_transfer": backward_transfer(matrix),
        "learning_accuracy": learning_accuracy(matrix),
    }
