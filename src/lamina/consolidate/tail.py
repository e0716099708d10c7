"""One classifier over all rows of the head, re-made from their statistics (see `statistics.py`) when a task ends.

    ncm      s_j(f) = 2 μ_j·f - |μ_j|²                                            nearest mean
    lda      s_j(f) = μ_j^T Σ^{-1} f - ½ μ_j^T Σ^{-1} μ_j (+ log π_j)             Gaussians that share Σ (Fisher, 1936)

Scores are (b, j), one per row; that a class's score is the largest of its rows is done elsewhere.

Shape letters: b examples, d width, j rows, m random features.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import Tensor

from lamina.consolidate.statistics import Shrinkage, Statistics, covariance
from lamina.linalg import roots_of


class LinearHead(NamedTuple):
    """s = f W^T + b."""

    weight_jd: Tensor
    bias_j: Tensor

    def scores(self, features_bd: Tensor) -> Tensor:
        return features_bd.double() @ self.weight_jd.T + self.bias_j

    def tensors(self) -> dict[str, Tensor]:
        return {name: part.contiguous() for name, part in self._asdict().items()}


def head_of(tensors: Mapping[str, Tensor]) -> LinearHead:
    """The head whose `tensors` these are, bit for bit."""
    return LinearHead(tensors["weight_jd"], tensors["bias_j"])


def ncm(statistics: Statistics) -> LinearHead:
    """The nearest mean: the score is |f|² less the squared distance."""
    return LinearHead(2 * statistics.means_jd, -statistics.means_jd.square().sum(1))


def lda(
    statistics: Statistics, shrinkage: Shrinkage = "oas", priors: Literal["equal", "counts"] = "equal"
) -> LinearHead:
    """The log posterior of each row under Gaussians that share a covariance, up to a constant per example."""
    _, whiten_dd = roots_of(covariance(statistics, shrinkage))
    white_jd = statistics.means_jd @ whiten_dd
    bias_j = -white_jd.square().sum(1) / 2
    if priors == "counts":
        bias_j = bias_j + (statistics.counts_j / statistics.counts_j.sum()).log()
    return LinearHead(white_jd @ whiten_dd, bias_j)
