"""The heads against scikit-learn, direct solves and slow loops in numpy; and what draws may be trusted with.

Shape letters: n examples, d width, j rows, m random features.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from lamina.maths import classifiers
from lamina.maths.class_statistics import Statistics, covariance, gaussians, moved, of_features

ROWS, WIDTH, N = 4, 6, 120


def data(seed: int = 0, n: int = N) -> tuple[Tensor, Tensor]:
    """Overlapping rows of unequal size with a covariance in common."""
    random = np.random.default_rng(seed)
    output_n = np.concatenate([np.arange(ROWS), random.choice(ROWS, n - ROWS, p=[0.1, 0.2, 0.3, 0.4])])
    places = np.random.default_rng(99)
    places_jd, mix_dd = places.normal(size=(ROWS, WIDTH)) + 3, places.normal(size=(WIDTH, WIDTH))
    return torch.from_numpy((places_jd[output_n] + random.normal(size=(n, WIDTH))) @ mix_dd), torch.from_numpy(output_n)


def statistics(class_covariance_rank: int = 0) -> Statistics:
    return of_features(*data(), ROWS, class_covariance_rank)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative(scores_bj: Tensor) -> np.ndarray:
    """Scores less those of the first row: a constant per example has no meaning."""
    return (scores_bj - scores_bj[:, :1]).numpy()


# ----------------------------------------------------------------------------------------------------- closed forms


def test_the_nearest_mean_wins_by_the_difference_of_squared_distances():
    features_nd, _ = data(1)
    means_jd = statistics().means_jd.numpy()
    squares = np.array([[((f - mean) ** 2).sum() for mean in means_jd] for f in features_nd.numpy()])
    np.testing.assert_allclose(
        relative(classifiers.ncm(statistics()).scores(features_nd)), squares[:, :1] - squares, rtol=1e-9, atol=1e-9
    )


class Given:
    """A covariance estimator for scikit-learn that has its answer already."""

    def __init__(self, covariance_: np.ndarray) -> None:
        self.covariance_ = covariance_

    def fit(self, _: Any) -> "Given":
        return self


@pytest.mark.parametrize("shrinkage", ["oas", 0.0, 0.4, 1.0])
@pytest.mark.parametrize("priors", ["equal", "counts"])
def test_lda_is_scikit_learns_with_the_same_covariance_and_priors(shrinkage: Any, priors: Any):
    (features_nd, output_n), others_nd = data(), data(1)[0]
    pooled = covariance(statistics(), shrinkage).numpy()
    theirs = LinearDiscriminantAnalysis(
        solver="lsqr", covariance_estimator=Given(pooled), priors=np.full(ROWS, 1 / ROWS) if priors == "equal" else None
    ).fit(features_nd.numpy(), output_n.numpy())
    ours = classifiers.lda(statistics(), shrinkage, priors).scores(others_nd)
    expected = relative(torch.from_numpy(theirs.decision_function(others_nd.numpy())))
    np.testing.assert_allclose(relative(ours), expected, rtol=1e-7, atol=1e-7)


def test_lda_is_scikit_learns_own_but_for_the_degrees_of_freedom():
    """Without anything given to it: scikit-learn divides the scatter by n, here it is by n less the number of rows."""
    features_nd, output_n = data()
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(features_nd.numpy(), output_n.numpy())
    log_priors = np.log(theirs.priors_ / theirs.priors_[0])
    expected = relative(torch.from_numpy(theirs.decision_function(features_nd.numpy()))) - log_priors
    found = relative(classifiers.lda(statistics(), 0.0, "counts").scores(features_nd)) - log_priors
    np.testing.assert_allclose(found, expected * (N - ROWS) / N, rtol=1e-7, atol=1e-7)


def test_lda_without_shrinkage_is_the_same_in_any_linear_coordinates():
    features_nd, _ = data(1)
    map_dd = torch.from_numpy(np.random.default_rng(5).normal(size=(WIDTH, WIDTH)))
    here = classifiers.lda(statistics(), 0.0).scores(features_nd)
    there = classifiers.lda(moved(statistics(), map_dd), 0.0).scores(features_nd @ map_dd.T)
    np.testing.assert_allclose(there.numpy(), here.numpy(), rtol=1e-6)


def test_a_factor_on_all_features_of_one_block_changes_no_score():
    """Under shrinkage too, which would pull the covariance of small features towards that of large ones."""
    unit_d = torch.tensor([1.0, 1, 1, 100, 100, 100], dtype=torch.float64)
    (features_nd, output_n), others_nd = data(n=60), data(1)[0]
    found = []
    for factor_d in (torch.ones(WIDTH, dtype=torch.float64), unit_d):
        fitted = classifiers.lda(of_features(features_nd * factor_d, output_n, ROWS, blocks=2))
        found.append(relative(fitted.scores(others_nd * factor_d)))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6, atol=1e-8)
    one_block = classifiers.lda(of_features(features_nd * unit_d, output_n, ROWS)).scores(others_nd * unit_d)
    assert np.abs(relative(one_block) - found[0]).max() > 0.01


# ------------------------------------------------------------------------------------------- ridge on random features


def direct(head: classifiers.RidgeClassifier, features_nd: Tensor, output_n: Tensor, ratio: float) -> np.ndarray:
    """Least squares by a stacked system, without a Gram matrix: every row's examples weigh 1 together."""
    projection, offset = head.projection_md.double().numpy(), head.offset_m.numpy()
    phi = np.maximum(features_nd.double().numpy() @ projection.T + offset, 0)
    roots = np.sqrt(1 / np.bincount(output_n.numpy())[output_n.numpy()])[:, None]
    weighted_phi, weighted_y = roots * phi, roots * np.eye(ROWS)[output_n.numpy()]
    penalty = np.sqrt(ratio * (weighted_phi**2).sum() / phi.shape[1])
    stacked = np.vstack([weighted_phi, penalty * np.eye(phi.shape[1])])
    return np.linalg.lstsq(stacked, np.vstack([weighted_y, np.zeros((phi.shape[1], ROWS))]), rcond=None)[0]


@pytest.mark.parametrize(("ratio", "n"), [(1.0, N), (1e-2, N), (1e-4, N), (1e-2, 5000)])
def test_ridge_is_a_direct_solve_on_the_stored_features(ratio: float, n: int):
    head = classifiers.ridge(statistics(), seeded(), real=data(n=n), width=40, lambdas=(ratio,))
    np.testing.assert_allclose(head.weight_mj.numpy(), direct(head, *data(n=n), ratio), rtol=1e-6, atol=1e-8)


def test_the_features_are_the_stated_ones():
    head, features_nd = classifiers.ridge(statistics(), seeded(3), width=40), data(1)[0]
    values_d, vectors_dd = np.linalg.eigh(covariance(statistics()).numpy())
    noise_md = torch.randn(40, WIDTH, generator=seeded(3), dtype=torch.float64).numpy()
    projection_md = noise_md @ vectors_dd @ np.diag(values_d**-0.5) @ vectors_dd.T / WIDTH**0.5
    phi = np.maximum((features_nd.numpy() - statistics().means_jd.mean(0).numpy()) @ projection_md.T, 0)
    np.testing.assert_allclose(head.scores(features_nd).numpy(), phi @ head.weight_mj.numpy(), rtol=1e-4, atol=1e-5)


def test_lambda_is_that_of_the_smallest_held_out_error(monkeypatch: pytest.MonkeyPatch):
    features_nd, output_n = data()
    grid = (10.0, 1e-1, 1e-2, 1e-6)
    errors: list[float] = []
    measured: list[Tensor] = []
    for ratio in grid:
        fit_n = torch.ones(N, dtype=torch.bool)
        for j in range(ROWS):
            fit_n[torch.nonzero(output_n == j)[4::5, 0]] = False
        head = classifiers.ridge(statistics(), seeded(), real=data(), width=40, lambdas=(ratio,))
        phi = np.maximum(features_nd.numpy() @ head.projection_md.double().numpy().T + head.offset_m.numpy(), 0)
        weights, indicators = 1 / np.bincount(output_n.numpy())[output_n.numpy()], np.eye(ROWS)[output_n.numpy()]
        fit, held = fit_n.numpy(), ~fit_n.numpy()
        gram = (phi[fit] * weights[fit, None]).T @ phi[fit]
        cross = (phi[fit] * weights[fit, None]).T @ indicators[fit]
        solved = np.linalg.solve(gram + ratio * np.trace(gram) / 40 * np.eye(40), cross)
        errors.append((weights[held, None] * (phi[held] @ solved - indicators[held]) ** 2).sum())
        measured.clear()
        with monkeypatch.context() as patch:
            patch.setattr(classifiers.Moments, "squared_error", lambda sums, _: measured.append(sums.cross_mj) or 0.0)
            classifiers.ridge(statistics(), seeded(), real=data(), width=40, lambdas=(ratio,))
        np.testing.assert_allclose(
            measured[0].numpy(), (phi[held] * weights[held, None]).T @ indicators[held], rtol=1e-9
        )
    best = int(np.argmin(errors))
    assert 0 < best < len(grid) - 1, "or the choice is of an end of the grid"
    chosen = classifiers.ridge(statistics(), seeded(), real=data(), width=40, lambdas=grid)
    alone = classifiers.ridge(statistics(), seeded(), real=data(), width=40, lambdas=(grid[best],))
    assert torch.equal(chosen.weight_mj, alone.weight_mj)


def test_rows_without_examples_are_drawn_and_the_others_are_not():
    features_nd, output_n = data()
    some = output_n >= 2
    white, generator = gaussians(statistics()), seeded()
    found = dict(classifiers.examples(white, (features_nd[some], output_n[some]), 7, generator, 0.5))
    again = seeded()
    for j in (0, 1):
        assert torch.equal(found[j], white.features(white.draws(torch.tensor([j]), 7, again, 0.5)[0]))
    for j in (2, 3):
        assert torch.equal(found[j], features_nd[output_n == j])


def test_random_features_tell_apart_what_no_line_does():
    """Two domains of each class, crosswise: as rows of their own by any head; as one row each only by random features."""
    places = torch.tensor([[4.0, 4], [-4, -4], [4, -4], [-4, 4]], dtype=torch.float64)
    domain_n = torch.arange(400) % 4
    features_nd = places[domain_n] + torch.randn(400, 2, generator=seeded(), dtype=torch.float64)
    output_n = domain_n // 2
    pooled = of_features(features_nd, output_n, 2)
    line = (classifiers.lda(pooled).scores(features_nd).argmax(1) == output_n).double().mean()
    curve = (
        classifiers.ridge(pooled, seeded(), (features_nd, output_n), width=100).scores(features_nd).argmax(1)
        == output_n
    )
    assert line < 0.7
    assert curve.double().mean() > 0.97


# --------------------------------------------------------------------------------------------------- aligned by draws


def test_aligned_without_steps_is_lda():
    for found, expected in zip(
        classifiers.aligned(statistics(), seeded(), steps=0), classifiers.lda(statistics()), strict=True
    ):
        assert torch.equal(found, expected)


def test_one_aligned_step_is_that_of_finite_differences():
    """In the coordinates where the pooled covariance is I, at the full rate, with the pairs taken one by one."""
    white, start = gaussians(statistics(2)), classifiers.lda(statistics(2))
    generator = seeded(4)
    rows = torch.randperm(ROWS, generator=generator)[:3]
    drawn = white.draws(rows, 5, generator, 0.3).numpy()
    base = white.means_jd.numpy()

    def cost(weights: np.ndarray, biases: np.ndarray) -> float:
        total = 0.0
        for row, examples in zip(rows.tolist(), drawn, strict=True):
            losses = []
            for z in examples:
                scores = weights @ z + biases
                losses.append(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[row])
            pairs = [abs(a - b) for i, a in enumerate(losses) for k, b in enumerate(losses) if i != k]
            total += np.mean(losses) / 3 + 0.7 * np.mean(pairs) / 3
        return total

    biases = -(base**2).sum(1) / 2
    slope, slope_b = np.zeros_like(base), np.zeros_like(biases)
    for index in np.ndindex(*base.shape):
        nudge = np.zeros_like(base)
        nudge[index] = 1e-6
        slope[index] = (cost(base + nudge, biases) - cost(base - nudge, biases)) / 2e-6
    for j in range(ROWS):
        nudge_b = np.eye(ROWS)[j] * 1e-6
        slope_b[j] = (cost(base, biases + nudge_b) - cost(base, biases - nudge_b)) / 2e-6
    found = classifiers.aligned(
        statistics(2), seeded(4), steps=1, outputs=3, draws=5, rate=0.05, gap=0.7, class_share=0.3
    )
    change = -0.05 * slope @ white.whiten_dd.numpy()
    change_b = -0.05 * slope_b - change @ white.centre_d.numpy()
    assert np.abs(change).max() > 1e-4
    np.testing.assert_allclose((found.weight_jd - start.weight_jd).numpy(), change, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose((found.bias_j - start.bias_j).numpy(), change_b, rtol=1e-4, atol=1e-8)


def test_the_rate_falls_by_a_cosine():
    """At steps so small that slopes do not change by them: of two, the second is half as long."""
    generator, start = seeded(4), classifiers.lda(statistics()).weight_jd
    first, second = (
        classifiers.aligned(statistics(), generator, steps=1, rate=1e-6).weight_jd - start for _ in range(2)
    )
    both = classifiers.aligned(statistics(), seeded(4), steps=2, rate=1e-6).weight_jd - start
    torch.testing.assert_close(both, first + second / 2, rtol=1e-4, atol=1e-12)


def test_lda_is_where_the_expected_cross_entropy_of_pooled_draws_is_smallest():
    """So without own parts and without the gap alignment can only add noise. With own parts it lowers the cross-entropy."""
    white = gaussians(statistics())
    rows = torch.arange(ROWS)
    drawn = white.draws(rows, 100_000, seeded())
    weight = white.means_jd.clone().requires_grad_()
    scores = drawn @ weight.T - white.means_jd.square().sum(1) / 2
    (slope,) = torch.autograd.grad(classifiers.alignment_loss(scores[:, :200], rows, 0), weight, retain_graph=True)
    (expected,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(scores.flatten(0, 1), rows.repeat_interleave(100_000)), weight
    )
    assert expected.abs().max() < 3e-3 < slope.abs().max()


def test_steps_lower_the_cross_entropy_of_draws_with_own_parts():
    known = statistics(3)
    white, rows = gaussians(known), torch.arange(ROWS)
    fresh = white.features(white.draws(rows, 2000, seeded(8), 0.9)).flatten(0, 1)
    rows_b = rows.repeat_interleave(2000)
    before, after = (
        float(
            torch.nn.functional.cross_entropy(
                classifiers.aligned(known, seeded(), steps=n, gap=0.0, rate=0.1, class_share=0.9).scores(fresh), rows_b
            )
        )
        for n in (0, 60)
    )
    assert after < 0.99 * before


def test_the_gap_evens_out_the_losses_within_a_row():
    scores = torch.tensor([[[2.0, 0], [0, 0]], [[0, 1], [0, 1]]])
    plain = torch.nn.functional.cross_entropy(scores.flatten(0, 1), torch.tensor([0, 0, 1, 1]))
    first, second = (float(torch.nn.functional.cross_entropy(scores[0, i], torch.tensor(0))) for i in (0, 1))
    found = classifiers.alignment_loss(scores, torch.tensor([0, 1]), 0.1)
    assert float(found) == pytest.approx(float(plain) + 0.1 * abs(first - second) / 2)


def test_alignment_works_where_gradients_are_turned_off():
    with torch.no_grad():
        found = classifiers.aligned(statistics(), seeded(), steps=2)
    assert not torch.equal(found.weight_jd, classifiers.lda(statistics()).weight_jd)
    assert not found.weight_jd.requires_grad


# ------------------------------------------------------------------------------------------------------------- mixed


def test_the_temperature_is_that_of_a_fine_grid():
    features_nd, output_n = data(2)
    scores = 7 * classifiers.lda(statistics()).scores(features_nd)
    grid = np.exp(np.linspace(np.log(0.5), np.log(100), 2000))
    costs = [float(torch.nn.functional.cross_entropy(scores / tau, output_n)) for tau in grid]
    assert classifiers.temperature(scores, output_n) == pytest.approx(grid[int(np.argmin(costs))], rel=0.01)


def test_the_temperature_of_lda_on_its_own_draws_is_one():
    white = gaussians(statistics())
    rows = torch.arange(ROWS)
    scores = classifiers.lda(statistics()).scores(white.features(white.draws(rows, 20_000, seeded()).flatten(0, 1)))
    assert classifiers.temperature(scores, rows.repeat_interleave(20_000)) == pytest.approx(1, abs=0.03)


def test_a_head_that_is_always_right_gets_the_least_temperature_and_one_without_scores_gets_one():
    sure = 50 * torch.eye(3, dtype=torch.float64)
    spread = float(sure.std(1, correction=0).mean())
    assert classifiers.temperature(sure, torch.arange(3)) == pytest.approx(spread / 100, rel=1e-3)
    assert classifiers.temperature(torch.zeros(3, 3), torch.arange(3)) == 1


def test_the_mixture_is_the_mean_of_both_log_probabilities():
    features_nd, _ = data(1)
    linear, ridge = classifiers.lda(statistics()), classifiers.ridge(statistics(), seeded(), width=30, draws=20)
    head = classifiers.mixed(linear, ridge, statistics(), seeded(1))
    expected = np.zeros((N, ROWS))
    for part, tau in zip((linear, ridge), head.temperatures.tolist(), strict=True):
        scores = part.scores(features_nd).numpy() / tau
        expected += (scores - np.log(np.exp(scores).sum(1, keepdims=True))) / 2
    np.testing.assert_allclose(head.scores(features_nd).numpy(), expected, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------- saving and repeating


def every_head(seed: int = 0) -> dict[str, classifiers.Classifier]:
    known = statistics(2)
    linear, ridge = classifiers.lda(known), classifiers.ridge(known, seeded(seed), width=30, draws=20)
    return {
        "ncm": classifiers.ncm(known),
        "lda": linear,
        "ridge": ridge,
        "aligned": classifiers.aligned(known, seeded(seed), steps=5),
        "mixed": classifiers.mixed(linear, ridge, known, seeded(seed)),
    }


@pytest.mark.parametrize("kind", ["ncm", "lda", "ridge", "aligned", "mixed"])
def test_a_saved_head_comes_back_with_the_same_bits(kind: str, tmp_path: Path):
    head = every_head()[kind]
    save_file(head.tensors(), tmp_path / "head.safetensors")
    again = classifiers.classifier_of(load_file(tmp_path / "head.safetensors"))
    assert type(again) is type(head)
    assert torch.equal(again.scores(data(1)[0].float()), head.scores(data(1)[0].float()))
    for name, part in head.tensors().items():
        assert torch.equal(again.tensors()[name], part)


@pytest.mark.parametrize("class_covariance_rank", [0, 2])
def test_saved_statistics_come_back_with_the_same_bits(class_covariance_rank: int, tmp_path: Path):
    save_file(statistics(class_covariance_rank).tensors(), tmp_path / "statistics.safetensors")
    again = Statistics.of_tensors(load_file(tmp_path / "statistics.safetensors"))
    for name, expected in statistics(class_covariance_rank).tensors().items():
        assert torch.equal(again.tensors()[name], expected)
        assert again.tensors()[name].dtype == expected.dtype


@pytest.mark.parametrize("kind", ["ridge", "aligned", "mixed"])
def test_the_same_generator_gives_the_same_bits_and_another_does_not(kind: str):
    first, again, other = (every_head(seed)[kind].tensors() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_what_each_head_makes_of_digits():
    """Pixels as features, 900 examples to fit and 897 to be asked: the numbers that docs/consolidate.md tells."""
    from sklearn.datasets import load_digits

    features_nd, output_n = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(output_n), generator=seeded())
    fit, rest = order[:900], order[900:]

    def right(head: classifiers.Classifier) -> float:
        return 100 * float((head.scores(features_nd[rest]).argmax(1) == output_n[rest]).double().mean())

    known, examples = of_features(features_nd[fit], output_n[fit], 10, 8), (features_nd[fit], output_n[fit])
    found = {
        "ncm": right(classifiers.ncm(known)),
        "lda": right(classifiers.lda(known)),
        "aligned": right(classifiers.aligned(known, seeded(), draws=16, steps=100)),
        "drawn, pooled": right(classifiers.ridge(known, seeded(), width=512, class_share=0.0)),
        "drawn, own": right(classifiers.ridge(known, seeded(), width=512, class_share=0.75)),
        "examples": right(classifiers.ridge(known, seeded(), examples, width=512)),
    }
    told = {"ncm": 89.6, "lda": 95.1, "aligned": 95.1, "drawn, pooled": 93, "drawn, own": 95, "examples": 97}
    assert found == pytest.approx(told, abs=0.8), f"correct the page: {found}"
