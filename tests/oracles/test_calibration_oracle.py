"""Scores with an example left out, against statistics without it; and what the temperature of such scores is worth."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lamina.maths import classifiers
from lamina.maths.calibration import left_out_scores
from lamina.maths.class_statistics import Statistics, covariance, of_features
from lamina.maths.metrics import calibration_error


def drawn(seed: int, per_class: int, outputs: int = 4, d: int = 12) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    means_jd = torch.randn(outputs, d, generator=draws, dtype=torch.float64)
    mix_dd = torch.randn(d, d, generator=draws, dtype=torch.float64)
    output_n = torch.arange(outputs).repeat_interleave(per_class)
    noise_nd = torch.randn(len(output_n), d, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return means_jd[output_n] * 2 + noise_nd @ mix_dd, output_n


def slowly(statistics: Statistics, features_nd: Tensor, output_n: Tensor) -> Tensor:
    """One example after another: its output's mean without it, and the covariance without its share of the scatter."""
    freedom = int(statistics.counts_j.sum()) - len(statistics.counts_j)
    whole_dd = covariance(statistics)
    share = float(whole_dd[0, 1] / (statistics.scatter_dd[0, 1] / freedom)) / freedom
    found = []
    for feature_d, j in zip(features_nd.double(), output_n.tolist(), strict=True):
        count = float(statistics.counts_j[j])
        apart_d = feature_d - statistics.means_jd[j]
        means_jd = statistics.means_jd.clone()
        means_jd[j] = (count * means_jd[j] - feature_d) / (count - 1)
        inverse_dd = torch.linalg.inv(whole_dd - share * count / (count - 1) * torch.outer(apart_d, apart_d))
        found.append(means_jd @ inverse_dd @ feature_d - ((means_jd @ inverse_dd) * means_jd).sum(1) / 2)
    return torch.stack(found)


@pytest.mark.parametrize("per_class", [2, 5, 40])
def test_it_is_what_leaving_out_gives(per_class: int) -> None:
    features_nd, output_n = drawn(per_class, per_class)
    statistics = of_features(features_nd, output_n, 4)
    ours_nj = left_out_scores(statistics, features_nd, output_n)
    torch.testing.assert_close(ours_nj, slowly(statistics, features_nd, output_n), rtol=1e-8, atol=1e-8)


def test_an_output_with_one_example_is_refused() -> None:
    features_nd, output_n = drawn(0, 3)
    with pytest.raises(ValueError, match="one example"):
        left_out_scores(of_features(features_nd[:10], output_n[:10], 4), features_nd[:10], output_n[:10])


def test_the_temperature_is_worth_something_where_examples_are_few() -> None:
    """On new examples: cross-entropy and calibration error, summed over draws of the training examples."""
    sums = np.zeros((2, 2))
    for seed in range(6):
        everything_nd, label_n = drawn(100 + seed, 120, d=40)
        train_n = torch.cat([torch.arange(6) + 120 * j for j in range(4)])
        held_n = torch.ones(len(label_n), dtype=torch.bool).index_fill(0, train_n, value=False)
        statistics = of_features(everything_nd[train_n], label_n[train_n], 4)
        tau = classifiers.temperature(
            left_out_scores(statistics, everything_nd[train_n], label_n[train_n]), label_n[train_n]
        )
        scores_nj = classifiers.lda(statistics).scores(everything_nd[held_n])
        for place, by in enumerate((1.0, max(1.0, tau))):
            chances_nj = (scores_nj / by).softmax(1)
            best = chances_nj.max(1)
            right_n = (best.indices == label_n[held_n]).numpy()
            sums[place] += (
                float(torch.nn.functional.cross_entropy(scores_nj / by, label_n[held_n])),
                calibration_error(best.values.numpy(), right_n),
            )
    assert (sums[1] < 0.7 * sums[0]).all(), sums
