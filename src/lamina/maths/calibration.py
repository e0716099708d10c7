"""Calibration of a unified LDA classifier without held-out examples: a training example is scored as if it had never been seen.

With few examples per output LDA is too sure of itself, since means and covariance are fitted to the very examples. Leaving
example i of output j out changes both by rank one (the shrinkage and the degrees of freedom stay):

    μ_{j,-i} = μ_j - δ / (n_j - 1)                 δ = f_i - μ_j
    Σ_{-i}   = Σ - a c δ δ^T                       a = (1 - ρ) / N,   c = n_j / (n_j - 1)
    Σ_{-i}^{-1} = P + γ g g^T                      P = Σ^{-1},   g = P δ,   γ = a c / (1 - a c δ^T g)   (Sherman & Morrison)

The temperature of smallest cross-entropy of these scores is the classifier's (temperature scaling: Guo et al., ICML 2017).

Inferred: no paper is known to us that calibrates a continual LDA like this. The scores' accuracy on training examples comes out
near that on held-out ones, and so does the temperature (docs/model.md).

Shape letters: n examples, d width, j outputs of the head.
"""

import torch
from torch import Tensor

from lamina.maths.class_statistics import Statistics, covariance

LEAST = 1e-9
"""Least value of 1 - a c δ^T g: below it the example alone spans a direction of the covariance."""


def left_out_scores(statistics: Statistics, features_nd: Tensor, output_n: Tensor) -> Tensor:
    """Returns the LDA scores (n, j) float64 of examples that `statistics` were made from, each with itself left out.

    output_n (n,): the output of each. Raises ValueError for an output with one example only, which cannot be left out.
    """
    counts_n = statistics.counts_j[output_n].double()
    if (counts_n < 2).any():
        raise ValueError("an output with one example has no mean without it: leave such outputs out")
    means_jd, features_nd = statistics.means_jd, features_nd.double()
    cov_dd = covariance(statistics)
    freedom = int(statistics.counts_j.sum()) - len(statistics.counts_j)
    pooled_dd = (statistics.scatter_dd + statistics.scatter_dd.T) / 2
    # Off the diagonal the covariance is a S, whatever the shrinkage: so a follows without computing it again.
    above = torch.triu(torch.ones_like(pooled_dd, dtype=torch.bool), 1)
    energy = float(pooled_dd[above].square().sum())
    share = float((cov_dd[above] * pooled_dd[above]).sum()) / energy if energy else 1 / max(freedom, 1)
    inverse_dd = torch.linalg.inv(cov_dd)
    apart_nd = features_nd - means_jd[output_n]
    bent_nd = apart_nd @ inverse_dd
    weight_n = share * counts_n / (counts_n - 1)
    gamma_n = weight_n / (1 - weight_n * (apart_nd * bent_nd).sum(1)).clamp_min(LEAST)
    scores_nj = _scores(means_jd, features_nd, inverse_dd, bent_nd, gamma_n)
    own_nd = means_jd[output_n] - apart_nd / (counts_n - 1)[:, None]
    own_n = (own_nd @ inverse_dd * (features_nd - own_nd / 2)).sum(1)
    along_n = (own_nd * bent_nd).sum(1)
    own_n += gamma_n * along_n * ((features_nd * bent_nd).sum(1) - along_n / 2)
    scores_nj[torch.arange(len(output_n)), output_n] = own_n
    return scores_nj


def _scores(means_jd: Tensor, features_nd: Tensor, inverse_dd: Tensor, bent_nd: Tensor, gamma_n: Tensor) -> Tensor:
    """Returns μ_k^T (P + γ g g^T) f - ½ μ_k^T (P + γ g g^T) μ_k for every example and output, (n, j)."""
    white_jd = means_jd @ inverse_dd
    along_nj = bent_nd @ means_jd.T
    plain_nj = features_nd @ white_jd.T - (white_jd * means_jd).sum(1) / 2
    scores_nj: Tensor = plain_nj + gamma_n[:, None] * along_nj * (
        (features_nd * bent_nd).sum(1, keepdim=True) - along_nj / 2
    )
    return scores_nj
