"""What is kept of the examples of every row of the head, and how it moves, joins and is drawn from.

    μ_j = mean of the features of row j         n_j their number
    S   = Σ_j Σ_{i in j} (f_i - μ_j)(f_i - μ_j)^T               one for all rows, a sum: not divided
    Σ   = (1 - ρ) S / N + ρ tr(S / N) / d I,     N = Σ_j n_j - J  degrees of freedom

    ρ   = min(1, ((1 - 2/d) tr(C²) + tr²(C)) / ((N + 1 - 2/d) (tr(C²) - tr²(C) / d))),   C = S / N
          (oracle approximating shrinkage: Chen, Wiesel, Eldar & Hero, IEEE TSP 2010, eq. 23)

    symbol  here
    μ, n    means_jd, counts_j
    S       scatter_dd
    U_j     own_jdr: leading eigenvectors of row j's own covariance times the roots of their eigenvalues
    ω       own_share: a row's Gaussian has covariance (1 - ω) Σ + ω U_j U_j^T

A linear map f -> W f of all features moves μ to W μ, S to W S W^T and U_j to W U_j: nothing has to be seen again.

Shape letters: n examples, d width, j rows of the head (task, class), r rank of a row's own part, k rows drawn from,
m draws of each.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lamina.maths.linalg import roots_of

Shrinkage = float | Literal["oas"]


class Statistics(NamedTuple):
    """Constant in the number of examples; one more mean, count and own part per row."""

    means_jd: Tensor
    """float64"""
    counts_j: Tensor
    """int64, each at least 1"""
    scatter_dd: Tensor
    """float64: sum of squares about the row means, over all rows"""
    own_jdr: Tensor
    """float32, as it is only drawn from; r = 0 where none is kept"""

    def tensors(self) -> dict[str, Tensor]:
        """What has to be saved, by name."""
        return {name: part.contiguous() for name, part in self._asdict().items()}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> "Statistics":
        """The inverse of `tensors`, bit for bit. Raises KeyError where one is missing."""
        return cls(*(tensors[name] for name in cls._fields))


def of_features(features_nd: Tensor, row_n: Tensor, rows: int, own_rank: int = 0) -> Statistics:
    """The statistics of these features, of any dtype; row_n (n,) int64 says which of the `rows` rows each is of.

    Raises ValueError for shapes that do not fit, a row that does not exist and a row without an example.
    """
    if features_nd.ndim != 2 or row_n.shape != features_nd.shape[:1]:
        raise ValueError(
            f"features of shape {tuple(features_nd.shape)} with rows of shape {tuple(row_n.shape)}: (n, d) with (n,) is needed"
        )
    if len(row_n) and not 0 <= int(row_n.min()) <= int(row_n.max()) < rows:
        raise ValueError(
            f"rows from {int(row_n.min())} to {int(row_n.max())} are named, but they go from 0 to {rows - 1}"
        )
    counts_j = torch.bincount(row_n, minlength=rows)
    if (counts_j == 0).any():
        raise ValueError(f"row {int(counts_j.argmin())} has no example: leave it out, or give it at least one")
    features_nd = features_nd.double()
    sums_jd = torch.zeros(rows, features_nd.shape[1], dtype=torch.float64).index_add_(0, row_n, features_nd)
    means_jd = sums_jd / counts_j[:, None]
    centred_nd = features_nd - means_jd[row_n]
    own_jdr = torch.zeros(rows, features_nd.shape[1], own_rank)
    for j in range(rows if own_rank else 0):
        own_jdr[j] = own_part(centred_nd[row_n == j], own_rank)
    return Statistics(means_jd, counts_j, centred_nd.T @ centred_nd, own_jdr)


def own_part(centred_nd: Tensor, rank: int) -> Tensor:
    """U (d, r) with U U^T the best approximation of rank r of the covariance of these centred examples. Columns of
    directions that they do not have are zero."""
    _, values_k, directions_kd = torch.linalg.svd(centred_nd, full_matrices=False)
    scaled_rd = (values_k[:, None] * directions_kd)[:rank] / max(len(centred_nd) - 1, 1) ** 0.5
    padded_dr: Tensor = torch.nn.functional.pad(scaled_rd.T, (0, rank - len(scaled_rd)))
    return padded_dr


def concatenated(old: Statistics, new: Statistics) -> Statistics:
    """The rows of the one followed by the rows of the other. Raises ValueError if width or rank of own parts differ."""
    if old.own_jdr.shape[1:] != new.own_jdr.shape[1:]:
        raise ValueError(
            f"statistics of (width, own rank) {tuple(old.own_jdr.shape[1:])} and {tuple(new.own_jdr.shape[1:])} "
            "cannot be concatenated: take both from one backbone, with one own_rank"
        )
    return Statistics(
        torch.cat([old.means_jd, new.means_jd]),
        torch.cat([old.counts_j, new.counts_j]),
        old.scatter_dd + new.scatter_dd,
        torch.cat([old.own_jdr, new.own_jdr]),
    )


def moved(statistics: Statistics, map_dd: Tensor) -> Statistics:
    """The statistics of W f for every example f behind these, W = map_dd (d, d); exactly those, up to rounding."""
    map_dd = map_dd.double()
    return statistics._replace(
        means_jd=statistics.means_jd @ map_dd.T,
        scatter_dd=map_dd @ statistics.scatter_dd @ map_dd.T,
        own_jdr=(map_dd @ statistics.own_jdr.double()).float(),
    )


def covariance(statistics: Statistics, shrinkage: Shrinkage = "oas") -> Tensor:
    """Σ (d, d) float64, symmetric and positive definite whatever the statistics. A shrinkage of 1 is a multiple of I.

    Where features do not vary at all nothing is known of their covariance: it is then a small multiple of I, by which
    every head below ranks rows by the distance to their means. Raises ValueError for a shrinkage outside [0, 1].
    """
    d = len(statistics.scatter_dd)
    freedom = max(int(statistics.counts_j.sum()) - len(statistics.counts_j), 1)
    cov_dd = (statistics.scatter_dd + statistics.scatter_dd.T) / (2 * freedom)
    rho = oas(cov_dd, freedom) if shrinkage == "oas" else float(shrinkage)
    if not 0 <= rho <= 1:
        raise ValueError(f"shrinkage is {rho}, but must be in [0, 1] or 'oas'")
    variance = float(cov_dd.trace()) / d
    # Far above what rounding of float32 features leaves of a variance of 0, far below any variance that means something.
    floor = 1e-12 * variance + 1e-13 * float(statistics.means_jd.square().mean())
    eye_dd = torch.eye(d, dtype=torch.float64)
    return (1 - rho) * cov_dd + (rho * variance + (floor or 1.0)) * eye_dd


def oas(cov_dd: Tensor, freedom: int) -> float:
    """ρ in [0, 1]: how much a covariance from that many degrees of freedom is best shrunk towards tr(C)/d I."""
    d, trace, squares = len(cov_dd), float(cov_dd.trace()), float(cov_dd.square().sum())
    spread = (freedom + 1 - 2 / d) * (squares - trace**2 / d)
    return min(1.0, ((1 - 2 / d) * squares + trace**2) / spread) if spread > 0 else 1.0


def bytes_of(statistics: Statistics) -> int:
    """8 (j d + j + d²) + 4 j d r."""
    return sum(part.numel() * part.element_size() for part in statistics)


class Gaussians(NamedTuple):
    """One Gaussian per row, in the coordinates z = Σ^{-1/2} (f - m) in which the pooled covariance is I."""

    whiten_dd: Tensor
    """Σ^{-1/2}"""
    colour_dd: Tensor
    """Σ^{1/2}"""
    centre_d: Tensor
    """m: the mean of the rows' means"""
    means_jd: Tensor
    """Σ^{-1/2} (μ_j - m)"""
    own_jdr: Tensor
    """Σ^{-1/2} U_j"""

    def draws(self, rows_k: Tensor, per_row: int, generator: torch.Generator, own_share: float = 0.5) -> Tensor:
        """z (k, m, d) of the means' type: `per_row` draws of each of these rows. own_share is 0 where no own part is kept.

        The noise itself is drawn in float32, which is twice as fast and rounded far more finely than a mean is known.
        """
        share = own_share if self.own_jdr.shape[2] else 0.0
        shape_kmd = (len(rows_k), per_row, len(self.centre_d))
        noise_kmd = torch.randn(shape_kmd, generator=generator).to(self.means_jd.dtype)
        drawn_kmd: Tensor = self.means_jd[rows_k, None] + (1 - share) ** 0.5 * noise_kmd
        if share:
            own_krd = self.own_jdr[rows_k].transpose(1, 2)
            noise_kmr = torch.randn((*shape_kmd[:2], own_krd.shape[1]), generator=generator).to(own_krd.dtype)
            drawn_kmd += share**0.5 * noise_kmr @ own_krd
        return drawn_kmd

    def features(self, white_kmd: Tensor) -> Tensor:
        """f = Σ^{1/2} z + m, of any leading shape."""
        features_kmd: Tensor = white_kmd @ self.colour_dd + self.centre_d
        return features_kmd


def gaussians(statistics: Statistics, shrinkage: Shrinkage = "oas") -> Gaussians:
    colour_dd, whiten_dd = roots_of(covariance(statistics, shrinkage))
    centre_d = statistics.means_jd.mean(0)
    means_jd = (statistics.means_jd - centre_d) @ whiten_dd
    return Gaussians(whiten_dd, colour_dd, centre_d, means_jd, whiten_dd @ statistics.own_jdr.double())
