"""Unified classifiers: one classifier of all outputs of the head, fitted to their statistics (see `class_statistics.py`).

    ncm       s_j(f) = 2 μ_j·f - |μ_j|²                                             nearest mean
    lda       s_j(f) = μ_j^T Σ^{-1} f - ½ μ_j^T Σ^{-1} μ_j (+ log π_j)              Gaussians that share Σ (Fisher, 1936)
    ridge     s(f) = φ(f) V,   φ(f) = relu(R Σ^{-1/2} (f - m) / sqrt(d)),   R_md ~ N(0, 1)     (RanPAC: McDonnell et al., 2023)
              V = (Σ_i a_i φ_i φ_i^T + λ tr(·)/M I)^{-1} Σ_i a_i φ_i y_i^T,   a_i = 1 / (examples of its output)
    aligned   lda, then SGD on samples of the outputs' Gaussians: cross-entropy + 0.1 mean |ℓ_i - ℓ_i'| over pairs of one output
    mixed     ½ log_softmax(s_lda / τ_1) + ½ log_softmax(s_ridge / τ_2)

Scores are (b, j), one per output. `learner.head.class_scores` takes the maximum over the outputs of a class.

    symbol      here
    R Σ^{-1/2} / sqrt(d)   projection_md; m is in offset_m = -projection_md m
    V           weight_mj
    τ           temperatures

Shape letters: b examples, d width, j outputs of the head, m random features (M of them), k outputs sampled from, n samples of
each.
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
"""The λ of the ridge to select from, in units of the Gram matrix's mean eigenvalue. The first of equally good ones is used."""
HELD_OUT = 5
"""Every fifth example of an output is held out to select λ."""


class LinearClassifier(NamedTuple):
    """s = f W^T + b; both float64."""

    weight_jd: Tensor
    bias_j: Tensor

    def scores(self, features_bd: Tensor) -> Tensor:
        return features_bd.double() @ self.weight_jd.T + self.bias_j

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors to be saved, by name; `classifier_of` is the inverse."""
        return {name: part.contiguous() for name, part in self._asdict().items()}


class RidgeClassifier(NamedTuple):
    """s = relu(f P^T + c) V. P is float32, rounded before V was solved for; the others are float64."""

    projection_md: Tensor
    offset_m: Tensor
    weight_mj: Tensor

    def scores(self, features_bd: Tensor) -> Tensor:
        scores_bj: Tensor = random_features(features_bd, self.projection_md, self.offset_m) @ self.weight_mj
        return scores_bj

    def tensors(self) -> dict[str, Tensor]:
        return {name: part.contiguous() for name, part in self._asdict().items()}


class MixedClassifier(NamedTuple):
    """The mean of the log probabilities of a linear and a ridge classifier, each at its temperature (float64, (2,))."""

    linear: LinearClassifier
    ridge: RidgeClassifier
    temperatures: Tensor

    def scores(self, features_bd: Tensor) -> Tensor:
        parts = (part.scores(features_bd) for part in (self.linear, self.ridge))
        logs: list[Tensor] = [
            (part_bj / tau).log_softmax(1) for part_bj, tau in zip(parts, self.temperatures, strict=True)
        ]
        return (logs[0] + logs[1]) / 2

    def tensors(self) -> dict[str, Tensor]:
        return {**self.linear.tensors(), **self.ridge.tensors(), "temperatures": self.temperatures}


Classifier = LinearClassifier | RidgeClassifier | MixedClassifier


def classifier_of(tensors: Mapping[str, Tensor]) -> Classifier:
    """Returns the classifier with these `tensors`, bit for bit. Raises KeyError if they are of none."""
    if "temperatures" in tensors:
        return MixedClassifier(linear_classifier(tensors), ridge_classifier(tensors), tensors["temperatures"])
    return ridge_classifier(tensors) if "weight_mj" in tensors else linear_classifier(tensors)


def linear_classifier(tensors: Mapping[str, Tensor]) -> LinearClassifier:
    return LinearClassifier(tensors["weight_jd"], tensors["bias_j"])


def ridge_classifier(tensors: Mapping[str, Tensor]) -> RidgeClassifier:
    return RidgeClassifier(tensors["projection_md"], tensors["offset_m"], tensors["weight_mj"])


# ----------------------------------------------------------------------------------------------------- closed forms


def ncm(statistics: Statistics) -> LinearClassifier:
    """Returns the nearest-mean classifier: the score is |f|² minus the squared distance."""
    return LinearClassifier(2 * statistics.means_jd, -statistics.means_jd.square().sum(1))


def lda(
    statistics: Statistics, shrinkage: Shrinkage = "oas", priors: Literal["equal", "counts"] = "equal"
) -> LinearClassifier:
    """Returns the log posterior of each output under Gaussians with a shared covariance, up to a constant per example."""
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
    class_share: float = 0.5,
    lambdas: tuple[float, ...] = LAMBDAS,
) -> RidgeClassifier:
    """Returns least squares on `width` random features, with equal weight for every output.

    real: features (n, d) of real examples and positions of their outputs (n,). An output without real examples is represented
    by `draws` samples. The selected λ has the smallest squared error on every fifth example of each output; the final fit
    includes these.
    """
    white = gaussians(statistics, shrinkage)
    noise_md = torch.randn(width, len(white.centre_d), generator=generator, dtype=torch.float64)
    projection_md = (noise_md @ white.whiten_dd / len(white.centre_d) ** 0.5).float()
    offset_m = -(projection_md.double() @ white.centre_d)
    moments = {False: Moments.zero(width, len(white.means_jd)), True: Moments.zero(width, len(white.means_jd))}
    for j, features_bd in examples(white, real, draws, generator, class_share):
        held_b = torch.arange(len(features_bd)) % HELD_OUT == HELD_OUT - 1
        for held, sums in moments.items():
            # In parts: φ of all examples of a large output would not fit into memory.
            for part_bd in torch.split(features_bd[held_b == held], 1024):
                sums.add(j, random_features(part_bd, projection_md, offset_m), 1 / len(features_bd))
    fitted, held_out = moments[False], moments[True]
    errors = [held_out.squared_error(fitted.solve(ratio)) for ratio in lambdas]
    whole = Moments(fitted.gram_mm + held_out.gram_mm, fitted.cross_mj + held_out.cross_mj)
    return RidgeClassifier(projection_md, offset_m, whole.solve(lambdas[errors.index(min(errors))]))


def random_features(features_bd: Tensor, projection_md: Tensor, offset_m: Tensor) -> Tensor:
    """Returns φ (b, m) float64."""
    return (features_bd.double() @ projection_md.double().T + offset_m).relu()


def examples(
    white: Gaussians,
    real: tuple[Tensor, Tensor] | None,
    draws: int,
    generator: torch.Generator,
    class_share: float,
) -> Iterator[tuple[int, Tensor]]:
    """Yields every output and its examples (b, d) float64, or samples if it has none, one output at a time to save memory."""
    for j in range(len(white.means_jd)):
        if real is not None and (real[1] == j).any():
            yield j, real[0][real[1] == j].double()
        else:
            yield j, white.features(white.draws(torch.tensor([j]), draws, generator, class_share)[0])


class Moments(NamedTuple):
    """Weighted sums over examples of φ φ^T and of φ y^T, y the indicator of the example's output."""

    gram_mm: Tensor
    cross_mj: Tensor

    @classmethod
    def zero(cls, width: int, outputs: int) -> "Moments":
        return cls(torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, outputs, dtype=torch.float64))

    def add(self, output: int, phi_bm: Tensor, weight: float) -> None:
        self.gram_mm.addmm_(phi_bm.T, phi_bm, alpha=weight)
        self.cross_mj[:, output] += weight * phi_bm.sum(0)

    def solve(self, ratio: float) -> Tensor:
        """Returns V (m, j), the minimum of Σ a |φ^T V - y|² + λ |V|², λ = ratio times the Gram matrix's mean eigenvalue."""
        penalty = ratio * self.gram_mm.diagonal().mean()
        # The mean is 0 if no feature was ever active; any penalty then gives V = 0.
        penalised_mm = self.gram_mm + torch.eye(len(self.gram_mm), dtype=torch.float64) * (penalty or 1.0)
        # In the memory layout that is saved: products with another one round differently.
        return torch.cholesky_solve(self.cross_mj, torch.linalg.cholesky(penalised_mm)).contiguous()

    def squared_error(self, weight_mj: Tensor) -> float:
        """Returns Σ a |φ^T V - y|² of these examples, without the constant Σ a |y|²."""
        return float((weight_mj * (self.gram_mm @ weight_mj - 2 * self.cross_mj)).sum())


# --------------------------------------------------------------------------------------------------- aligned by draws


def aligned(
    statistics: Statistics,
    generator: torch.Generator,
    steps: int = 300,
    outputs: int = 40,
    draws: int = 64,
    rate: float = 1e-2,
    gap: float = 0.1,
    shrinkage: Shrinkage = "oas",
    class_share: float = 0.5,
) -> LinearClassifier:
    """Returns lda, corrected by SGD with a cosine schedule on `draws` samples of each of `outputs` outputs per step.

    The steps are taken in coordinates with pooled covariance I, so the rate has the same effect for features of any scale or
    shape. If the samples have lda's covariance (no class factors), lda already minimises the expected cross-entropy. The steps
    are computed in float32: almost twice as fast, with rounding far below the sampling noise.
    """
    white, start = gaussians(statistics, shrinkage), lda(statistics, shrinkage)
    base_jd = white.means_jd.float()
    base_j = (-white.means_jd.square().sum(1) / 2).float()
    white = white._replace(means_jd=base_jd, class_factors_jdr=white.class_factors_jdr.float())
    weight_jd = torch.zeros_like(base_jd, requires_grad=True)
    bias_j = torch.zeros_like(base_j, requires_grad=True)
    for step in range(steps):
        outputs_k = torch.randperm(len(base_j), generator=generator)[:outputs]
        drawn_knd = white.draws(outputs_k, draws, generator, class_share)
        with torch.enable_grad():  # callers usually disable gradients
            scores_knj = drawn_knd @ (base_jd + weight_jd).T + base_j + bias_j
            loss = alignment_loss(scores_knj, outputs_k, gap)
        slope_jd, slope_j = torch.autograd.grad(loss, (weight_jd, bias_j))
        now = rate * (1 + math.cos(math.pi * step / steps)) / 2
        with torch.no_grad():
            weight_jd -= now * slope_jd
            bias_j -= now * slope_j
    change_jd = weight_jd.detach().double() @ white.whiten_dd
    change_j = bias_j.detach().double() - change_jd @ white.centre_d
    return LinearClassifier(start.weight_jd + change_jd, start.bias_j + change_j)


def alignment_loss(scores_knj: Tensor, outputs_k: Tensor, gap: float) -> Tensor:
    """Returns the mean cross-entropy, plus `gap` times its mean difference between two samples of one output."""
    k, n, _ = scores_knj.shape
    losses_kn = F.cross_entropy(scores_knj.flatten(0, 1), outputs_k.repeat_interleave(n), reduction="none").view(k, n)
    pairs_knn = (losses_kn[:, :, None] - losses_kn[:, None]).abs()
    return losses_kn.mean() + gap * pairs_knn.sum() / (k * max(n * (n - 1), 1))


# ------------------------------------------------------------------------------------------------------------- mixed


def mixed(
    linear: LinearClassifier,
    ridge: RidgeClassifier,
    statistics: Statistics,
    generator: torch.Generator,
    outputs: int = 256,
    draws: int = 16,
    shrinkage: Shrinkage = "oas",
    class_share: float = 0.5,
) -> MixedClassifier:
    """Returns both classifiers, each at the temperature of smallest cross-entropy on new samples of up to `outputs` outputs."""
    white = gaussians(statistics, shrinkage)
    outputs_k = torch.randperm(len(white.means_jd), generator=generator)[:outputs]
    features_bd = white.features(white.draws(outputs_k, draws, generator, class_share)).flatten(0, 1)
    output_b = outputs_k.repeat_interleave(draws)
    found = [temperature(part.scores(features_bd), output_b) for part in (linear, ridge)]
    return MixedClassifier(linear, ridge, torch.tensor(found, dtype=torch.float64))


def temperature(scores_bj: Tensor, output_b: Tensor, reach: float = 100.0, smoothing: float = 0.0) -> float:
    """Returns the τ of smallest cross-entropy of scores / τ, by golden section over log τ. Cross-entropy is convex in 1/τ, so
    there is one minimum; but it is at 0 if every example is correct. So τ stays within a factor `reach` of the scores' spread,
    their standard deviation over the outputs. Classifiers without an error then have equal weight. smoothing: this share of
    every target is spread over all outputs."""
    spread = float(scores_bj.std(1, correction=0).mean())
    if spread == 0:
        return 1.0

    def cost(log_tau: float) -> float:
        return float(F.cross_entropy(scores_bj / math.exp(log_tau), output_b, label_smoothing=smoothing))

    ratio = (math.sqrt(5) - 1) / 2
    low, high = math.log(spread / reach), math.log(spread * reach)
    for _ in range(50):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if cost(left) <= cost(right) else (left, high)
    return math.exp((low + high) / 2)
