"""One classifier over all rows of the head, re-made from their statistics (see `statistics.py`) when a task ends.

    ncm       s_j(f) = 2 μ_j·f - |μ_j|²                                             nearest mean
    lda       s_j(f) = μ_j^T Σ^{-1} f - ½ μ_j^T Σ^{-1} μ_j (+ log π_j)              Gaussians that share Σ (Fisher, 1936)
    ridge     s(f) = φ(f) V,   φ(f) = relu(R Σ^{-1/2} (f - m) / sqrt(d)),   R_md ~ N(0, 1)     (RanPAC: McDonnell et al., 2023)
              V = (Σ_i a_i φ_i φ_i^T + λ tr(·)/M I)^{-1} Σ_i a_i φ_i y_i^T,   a_i = 1 / (examples of its row)
    aligned   lda, then SGD on draws of the rows' Gaussians: cross-entropy + 0.1 mean |ℓ_i - ℓ_i'| over pairs of one row
    mixed     ½ log_softmax(s_lda / τ_1) + ½ log_softmax(s_ridge / τ_2)

Scores are (b, j), one per row; that a class's score is the largest of its rows is done elsewhere.

    symbol      here
    R Σ^{-1/2} / sqrt(d)   projection_md; m is in offset_m = -projection_md m
    V           weight_mj
    τ           temperatures

Shape letters: b examples, d width, j rows of the head, m random features (M of them), k rows drawn from, n draws of each.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.maths.class_statistics import Gaussians, Shrinkage, Statistics, covariance, gaussians
from lamina.maths.linalg import roots_of

LAMBDAS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""λ of the ridge that are tried, in units of the Gram matrix's mean eigenvalue; the first of equally good ones is taken."""
HELD_OUT = 5
"""Every fifth example of a row measures the λ."""


class LinearClassifier(NamedTuple):
    """s = f W^T + b; both float64."""

    weight_jd: Tensor
    bias_j: Tensor

    def scores(self, features_bd: Tensor) -> Tensor:
        return features_bd.double() @ self.weight_jd.T + self.bias_j

    def tensors(self) -> dict[str, Tensor]:
        """What has to be saved, by name; `classifier_of` is the inverse."""
        return {name: part.contiguous() for name, part in self._asdict().items()}


class RidgeClassifier(NamedTuple):
    """s = relu(f P^T + c) V. P is float32, to which it was rounded before V was solved for; the others are float64."""

    projection_md: Tensor
    offset_m: Tensor
    weight_mj: Tensor

    def scores(self, features_bd: Tensor) -> Tensor:
        scores_bj: Tensor = random_features(features_bd, self.projection_md, self.offset_m) @ self.weight_mj
        return scores_bj

    def tensors(self) -> dict[str, Tensor]:
        return {name: part.contiguous() for name, part in self._asdict().items()}


class MixedClassifier(NamedTuple):
    """Log probabilities of a linear and a ridge head, each at its temperature (float64, (2,)), in equal parts."""

    linear: LinearClassifier
    ridge: RidgeClassifier
    temperatures: Tensor

    def scores(self, features_bd: Tensor) -> Tensor:
        parts = (head.scores(features_bd) for head in (self.linear, self.ridge))
        logs: list[Tensor] = [
            (part_bj / tau).log_softmax(1) for part_bj, tau in zip(parts, self.temperatures, strict=True)
        ]
        return (logs[0] + logs[1]) / 2

    def tensors(self) -> dict[str, Tensor]:
        return {**self.linear.tensors(), **self.ridge.tensors(), "temperatures": self.temperatures}


Classifier = LinearClassifier | RidgeClassifier | MixedClassifier


def classifier_of(tensors: Mapping[str, Tensor]) -> Classifier:
    """The head whose `tensors` these are, bit for bit. Raises KeyError where they are of none."""
    if "temperatures" in tensors:
        return MixedClassifier(linear_classifier(tensors), ridge_classifier(tensors), tensors["temperatures"])
    return ridge_classifier(tensors) if "weight_mj" in tensors else linear_classifier(tensors)


def linear_classifier(tensors: Mapping[str, Tensor]) -> LinearClassifier:
    return LinearClassifier(tensors["weight_jd"], tensors["bias_j"])


def ridge_classifier(tensors: Mapping[str, Tensor]) -> RidgeClassifier:
    return RidgeClassifier(tensors["projection_md"], tensors["offset_m"], tensors["weight_mj"])


# ----------------------------------------------------------------------------------------------------- closed forms


def ncm(statistics: Statistics) -> LinearClassifier:
    """The nearest mean: the score is |f|² less the squared distance."""
    return LinearClassifier(2 * statistics.means_jd, -statistics.means_jd.square().sum(1))


def lda(
    statistics: Statistics, shrinkage: Shrinkage = "oas", priors: Literal["equal", "counts"] = "equal"
) -> LinearClassifier:
    """The log posterior of each row under Gaussians that share a covariance, up to a constant per example."""
    _, whiten_dd = roots_of(covariance(statistics, shrinkage))
    white_jd = statistics.means_jd @ whiten_dd
    bias_j = -white_jd.square().sum(1) / 2
    if priors == "counts":
        bias_j = bias_j + (statistics.counts_j / statistics.counts_j.sum()).log()
    return LinearClassifier(white_jd @ whiten_dd, bias_j)


# ------------------------------------------------------------------------------------------- ridge on random features


def ridge(
    statistics: Statistics,
    generator: torch.Generator,
    real: tuple[Tensor, Tensor] | None = None,
    width: int = 4096,
    draws: int = 128,
    shrinkage: Shrinkage = "oas",
    own_share: float = 0.5,
    lambdas: tuple[float, ...] = LAMBDAS,
) -> RidgeClassifier:
    """Least squares on `width` random features, every row weighing the same.

    A row is known by its examples where `real` = (features (n, d), positions of their rows (n,)) has some, else by as many
    draws as said. The Gram matrix (width, width) is built for the occasion. λ is that of the smallest squared error on
    every fifth example of each row; then these are fitted too.
    """
    white = gaussians(statistics, shrinkage)
    noise_md = torch.randn(width, len(white.centre_d), generator=generator, dtype=torch.float64)
    projection_md = (noise_md @ white.whiten_dd / len(white.centre_d) ** 0.5).float()
    offset_m = -(projection_md.double() @ white.centre_d)
    moments = {False: Moments.zero(width, len(white.means_jd)), True: Moments.zero(width, len(white.means_jd))}
    for j, features_bd in examples(white, real, draws, generator, own_share):
        held_b = torch.arange(len(features_bd)) % HELD_OUT == HELD_OUT - 1
        for held, sums in moments.items():
            # In parts: φ of all the examples of a large row would not fit.
            for part_bd in torch.split(features_bd[held_b == held], 1024):
                sums.add(j, random_features(part_bd, projection_md, offset_m), 1 / len(features_bd))
    fitted, held_out = moments[False], moments[True]
    errors = [held_out.squared_error(fitted.solve(ratio)) for ratio in lambdas]
    whole = Moments(fitted.gram_mm + held_out.gram_mm, fitted.cross_mj + held_out.cross_mj)
    return RidgeClassifier(projection_md, offset_m, whole.solve(lambdas[errors.index(min(errors))]))


def random_features(features_bd: Tensor, projection_md: Tensor, offset_m: Tensor) -> Tensor:
    """φ (b, m) float64."""
    return (features_bd.double() @ projection_md.double().T + offset_m).relu()


def examples(
    white: Gaussians,
    real: tuple[Tensor, Tensor] | None,
    draws: int,
    generator: torch.Generator,
    own_share: float,
) -> Iterator[tuple[int, Tensor]]:
    """For every row its examples (b, d) float64, or draws where it has none: one row at a time, as all would be large."""
    for j in range(len(white.means_jd)):
        if real is not None and (real[1] == j).any():
            yield j, real[0][real[1] == j].double()
        else:
            yield j, white.features(white.draws(torch.tensor([j]), draws, generator, own_share)[0])


class Moments(NamedTuple):
    """Weighted sums over examples of φ φ^T and of φ y^T, y the indicator of the example's row."""

    gram_mm: Tensor
    cross_mj: Tensor

    @classmethod
    def zero(cls, width: int, rows: int) -> "Moments":
        return cls(torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, rows, dtype=torch.float64))

    def add(self, row: int, phi_bm: Tensor, weight: float) -> None:
        self.gram_mm.addmm_(phi_bm.T, phi_bm, alpha=weight)
        self.cross_mj[:, row] += weight * phi_bm.sum(0)

    def solve(self, ratio: float) -> Tensor:
        """V (m, j): the minimum of Σ a |φ^T V - y|² + λ |V|², λ = ratio times the Gram matrix's mean eigenvalue."""
        penalty = ratio * self.gram_mm.diagonal().mean()
        # All features are 0 where nothing was ever on; any penalty then gives V = 0.
        penalised_mm = self.gram_mm + torch.eye(len(self.gram_mm), dtype=torch.float64) * (penalty or 1.0)
        # In the layout that is saved: products with another one round differently.
        return torch.cholesky_solve(self.cross_mj, torch.linalg.cholesky(penalised_mm)).contiguous()

    def squared_error(self, weight_mj: Tensor) -> float:
        """Σ a |φ^T V - y|² of these examples, but for the constant Σ a |y|²."""
        return float((weight_mj * (self.gram_mm @ weight_mj - 2 * self.cross_mj)).sum())


# --------------------------------------------------------------------------------------------------- aligned by draws


def aligned(
    statistics: Statistics,
    generator: torch.Generator,
    steps: int = 300,
    rows: int = 40,
    draws: int = 64,
    rate: float = 1e-2,
    gap: float = 0.1,
    shrinkage: Shrinkage = "oas",
    own_share: float = 0.5,
) -> LinearClassifier:
    """lda, corrected by SGD with a cosine schedule on `draws` draws of each of `rows` rows per step.

    The steps are taken where the pooled covariance is I, so that the rate means the same for features of any scale or
    shape. With the draws' covariance that of lda (no own part) lda is already the minimum of the expected cross-entropy.
    They are computed in float32, which rounds far less than the draws are random, and takes little more than half the time.
    """
    white, start = gaussians(statistics, shrinkage), lda(statistics, shrinkage)
    base_jd = white.means_jd.float()
    base_j = (-white.means_jd.square().sum(1) / 2).float()
    white = white._replace(means_jd=base_jd, own_jdr=white.own_jdr.float())
    weight_jd = torch.zeros_like(base_jd, requires_grad=True)
    bias_j = torch.zeros_like(base_j, requires_grad=True)
    for step in range(steps):
        rows_k = torch.randperm(len(base_j), generator=generator)[:rows]
        drawn_knd = white.draws(rows_k, draws, generator, own_share)
        with torch.enable_grad():  # whoever calls is likely to have turned it off
            scores_knj = drawn_knd @ (base_jd + weight_jd).T + base_j + bias_j
            loss = alignment_loss(scores_knj, rows_k, gap)
        slope_jd, slope_j = torch.autograd.grad(loss, (weight_jd, bias_j))
        now = rate * (1 + math.cos(math.pi * step / steps)) / 2
        with torch.no_grad():
            weight_jd -= now * slope_jd
            bias_j -= now * slope_j
    change_jd = weight_jd.detach().double() @ white.whiten_dd
    change_j = bias_j.detach().double() - change_jd @ white.centre_d
    return LinearClassifier(start.weight_jd + change_jd, start.bias_j + change_j)


def alignment_loss(scores_knj: Tensor, rows_k: Tensor, gap: float) -> Tensor:
    """Mean cross-entropy, and `gap` times the mean difference of it between two draws of one row."""
    k, n, _ = scores_knj.shape
    losses_kn = F.cross_entropy(scores_knj.flatten(0, 1), rows_k.repeat_interleave(n), reduction="none").view(k, n)
    pairs_knn = (losses_kn[:, :, None] - losses_kn[:, None]).abs()
    return losses_kn.mean() + gap * pairs_knn.sum() / (k * max(n * (n - 1), 1))


# ------------------------------------------------------------------------------------------------------------- mixed


def mixed(
    linear: LinearClassifier,
    ridge: RidgeClassifier,
    statistics: Statistics,
    generator: torch.Generator,
    rows: int = 256,
    draws: int = 16,
    shrinkage: Shrinkage = "oas",
    own_share: float = 0.5,
) -> MixedClassifier:
    """Both heads, each at the temperature of its smallest cross-entropy on fresh draws of up to `rows` rows."""
    white = gaussians(statistics, shrinkage)
    rows_k = torch.randperm(len(white.means_jd), generator=generator)[:rows]
    features_bd = white.features(white.draws(rows_k, draws, generator, own_share)).flatten(0, 1)
    rows_b = rows_k.repeat_interleave(draws)
    found = [temperature(head.scores(features_bd), rows_b) for head in (linear, ridge)]
    return MixedClassifier(linear, ridge, torch.tensor(found, dtype=torch.float64))


def temperature(scores_bj: Tensor, row_b: Tensor, reach: float = 100.0) -> float:
    """τ of the smallest cross-entropy of scores / τ, by golden section over log τ. There is one minimum, as cross-entropy
    is convex in 1/τ; but it is at 0 where every example is right. So τ stays within a factor `reach` of the scores' spread
    (their standard deviation over the rows): heads that are always right then speak equally loud."""
    spread = float(scores_bj.std(1, correction=0).mean())
    if spread == 0:
        return 1.0

    def cost(log_tau: float) -> float:
        return float(F.cross_entropy(scores_bj / math.exp(log_tau), row_b))

    ratio = (math.sqrt(5) - 1) / 2
    low, high = math.log(spread / reach), math.log(spread * reach)
    for _ in range(50):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if cost(left) <= cost(right) else (left, high)
    return math.exp((low + high) / 2)
