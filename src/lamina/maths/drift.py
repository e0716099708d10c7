"""Drift compensation: moves old statistics into the new feature space.

The map is fitted on inputs at hand (the current task's examples, and variants of them), with their features before (F) and
after (F') training. Features are rows of F; a map acts on them as column vectors: f' ≈ W f, hence F' ≈ F W^T.

    linear           W = I + (F' - F)^T F (F^T F + n ρ D)^{-1},  D = diag(F^T F)/n       ridge, anchored at the identity
                     μ <- W μ,  S <- W S W^T,  U <- W U                            for every old output
    linear + local   then  μ_j += β_j Σ_i softmax_i(cos(μ_j, f_i) / τ) (f'_i - W f_i),    β_j = max(0, max_i cos(μ_j, f_i))
                     with the μ_j before the move, in the space of the f_i

    ρ minimises the squared leave-one-out error, in closed form (PRESS: Allen, Technometrics 1974):
                     Σ_i |D^{-1/2} (f'_i - W f_i)|² / (1 - h_i)²,    h_i = f_i^T (F^T F + n ρ D)^{-1} f_i

    symbol  here                     symbol  here
    F, F'   before_nd, after_nd      ρ       one of `RIDGES`
    W       map_dd                   τ       temperature
    D^{1/2} scale_d: with it, no unit of a feature matters

Shape letters: n inputs at hand, m of them (for the leave-one-out error), d width, j old outputs.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.maths.class_statistics import Statistics, moved

Kind = Literal["none", "linear", "linear+local", "random"]
RIDGES = tuple(10.0**k for k in range(-10, 2))
"""The ρ to select from. The first of equally good ones is used."""
LEFT_OUT = 1000
"""The leave-one-out error is that of about this many inputs, evenly spaced."""
ROUNDING = 1e-13
"""1 - h is known no better than this."""


class Drift(NamedTuple):
    """How far features moved, and how well a map predicts it. A cosine far below that of other tasks is a warning."""

    size: float
    """‖W - I‖_F / sqrt(d)"""
    cosine: float
    """mean cosine between W f and f' over examples, which should be held out from the fit"""


def linear_map(before_nd: Tensor, after_nd: Tensor, ridges: tuple[float, ...] = RIDGES) -> Tensor:
    """Returns W (d, d) float64 with f' ≈ W f. A linear drift is found to about 1e-8 if the inputs span the space. Directions
    outside their span keep the identity. Raises ValueError for pairs that do not match or a ridge that is not positive."""
    if before_nd.shape != after_nd.shape or before_nd.ndim != 2 or min(ridges) <= 0:
        raise ValueError(
            f"features of shapes {tuple(before_nd.shape)} and {tuple(after_nd.shape)} with ridges {ridges}: "
            "two of one shape (n, d), of the same inputs, and ridges > 0 are needed"
        )
    (n, d), before_nd = before_nd.shape, before_nd.double()
    scale_d = before_nd.square().mean(0).sqrt()
    scale_d = torch.where(scale_d > 0, scale_d, 1.0)
    step_nd, before_nd = (after_nd.double() - before_nd) / scale_d, before_nd / scale_d
    energies_d, directions_dd = torch.linalg.eigh(before_nd.T @ before_nd)
    energies_d = energies_d.clamp_min(0)
    if not energies_d.any():
        return torch.eye(d, dtype=torch.float64)
    along_dd = directions_dd.T @ (before_nd.T @ step_nd)
    part_md, step_md = (rows_nd[:: max(1, n // LEFT_OUT)] for rows_nd in (before_nd @ directions_dd, step_nd))
    errors = []
    for ridge in ridges:
        inverse_d = 1 / (energies_d + ridge * n)
        residual_md = step_md - part_md * inverse_d @ along_dd
        kept_m = 1 - part_md.square() @ inverse_d
        errors.append(float((residual_md / kept_m.clamp_min(ROUNDING)[:, None]).square().sum()))
    inverse_d = 1 / (energies_d + ridges[errors.index(min(errors))] * n)
    scaled_dd: Tensor = (directions_dd * inverse_d @ along_dd).T
    return torch.eye(d, dtype=torch.float64) + scaled_dd * scale_d[:, None] / scale_d


def random_map(map_dd: Tensor, generator: torch.Generator) -> Tensor:
    """Returns a control: the identity plus a random step with the Frobenius norm of this map's step."""
    eye_dd = torch.eye(len(map_dd), dtype=torch.float64)
    noise_dd = torch.randn(map_dd.shape, generator=generator, dtype=torch.float64)
    return eye_dd + noise_dd * float((map_dd - eye_dd).norm() / noise_dd.norm())


def local_moves(
    means_jd: Tensor, before_nd: Tensor, after_nd: Tensor, map_dd: Tensor, temperature: float = 0.07
) -> Tensor:
    """Returns the residual of the map near each mean, (j, d) float64, to be added to the moved means."""
    before_nd, after_nd = before_nd.double(), after_nd.double()
    cosine_jn = F.normalize(means_jd.double(), dim=1) @ F.normalize(before_nd, dim=1).T
    trust_j = cosine_jn.amax(1).clamp_min(0)
    moves_jd: Tensor = trust_j[:, None] * (cosine_jn / temperature).softmax(1) @ (after_nd - before_nd @ map_dd.T)
    return moves_jd


def drift(map_dd: Tensor, before_nd: Tensor, after_nd: Tensor) -> Drift:
    """Returns the size of a map's step and the quality of its predictions on these examples."""
    eye_dd = torch.eye(len(map_dd), dtype=torch.float64)
    cosine_n = F.cosine_similarity(before_nd.double() @ map_dd.T, after_nd.double(), dim=1)
    return Drift(float((map_dd - eye_dd).norm()) / len(map_dd) ** 0.5, float(cosine_n.mean()))


def compensated(
    old: Statistics,
    before_nd: Tensor,
    after_nd: Tensor,
    kind: Kind = "linear",
    generator: torch.Generator | None = None,
    temperature: float = 0.07,
) -> tuple[Statistics, Tensor]:
    """Returns the old outputs' statistics in the new feature space, and the map W (d, d) that moved them.

    "random" draws its map from the generator, and raises ValueError without one.
    """
    if kind == "none":
        return old, torch.eye(len(old.scatter_dd), dtype=torch.float64)
    map_dd = linear_map(before_nd, after_nd)
    if kind == "random":
        if generator is None:
            raise ValueError("drift 'random' draws its map: give a generator")
        map_dd = random_map(map_dd, generator)
    new = moved(old, map_dd)
    if kind == "linear+local":
        moves_jd = local_moves(old.means_jd, before_nd, after_nd, map_dd, temperature)
        new = new._replace(means_jd=new.means_jd + moves_jd)
    return new, map_dd
