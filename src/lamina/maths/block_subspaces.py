"""Subspaces of a space that is divided into g blocks of equal size, such as the heads of an attention layer.

A moment is given per block, (g, e, e). A basis (d, k) has orthonormal columns, each within one block.

Shape letters: g blocks, e size of a block, d = g e, k columns of a basis, r rank, b examples, p probes of an example, j tasks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.maths.linalg import remove_span, sorted_eigh, steps_to_reach

ROUNDING = 1e-10
"""Share of a block's energy below which a direction is rounding noise."""


def by_block(basis_dk: Tensor, blocks: int) -> Tensor:
    """Returns (g e, k) as (g, e, k)."""
    return basis_dk.view(blocks, len(basis_dk) // blocks, basis_dk.shape[1])


def free_directions(moment_ee: Tensor, old_ek: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the energies (k,) and directions (e, k) outside the old space, in descending order, without rounding noise."""
    total = moment_ee.trace()
    for _ in range(2):  # once would leave what float32 has rounded off the old basis
        moment_ee = remove_span(remove_span(moment_ee, old_ek).T, old_ek)
    values_e, vectors_ee = sorted_eigh(moment_ee)
    alive = int((values_e > ROUNDING * total).sum())
    return values_e, vectors_ee[:, :alive]


def main_directions(moment_gee: Tensor, old_dk: Tensor, rank: int) -> Tensor:
    """Returns each block's first `rank` directions outside the old space, (d, r). Missing ones are zero."""
    olds_gek = by_block(old_dk.double(), len(moment_gee))
    return torch.cat([padded(free_directions(m, old)[1], rank) for m, old in zip(moment_gee, olds_gek, strict=True)])


def first_directions(basis_dk: Tensor, blocks: int, rank: int) -> Tensor:
    """Returns each block's first `rank` columns of a basis, (d, r). Missing ones are zero."""
    return torch.cat([padded(part_ek[:, part_ek.any(0)], rank) for part_ek in by_block(basis_dk, blocks)])


def padded(directions_ek: Tensor, rank: int) -> Tensor:
    """Returns the first `rank` columns, filled up with zeros."""
    return F.pad(directions_ek[:, :rank], (0, max(0, rank - directions_ek.shape[1])))


def new_directions(moment_gee: Tensor, old_dk: Tensor, epsilon: float) -> Tensor:
    """Returns each block's fewest directions outside the old space with which both hold a share ε of its energy, (d, k).
    At least one per block, unless none is left."""
    found = []
    for moment_ee, old_ek in zip(moment_gee, by_block(old_dk.double(), len(moment_gee)), strict=True):
        values_e, directions_ek = free_directions(moment_ee, old_ek)
        shares_e = values_e / moment_ee.trace().clamp_min(1e-300)
        count = max(1, steps_to_reach(shares_e, 1 - float(shares_e.sum()), epsilon))
        found.append(directions_ek[:, :count])
    basis_dk: Tensor = torch.block_diag(*found)  # type: ignore[no-untyped-call]
    return basis_dk


def share(moment_gee: Tensor, basis_dk: Tensor) -> Tensor:
    """Returns the share () of the energy of all blocks in the span of a basis."""
    basis_gek = by_block(basis_dk.double(), len(moment_gee))
    held = (basis_gek * (moment_gee @ basis_gek)).sum()
    return held / moment_gee.diagonal(dim1=1, dim2=2).sum().clamp_min(1e-300)


def similarity(probes_bpd: Tensor, bases_dk: Tensor, sizes_j: Tensor) -> Tensor:
    """Returns the share of each example's energy in the span of each task's basis, (b, j). bases_dk holds the bases side by
    side, `sizes_j` columns each."""
    squares_bk = (probes_bpd @ bases_dk).square().sum(1)
    owner_k = torch.repeat_interleave(sizes_j, output_size=squares_bk.shape[1])
    inside_bj = squares_bk.new_zeros(len(squares_bk), len(sizes_j)).index_add_(1, owner_k, squares_bk)
    return inside_bj / probes_bpd.square().sum((1, 2)).clamp_min(1e-30)[:, None]
