"""RanPAC: least squares on random features, from sums over all examples ever seen (McDonnell et al., NeurIPS 2023,
arXiv 2307.02251).

    φ(f) = relu(R f),       R_md ~ N(0, 1), drawn once
    G = Σ φ φ^T,   C = Σ φ y^T,       over all examples of all tasks
    V = (G + λ I)^{-1} C,   s(f) = φ(f)^T V
    λ in 10^-8, 10^-7, ..., 10^8: smallest squared error on held-out examples of the newest task, V fitted on its others

    paper   here
    W       R: projection_md
    h, M    φ: phi_nm, its width
    G, C    gram_mm, cross_mj
    W_o     V: weight_mj

While the features stay as they are, V is that of all examples at once. If training moves them, G and C mix old and new
features.

Established: the equations, R, the grid of λ and its selection, read in the released code (RanPAC/RanPAC at 698e00c). Ours:
every fifth example is held out, where the code takes the last fifth of the shuffled task; at most `MOST` examples select λ; G
is float32, as there, but solved in float64; a λ for which the rounded matrix is not positive definite is skipped.

`calibrated` is ours: λ, and a temperature τ that makes softmax(s / τ) a probability, by leave-one-out on the newest examples,
whose cross-entropies are added to those of earlier tasks. Its targets are smoothed by 1 / (n + 1), as Platt's (1999), so that
examples without an error do not make τ zero. Leaving example i out of all sums changes its own scores to

    s_i' = (s_i - h_i y_i) / (1 - h_i),   h_i = φ_i^T (G + λ I)^{-1} φ_i

which is exact for least squares (Allen, Technometrics 1974: PRESS), so no example has to be held out.

Shape letters: n examples, d width, j outputs of the head, m random features.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LAMBDAS = tuple(10.0**power for power in range(-8, 9))
HELD_OUT = 5
"""Every fifth example is held out to select λ."""
MOST = 5000
"""Examples that select λ."""
RATIOS = (1e-1, 1e-2, 1e-3, 1e-4)
"""The λ of `calibrated`, in units of the mean of G's diagonal."""
TAUS = tuple(10 ** (-power / 16) for power in range(49))
"""The τ of `calibrated`, the largest first: from 1 to 0.001. The targets of s are 0 and 1."""
LEFT_OUT = 500
"""Examples that are left out, one at a time."""
PART = 2048
"""Examples whose random features are held at a time."""


class Sums(NamedTuple):
    """Over all examples of all tasks."""

    gram_mm: Tensor
    """Σ φ φ^T, float32"""
    cross_mj: Tensor
    """Σ φ y^T, float64, y the indicator of the example's output"""

    @classmethod
    def zero(cls, width: int) -> "Sums":
        return cls(torch.zeros(width, width), torch.zeros(width, 0, dtype=torch.float64))

    def plus(self, projection_md: Tensor, features_nd: Tensor, output_n: Tensor, outputs: int) -> "Sums":
        """Returns the sums with these examples of new outputs, which are counted from 0 to `outputs`."""
        gram_mm = self.gram_mm.clone()
        cross_mj = torch.zeros(len(gram_mm), outputs, dtype=torch.float64)
        for part_nd, of_part_n in zip(torch.split(features_nd, PART), torch.split(output_n, PART), strict=True):
            phi_nm = random_features(part_nd, projection_md)
            gram_mm.addmm_(phi_nm.T, phi_nm)
            cross_mj.index_add_(1, of_part_n, phi_nm.T.double())
        return Sums(gram_mm, torch.cat([self.cross_mj, cross_mj], 1))


def projection(width: int, d: int, generator: torch.Generator) -> Tensor:
    """Returns R (m, d) float32, m = `width`."""
    return torch.randn(width, d, generator=generator)


def random_features(features_nd: Tensor, projection_md: Tensor) -> Tensor:
    """Returns φ (n, m) float32."""
    return (features_nd.float() @ projection_md.T).relu()


def selected(projection_md: Tensor, features_nd: Tensor, output_n: Tensor, outputs: int) -> float:
    """Returns λ: the first with the smallest squared error on every fifth example, for V fitted on the others; 1 for fewer
    than five examples.

    features_nd, output_n: of the newest task's examples, their outputs counted from 0 to `outputs`. They are counted output by
    output. With n examples to fit, V = Φ^T (Φ Φ^T + λ I)^{-1} Y, which is the same as the formula above and needs a matrix
    (n, n) only.
    """
    if len(output_n) < HELD_OUT:
        return 1.0
    order_n = output_n.argsort(stable=True)
    if len(order_n) > MOST:
        order_n = order_n[torch.linspace(0, len(order_n) - 1, MOST).long()]
    features_nd, output_n = features_nd[order_n], output_n[order_n]
    held_n = torch.arange(len(output_n)) % HELD_OUT == HELD_OUT - 1
    phi_nm, targets_nj = random_features(features_nd, projection_md).double(), F.one_hot(output_n, outputs).double()
    fit_nm = phi_nm[~held_n]
    kernel_nn, across_nn = fit_nm @ fit_nm.T, phi_nm[held_n] @ fit_nm.T
    errors = []
    for ratio in LAMBDAS:
        factor_nn, failed = torch.linalg.cholesky_ex(kernel_nn + ratio * torch.eye(len(kernel_nn), dtype=torch.float64))
        predicted_nj = across_nn @ torch.cholesky_solve(targets_nj[~held_n], factor_nn)
        error = float((predicted_nj - targets_nj[held_n]).square().sum())
        errors.append(torch.inf if failed else error)
    return LAMBDAS[errors.index(min(errors))]


def solved(sums: Sums, ratio: float, class_j: Tensor) -> Tensor:
    """Returns V (m, j) float64 for λ = `ratio`. class_j: the class of every output. The outputs of one class have one column,
    that of all its examples."""
    same_jj = (class_j[:, None] == class_j).double()
    gram_mm = sums.gram_mm.double()
    for larger in (*(value for value in LAMBDAS if value >= ratio), 10 * max(LAMBDAS)):
        factor_mm, failed = torch.linalg.cholesky_ex(gram_mm + larger * torch.eye(len(gram_mm), dtype=torch.float64))
        if not failed:
            break
    return torch.cholesky_solve(sums.cross_mj @ same_jj, factor_mm).contiguous()


class Calibrated(NamedTuple):
    """A solution whose softmax(φ^T V / τ) is a probability of every output."""

    weight_mj: Tensor
    """V, float64"""
    temperature: float
    """τ"""
    losses_rt: Tensor
    """For every λ of `RATIOS` and τ of `TAUS`: the cross-entropies of the left-out examples of all tasks, summed, float64."""


def calibrated(
    sums: Sums, projection_md: Tensor, features_nd: Tensor, output_n: Tensor, losses_rt: Tensor | None = None
) -> Calibrated:
    """Returns V and τ for the λ and τ with the smallest cross-entropy over all tasks, whose examples are left out of the sums
    when their task is the newest.

    features_nd, output_n: of the newest examples, which are in the sums; their positions among all outputs. At most `LEFT_OUT`
    evenly spaced ones are left out. losses_rt: of the tasks before, if there are any. Raises ValueError where no λ can be used.
    """
    taken_n = torch.linspace(0, len(output_n) - 1, min(LEFT_OUT, len(output_n))).long()
    output_n, phi_nm = output_n[taken_n], random_features(features_nd[taken_n], projection_md).double()
    mean, smoothing = float(sums.gram_mm.diagonal().mean()) or 1.0, 1 / (len(output_n) + 1)
    losses_rt = torch.zeros(len(RATIOS), len(TAUS), dtype=torch.float64) if losses_rt is None else losses_rt.clone()
    weights = []
    for r, ratio in enumerate(RATIOS):
        penalised_mm = sums.gram_mm.double()
        penalised_mm.diagonal().add_(ratio * mean)
        factor_mm, failed = torch.linalg.cholesky_ex(penalised_mm)
        if failed:  # of the rounding of G
            losses_rt[r] = torch.inf
        weight_mj = torch.cholesky_solve(sums.cross_mj, factor_mm).contiguous()
        halves_mn = torch.linalg.solve_triangular(factor_mm, phi_nm.T, upper=False)
        leverage_n1 = halves_mn.square().sum(0)[:, None]
        targets_nj = F.one_hot(output_n, weight_mj.shape[1])
        left_nj = (phi_nm @ weight_mj - leverage_n1 * targets_nj) / (1 - leverage_n1).clamp_min(1e-6)
        for t, tau in enumerate(TAUS):
            losses_rt[r, t] += F.cross_entropy(left_nj / tau, output_n, reduction="sum", label_smoothing=smoothing)
        weights.append(weight_mj)
    best = int(losses_rt.flatten().nan_to_num(torch.inf).argmin())
    if not losses_rt.isfinite().any():
        raise ValueError("the Gram matrix is not positive definite with any of the penalties")
    return Calibrated(weights[best // len(TAUS)], TAUS[best % len(TAUS)], losses_rt)
