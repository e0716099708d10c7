"""Statistics of the examples of every output of the head: how they are moved, concatenated and sampled from.

    μ_j = mean of the features of output j      n_j their number
    S   = Σ_j Σ_{i in j} (f_i - μ_j)(f_i - μ_j)^T               one for all outputs; a sum, not divided
    Σ   = (1 - ρ) S / N + ρ V,     N = Σ_j n_j - J  degrees of freedom
    V   = tr(S / N) / d I; for features of several blocks side by side diag(v_1 I, v_2 I, ...), v_b the mean variance in block b

    ρ   = min(1, ((1 - 2/d) tr(C²) + tr²(C)) / ((N + 1 - 2/d) (tr(C²) - tr²(C) / d))),   C = V^{-1/2} S V^{-1/2} / N
          (oracle approximating shrinkage: Chen, Wiesel, Eldar & Hero, IEEE TSP 2010, eq. 23)

    symbol  here
    μ, n    means_jd, counts_j
    S       scatter_dd
    U_j     class_factors_jdr: leading eigenvectors of the covariance of output j, times the roots of their eigenvalues
    ω       class_share: the Gaussian of an output has covariance (1 - ω) Σ + ω U_j U_j^T

A linear map f -> W f of all features moves μ to W μ, S to W S W^T and U_j to W U_j, without any example.

Shape letters: n examples, d width, j outputs of the head (task, class), r class covariance rank, k outputs sampled from (or
blocks), m samples of each.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lamina.maths.linalg import roots_of

Shrinkage = float | Literal["oas"]


class Statistics(NamedTuple):
    """Its size does not depend on the number of examples. Each output adds a mean, a count and class factors."""

    means_jd: Tensor
    """float64"""
    counts_j: Tensor
    """int64, each at least 1"""
    scatter_dd: Tensor
    """float64: sum of squares about the means, over all outputs"""
    class_factors_jdr: Tensor
    """float32, used for sampling only; r = 0 if none are stored"""
    blocks: int = 1
    """the features are those of this many blocks, of one width, side by side"""

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors to be saved, by name; `blocks` is not among them."""
        return {name: part.contiguous() for name, part in self._asdict().items() if isinstance(part, Tensor)}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], blocks: int = 1) -> "Statistics":
        """The inverse of `tensors`, bit for bit. Raises KeyError for a missing tensor."""
        means_jd, counts_j, scatter_dd, class_factors_jdr = (tensors[name] for name in cls._fields[:-1])
        return cls(means_jd, counts_j, scatter_dd, class_factors_jdr, blocks)


def of_features(
    features_nd: Tensor, output_n: Tensor, outputs: int, class_covariance_rank: int = 0, blocks: int = 1
) -> Statistics:
    """Returns the statistics of features of any dtype. output_n (n,) int64: the output of each example, below `outputs`.

    Raises ValueError for shapes that do not fit, an output that does not exist, or one without an example.
    """
    if features_nd.ndim != 2 or output_n.shape != features_nd.shape[:1]:
        raise ValueError(
            f"features of shape {tuple(features_nd.shape)} with outputs of shape {tuple(output_n.shape)}: "
            "(n, d) with (n,) is needed"
        )
    if len(output_n) and not 0 <= int(output_n.min()) <= int(output_n.max()) < outputs:
        raise ValueError(
            f"outputs from {int(output_n.min())} to {int(output_n.max())} are named, but they go from 0 to {outputs - 1}"
        )
    counts_j = torch.bincount(output_n, minlength=outputs)
    if (counts_j == 0).any():
        raise ValueError(f"output {int(counts_j.argmin())} has no example: omit it, or give it at least one")
    features_nd = features_nd.double()
    sums_jd = torch.zeros(outputs, features_nd.shape[1], dtype=torch.float64).index_add_(0, output_n, features_nd)
    means_jd = sums_jd / counts_j[:, None]
    centred_nd = features_nd - means_jd[output_n]
    class_factors_jdr = torch.zeros(outputs, features_nd.shape[1], class_covariance_rank)
    for j in range(outputs if class_covariance_rank else 0):
        class_factors_jdr[j] = class_factors(centred_nd[output_n == j], class_covariance_rank)
    return Statistics(means_jd, counts_j, centred_nd.T @ centred_nd, class_factors_jdr, blocks)


def class_factors(centred_nd: Tensor, rank: int) -> Tensor:
    """Returns U (d, r) with U U^T the best approximation of rank r of the covariance of these centred examples. Columns for
    which they have no direction are zero."""
    _, values_k, directions_kd = torch.linalg.svd(centred_nd, full_matrices=False)
    scaled_rd = (values_k[:, None] * directions_kd)[:rank] / max(len(centred_nd) - 1, 1) ** 0.5
    padded_dr: Tensor = torch.nn.functional.pad(scaled_rd.T, (0, rank - len(scaled_rd)))
    return padded_dr


def concatenated(old: Statistics, new: Statistics) -> Statistics:
    """Returns the outputs of the one, then those of the other. Raises ValueError if width or class covariance rank differ."""
    shapes = [tuple(part.class_factors_jdr.shape[1:]) for part in (old, new)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"statistics of (width, class covariance rank) {shapes[0]} and {shapes[1]} "
            "cannot be concatenated: take both from one backbone, with one class_covariance_rank"
        )
    return Statistics(
        torch.cat([old.means_jd, new.means_jd]),
        torch.cat([old.counts_j, new.counts_j]),
        old.scatter_dd + new.scatter_dd,
        torch.cat([old.class_factors_jdr, new.class_factors_jdr]),
        new.blocks,
    )


def moved(statistics: Statistics, map_dd: Tensor) -> Statistics:
    """Returns the statistics of W f for the same examples f, W = map_dd (d, d), exact up to rounding."""
    map_dd = map_dd.double()
    return statistics._replace(
        means_jd=statistics.means_jd @ map_dd.T,
        scatter_dd=map_dd @ statistics.scatter_dd @ map_dd.T,
        class_factors_jdr=(map_dd @ statistics.class_factors_jdr.double()).float(),
    )


def covariance(statistics: Statistics, shrinkage: Shrinkage = "oas") -> Tensor:
    """Returns Σ (d, d) float64, symmetric and positive definite for any statistics. A shrinkage of 1 is a multiple of I in
    every block. A factor on all features of one block changes no score of LDA.

    Features without any variation give a small multiple of I, so classifiers compare distances to the means. Raises
    ValueError for a shrinkage outside [0, 1].
    """
    freedom = max(int(statistics.counts_j.sum()) - len(statistics.counts_j), 1)
    cov_dd = (statistics.scatter_dd + statistics.scatter_dd.T) / (2 * freedom)
    variance_k = cov_dd.diagonal().reshape(statistics.blocks, -1).mean(1)
    means_k = statistics.means_jd.square().mean(0).reshape(statistics.blocks, -1).mean(1)
    # Far above a variance of 0 after float32 rounding, far below any meaningful variance.
    floor_k = 1e-12 * variance_k + 1e-13 * means_k
    width = len(cov_dd) // statistics.blocks
    variance_d, floor_d = (
        part_k.repeat_interleave(width) for part_k in (variance_k, torch.where(floor_k > 0, floor_k, 1.0))
    )
    scale_d = (variance_d + floor_d).sqrt()
    rho = oas(cov_dd / scale_d / scale_d[:, None], freedom) if shrinkage == "oas" else float(shrinkage)
    if not 0 <= rho <= 1:
        raise ValueError(f"shrinkage is {rho}, but must be in [0, 1] or 'oas'")
    return (1 - rho) * cov_dd + (rho * variance_d + floor_d).diag()


def oas(cov_dd: Tensor, freedom: int) -> float:
    """Returns ρ in [0, 1], the shrinkage towards tr(C)/d I of a covariance with that many degrees of freedom."""
    d, trace, squares = len(cov_dd), float(cov_dd.trace()), float(cov_dd.square().sum())
    spread = (freedom + 1 - 2 / d) * (squares - trace**2 / d)
    return min(1.0, ((1 - 2 / d) * squares + trace**2) / spread) if spread > 0 else 1.0


class Gaussians(NamedTuple):
    """One Gaussian per output, in the coordinates z = Σ^{-1/2} (f - m), in which the pooled covariance is I."""

    whiten_dd: Tensor
    """Σ^{-1/2}"""
    colour_dd: Tensor
    """Σ^{1/2}"""
    centre_d: Tensor
    """m: the mean of the outputs' means"""
    means_jd: Tensor
    """Σ^{-1/2} (μ_j - m)"""
    class_factors_jdr: Tensor
    """Σ^{-1/2} U_j"""

    def draws(self, outputs_k: Tensor, count: int, generator: torch.Generator, class_share: float = 0.5) -> Tensor:
        """Returns z (k, m, d) in the means' dtype: `count` samples of each of these outputs. Without class factors the class
        share is 0.

        The noise is drawn in float32: twice as fast, and rounded far more finely than a mean is known.
        """
        share = class_share if self.class_factors_jdr.shape[2] else 0.0
        shape_kmd = (len(outputs_k), count, len(self.centre_d))
        noise_kmd = torch.randn(shape_kmd, generator=generator).to(self.means_jd.dtype)
        drawn_kmd: Tensor = self.means_jd[outputs_k, None] + (1 - share) ** 0.5 * noise_kmd
        if share:
            factors_krd = self.class_factors_jdr[outputs_k].transpose(1, 2)
            noise_kmr = torch.randn((*shape_kmd[:2], factors_krd.shape[1]), generator=generator).to(factors_krd.dtype)
            drawn_kmd += share**0.5 * noise_kmr @ factors_krd
        return drawn_kmd

    def features(self, white_kmd: Tensor) -> Tensor:
        """Returns f = Σ^{1/2} z + m, of any leading shape."""
        features_kmd: Tensor = white_kmd @ self.colour_dd + self.centre_d
        return features_kmd


def gaussians(statistics: Statistics, shrinkage: Shrinkage = "oas") -> Gaussians:
    """Returns the Gaussians of all outputs."""
    colour_dd, whiten_dd = roots_of(covariance(statistics, shrinkage))
    centre_d = statistics.means_jd.mean(0)
    means_jd = (statistics.means_jd - centre_d) @ whiten_dd
    return Gaussians(whiten_dd, colour_dd, centre_d, means_jd, whiten_dd @ statistics.class_factors_jdr.double())
