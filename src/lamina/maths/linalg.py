"""Pure functions on matrices, in the precision of their arguments.

Shape letters: d size of the space, k columns of a basis or centres, r rank, n points, o outputs, i inputs, m candidates.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sorted_eigh(symmetric_dd: Tensor) -> tuple[Tensor, Tensor]:
    """Returns eigenvalues (d,) in descending order, negative rounding errors set to 0, and eigenvectors (d, d) in columns.

    It always runs on the CPU. A GPU may return a vector with the other sign, which changes results if vectors of several
    blocks are combined into one.
    """
    values_d, vectors_dd = torch.linalg.eigh(((symmetric_dd + symmetric_dd.T) / 2).cpu())
    device = symmetric_dd.device
    return values_d.flip(0).clamp_min(0).to(device), vectors_dd.flip(1).to(device)


def top_eigenvectors(symmetric_dd: Tensor, rank: int, relative_floor: float = 1e-12) -> Tensor:
    """Returns the leading eigenvectors in columns, (d, rank).

    If fewer than `rank` eigenvalues exceed `relative_floor` times the largest, the missing columns are zero: a direction
    without energy is arbitrary and must not count as a meaningful one.
    """
    values_d, vectors_dd = sorted_eigh(symmetric_dd)
    alive_r = (values_d[:rank] > relative_floor * values_d[0]).to(vectors_dd.dtype)
    found = vectors_dd[:, :rank] * alive_r
    padded: Tensor = F.pad(found, (0, rank - found.shape[1]))
    return padded


def remove_span(matrix_do: Tensor, basis_dk: Tensor) -> Tensor:
    """Returns (I - Q Q^T) X (d, o) for an orthonormal basis Q (d, k): the part of the columns of X outside its span."""
    return matrix_do - basis_dk @ (basis_dk.T @ matrix_do)


def keep_span(matrix_do: Tensor, basis_dk: Tensor) -> Tensor:
    """Returns Q Q^T X (d, o) for an orthonormal basis Q (d, k): the part of the columns of X inside its span."""
    return basis_dk @ (basis_dk.T @ matrix_do)


def complement(basis_dk: Tensor) -> Tensor:
    """Returns an orthonormal basis (d, d-k) of the complement of the orthonormal columns of Q (d, k)."""
    full_dd: Tensor = torch.linalg.qr(basis_dk, mode="complete")[0]
    return full_dd[:, basis_dk.shape[1] :]


def roots_of(positive_dd: Tensor, relative_floor: float = 1e-13) -> tuple[Tensor, Tensor]:
    """Returns S^{1/2} and S^{-1/2} of a symmetric positive S, both symmetric (d, d). An eigenvalue of at most
    `relative_floor` times the largest counts as 0, and so does its inverse (Moore-Penrose)."""
    values_d, vectors_dd = sorted_eigh(positive_dd)
    alive_d = values_d > relative_floor * values_d[0]
    roots_d = values_d.sqrt() * alive_d
    inverses_d = torch.where(alive_d, 1 / roots_d, 0)
    return vectors_dd * roots_d @ vectors_dd.T, vectors_dd * inverses_d @ vectors_dd.T


def steps_to_reach(values_k: Tensor, start: float, goal: float) -> int:
    """Returns how many of the values, added to `start` in order, give a sum >= goal (at most all of them)."""
    if start >= goal:
        return 0
    sums_k = start + torch.cumsum(values_k, 0)
    return min(int((sums_k < goal).sum().item()) + 1, len(values_k))


def soft_threshold(values: Tensor, threshold: float) -> Tensor:
    """Returns sign(x) max(|x| - ξ, 0), entry by entry: the z that minimises (z - x)² / 2 + ξ |z|."""
    return values.sign() * (values.abs() - threshold).clamp_min(0)


def factors_of(matrix_oi: Tensor) -> tuple[Tensor, Tensor]:
    """Returns up (o, r) and down (r, i) with up @ down = X to float32 precision. r is the rank to that precision, or 1."""
    left_ok, values_k, right_ki = torch.linalg.svd(matrix_oi, full_matrices=False)
    rank = max(1, int((values_k > torch.finfo(torch.float32).eps * values_k[0]).sum()))
    roots_r = values_k[:rank].sqrt()
    return left_ok[:, :rank] * roots_r, roots_r[:, None] * right_ki[:rank]


def spread_points(points_nd: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Returns up to `count` of the points, far from each other: k-means++ (Arthur & Vassilvitskii, 2007), each the best of a
    few draws as in scikit-learn. Fewer if fewer points are distinct."""
    first = int(torch.randint(len(points_nd), (1,), generator=generator))
    chosen, away_n = [first], squares_between(points_nd, points_nd[first])
    while len(chosen) < count and away_n.max() > 0:
        sums_n = away_n.cumsum(0)
        draws_m = torch.rand(2 + int(math.log(count)), generator=generator, dtype=sums_n.dtype)
        draws_m = draws_m.to(sums_n.device) * sums_n[-1]
        drawn_m = torch.searchsorted(sums_n, draws_m, right=True).clamp_max(len(points_nd) - 1)
        left_mn = torch.stack([torch.minimum(away_n, squares_between(points_nd, points_nd[m])) for m in drawn_m])
        best = int(left_mn.sum(1).argmin())
        chosen.append(int(drawn_m[best]))
        away_n = left_mn[best]
    return points_nd[chosen]


def squares_between(points_nd: Tensor, point_d: Tensor) -> Tensor:
    """Returns |x - c|² of every point, (n,), exactly 0 for equal points."""
    return (points_nd - point_d).square().sum(1)


def nearest(points_nd: Tensor, centres_kd: Tensor) -> Tensor:
    """Returns the position (n,) of the nearest centre to each point, the first of equal ones."""
    return (centres_kd.square().sum(1) - 2 * points_nd @ centres_kd.T).argmin(1)


def kmeans(points_nd: Tensor, count: int, generator: torch.Generator, most: int = 300) -> Tensor:
    """Returns centres (k, d) float64 of Lloyd's algorithm from `spread_points`, run until no point changes its centre or for
    `most` rounds. k is `count`, or the number of distinct points if that is less."""
    points_nd = points_nd.double()
    return lloyd(points_nd, spread_points(points_nd, count, generator), most)


def lloyd(points_nd: Tensor, centres_kd: Tensor, most: int = 300) -> Tensor:
    """Returns centres (k, d) after repeatedly moving each to the mean of its nearest points. A centre without points moves to
    the point that is farthest from its own centre."""
    before_n: Tensor | None = None
    for _ in range(most):
        nearest_n = nearest(points_nd, centres_kd)
        if before_n is not None and torch.equal(nearest_n, before_n):
            break
        member_nk = F.one_hot(nearest_n, len(centres_kd)).to(points_nd.dtype)
        counts_k, before_n = member_nk.sum(0), nearest_n
        empty = counts_k == 0
        far_n = (points_nd - centres_kd[nearest_n]).square().sum(1)
        means_kd = member_nk.T @ points_nd / counts_k.clamp_min(1)[:, None]
        means_kd[empty] = points_nd[far_n.topk(int(empty.sum())).indices]
        centres_kd = means_kd
    return centres_kd
