"""The weights that are used, as an average along the chain of those that were trained.

The method trains w_t from w_{t-1}, the last trained weights; M_t is what answers questions, and is never trained. With t old
tasks (t = 0 in the first task, where M_0 = w_0):

    exponential   M_t = M_{t-1} + a_t (w_t - M_{t-1}),         a_t = max(a_min, g / (g + t))
    weighted      M_t = M_{t-1} + (w_t - M_{t-1}) G_t,         G_t = g S_t (S_old + g S_t + e I)^{-1}

The first is the running mean for g = 1, a_min = 0. With a constant a it unrolls to

    M_n = w_0 + Σ_{s=1..n} (1 - (1-a)^{n-s+1}) (w_s - w_{s-1})

so the newest step enters with weight a and older ones approach 1: a delay, not a dilution. The second is the M that makes

    tr((M - M_{t-1}) (S_old + e I) (M - M_{t-1})^T) + g tr((M - w_t) S_t (M - w_t)^T)

smallest: outputs on old inputs stay those of M_{t-1}, outputs on new inputs those of w_t (RegMean: Jin et al., ICLR 2023,
for models trained apart). A direction that only the new task uses is taken whole, a shared one by its share. With S_old = c S_t
and e = 0 it is exponential with a = g / (c + g). Neither needs the number of tasks.

    symbol          here
    M_{t-1}, w_t    merged_oi, trained_oi: weights, or their changes, of one linear map
    S_old, S_t      old_ii, new_ii: sums (not means) of x x^T over the inputs x of old tasks and of this one
    a_t; g; a_min   share; gamma; least
    G_t; e          gain_ii; epsilon, in units of the mean eigenvalue of S_old + g S_t

Shape letters: o outputs, i inputs.
"""

import torch
from torch import Tensor

from lamina.maths.linalg import roots_of, sorted_eigh

NEW_WEIGHT, LEAST = 2.0, 0.15
"""Default g and a_min."""


def share(old_tasks: int, gamma: float = NEW_WEIGHT, least: float = LEAST) -> float:
    """a_t in (0, 1]: 1 in the first task. Raises ValueError for gamma <= 0 or least outside [0, 1]."""
    if gamma <= 0 or not 0 <= least <= 1:
        raise ValueError(f"gamma is {gamma} and least {least}, but gamma must be > 0 and least in [0, 1]")
    return max(least, gamma / (gamma + old_tasks))


def exponential(merged_oi: Tensor, trained_oi: Tensor, weight: float) -> Tensor:
    """M_t (o, i) float64, with a_t = weight: see `share`."""
    return merged_oi.double() + weight * (trained_oi.double() - merged_oi.double())


def weighted(
    merged_oi: Tensor,
    trained_oi: Tensor,
    old_ii: Tensor,
    new_ii: Tensor,
    gamma: float = 1.0,
    cap: float | None = None,
    epsilon: float = 1e-3,
) -> Tensor:
    """M_t (o, i) float64. See `gain` for the arguments."""
    step_oi = trained_oi.double() - merged_oi.double()
    return merged_oi.double() + step_oi @ gain(old_ii, new_ii, gamma, cap, epsilon)


def gain(old_ii: Tensor, new_ii: Tensor, gamma: float = 1.0, cap: float | None = None, epsilon: float = 1e-3) -> Tensor:
    """G_t (i, i) float64, with eigenvalues in [0, 1], or in [0, cap] where a cap is set: none of the others moves.

    Directions that no input has seen keep M_{t-1}. Raises ValueError for gamma <= 0, epsilon < 0 or cap outside (0, 1].
    """
    if gamma <= 0 or epsilon < 0 or not (cap is None or 0 < cap <= 1):
        raise ValueError(
            f"gamma is {gamma}, epsilon {epsilon} and cap {cap}, "
            "but gamma > 0, epsilon >= 0 and a cap in (0, 1] or None are needed"
        )
    pull_ii = gamma * new_ii.double()
    total_ii = old_ii.double() + pull_ii
    eye_ii = torch.eye(len(total_ii), dtype=torch.float64, device=total_ii.device)
    total_ii = total_ii + epsilon * total_ii.diagonal().mean() * eye_ii
    root_ii, inverse_ii = roots_of(total_ii)
    # g S T^{-1} = T^{1/2} H T^{-1/2} with H symmetric: the eigenvalues of the gain are those of H, so they can be capped.
    values_i, vectors_ii = sorted_eigh(inverse_ii @ pull_ii @ inverse_ii)
    return root_ii @ (vectors_ii * values_i.clamp_max(cap or 1.0) @ vectors_ii.T) @ inverse_ii
