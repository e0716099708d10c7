"""Weight merging: the deployed weights as an average over the trained weights of successive tasks.

Training goes from w_{t-1} to w_t. The merged weights M_t are deployed and never trained. With t old tasks (t = 0 in the first
task, where M_0 = w_0):

    exponential   M_t = M_{t-1} + a_t (w_t - M_{t-1}),         a_t = max(a_min, g / (g + t))
    weighted      M_t = M_{t-1} + (w_t - M_{t-1}) G_t,         G_t = g S_t (S_old + g S_t + e I)^{-1}

The first is the running mean for g = 1, a_min = 0. With a constant a it unrolls to

    M_n = w_0 + Σ_{s=1..n} (1 - (1-a)^{n-s+1}) (w_s - w_{s-1})

so the newest step enters with weight a, and the weights of older steps approach 1. The second is the M that minimises

    tr((M - M_{t-1}) (S_old + e I) (M - M_{t-1})^T) + g tr((M - w_t) S_t (M - w_t)^T)

so that outputs on old inputs stay those of M_{t-1}, and outputs on new inputs those of w_t (RegMean: Jin et al., ICLR 2023, for
models trained separately). A direction that only the new task uses is taken whole, a shared one by its share. With
S_old = c S_t and e = 0 it is exponential with a = g / (c + g). Neither needs the task count.

    symbol          here
    M_{t-1}, w_t    merged_oi, trained_oi: weights, or their updates, of one linear layer
    S_old, S_t      old_ii, new_ii: sums (not means) of x x^T over the inputs x of old tasks and of this one
    a_t; g; a_min   share; gamma; least
    G_t; e          gate_ii; epsilon, in units of the mean eigenvalue of S_old + g S_t

Updates τ_k of models that were trained apart are merged without conflicts as follows:

    TIES (Yadav et al., NeurIPS 2023)   trim every τ_k to its largest entries, elect the sign of their sum for every entry,
                                        and take the mean of the trimmed entries that have this sign
    DARE (Yu et al., ICML 2024)         drop entries of τ_k at random and divide the rest by the share that is kept

Both act on one linear layer at a time, on τ_k itself and not on its factors.

Shape letters: o outputs, i inputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lamina.maths.linalg import roots_of, sorted_eigh

NEW_WEIGHT, LEAST = 2.0, 0.15
"""Default g and a_min."""


def share(old_tasks: int, gamma: float = NEW_WEIGHT, least: float = LEAST) -> float:
    """Returns a_t in (0, 1], 1 in the first task. Raises ValueError for gamma <= 0 or least outside [0, 1]."""
    if gamma <= 0 or not 0 <= least <= 1:
        raise ValueError(f"gamma is {gamma} and least {least}, but gamma must be > 0 and least in [0, 1]")
    return max(least, gamma / (gamma + old_tasks))


def exponential(merged_oi: Tensor, trained_oi: Tensor, weight: float) -> Tensor:
    """Returns M_t (o, i) float64, with a_t = weight: see `share`."""
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
    """Returns M_t (o, i) float64. See `gate` for the arguments."""
    step_oi = trained_oi.double() - merged_oi.double()
    return merged_oi.double() + step_oi @ gate(old_ii, new_ii, gamma, cap, epsilon)


def gate(old_ii: Tensor, new_ii: Tensor, gamma: float = 1.0, cap: float | None = None, epsilon: float = 1e-3) -> Tensor:
    """Returns G_t (i, i) float64, with eigenvalues in [0, 1]. A cap lowers larger eigenvalues to itself.

    Directions that no input has keep M_{t-1}. Raises ValueError for gamma <= 0, epsilon < 0 or cap outside (0, 1].
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
    # g S T^{-1} = T^{1/2} H T^{-1/2} with H symmetric: G has the eigenvalues of H, which can be capped.
    values_i, vectors_ii = sorted_eigh(inverse_ii @ pull_ii @ inverse_ii)
    return root_ii @ (vectors_ii * values_i.clamp_max(cap or 1.0) @ vectors_ii.T) @ inverse_ii


def trimmed(update_oi: Tensor, density: float) -> Tensor:
    """Returns the update with its entries of largest size, this share of them (at least one), and 0 elsewhere."""
    kept = max(1, round(density * update_oi.numel()))
    least = update_oi.abs().flatten().kthvalue(update_oi.numel() - kept + 1).values
    return update_oi.where(update_oi.abs() >= least, 0)


def dropped(update_oi: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Returns the update with about this share of its entries, drawn at random and divided by the share, and 0 elsewhere."""
    kept_oi = torch.rand(update_oi.shape, generator=generator) < density
    return update_oi.where(kept_oi.to(update_oi.device), 0) / density


def agreeing(updates: Sequence[Tensor]) -> Tensor:
    """Returns for every entry the mean of those that have the sign of their sum, (o, i); 0 where there are none."""
    every_koi = torch.stack(list(updates))
    agree_koi = every_koi * every_koi.sum(0).sign() > 0
    return (every_koi * agree_koi).sum(0) / agree_koi.sum(0).clamp_min(1)
