"""Pure functions on matrices, in the precision of their arguments.

Shape letters: d size of the space, k columns of a basis, r rank, n samples, o outputs, i inputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sorted_eigh(symmetric_dd: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (d,) from large to small, negatives of rounding set to 0, and eigenvectors (d, d) in columns."""
    values_d, vectors_dd = torch.linalg.eigh((symmetric_dd + symmetric_dd.T) / 2)
    return values_d.flip(0).clamp_min(0), vectors_dd.flip(1)


def top_eigenvectors(symmetric_dd: Tensor, rank: int, relative_floor: float = 1e-12) -> Tensor:
    """The leading eigenvectors, in columns (d, rank).

    Where fewer than `rank` eigenvalues exceed `relative_floor` times the largest, the missing columns are zero: a
    direction that holds no energy is arbitrary, and an arbitrary direction must not be handed out as a meaningful one.
    """
    values_d, vectors_dd = sorted_eigh(symmetric_dd)
    alive_r = (values_d[:rank] > relative_floor * values_d[0]).to(vectors_dd.dtype)
    found = vectors_dd[:, :rank] * alive_r
    padded: Tensor = F.pad(found, (0, rank - found.shape[1]))
    return padded


def remove_span(matrix_do: Tensor, basis_dk: Tensor) -> Tensor:
    """(I - Q Q^T) X for an orthonormal basis Q (d, k): what is left of the columns of X (d, o)."""
    return matrix_do - basis_dk @ (basis_dk.T @ matrix_do)


def keep_span(matrix_do: Tensor, basis_dk: Tensor) -> Tensor:
    """Q Q^T X for an orthonormal basis Q (d, k): the part of the columns of X (d, o) inside the span."""
    return basis_dk @ (basis_dk.T @ matrix_do)


def complement(basis_dk: Tensor) -> Tensor:
    """An orthonormal basis (d, d-k) of everything orthogonal to the orthonormal columns of Q (d, k)."""
    full_dd: Tensor = torch.linalg.qr(basis_dk, mode="complete")[0]
    return full_dd[:, basis_dk.shape[1] :]


def steps_to_reach(values_k: Tensor, start: float, goal: float) -> int:
    """How many of the values, added to `start` one after another, are needed for a sum >= goal (at most all of them)."""
    if start >= goal:
        return 0
    sums_k = start + torch.cumsum(values_k, 0)
    return min(int((sums_k < goal).sum().item()) + 1, len(values_k))
