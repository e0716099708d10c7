"""RanPAC's sums against one least-squares problem over all examples, and the choice of λ against loops."""

import pytest
import torch
from torch import Tensor

from lamina.maths.ranpac import (
    HELD_OUT,
    LAMBDAS,
    RATIOS,
    TAUS,
    Sums,
    calibrated,
    projection,
    random_features,
    selected,
    solved,
)


def examples(seed: int, count: int, width: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    output_n = torch.arange(count) % 3
    return torch.randn(count, width, generator=generator) + output_n[:, None], output_n


@pytest.mark.parametrize("ratio", [1e-2, 10.0])
def test_sums_over_tasks_give_the_ridge_regression_of_all_examples_at_once(ratio: float):
    projection_md = projection(12, 5, torch.Generator().manual_seed(1))
    tasks = [examples(2, 40), examples(3, 31)]
    sums = Sums.zero(12)
    for features_nd, output_n in tasks:
        sums = sums.plus(projection_md, features_nd, output_n, 3)
    features_nd = torch.cat([features for features, _ in tasks])
    output_n = torch.cat([tasks[0][1], tasks[1][1] + 3])
    weight_mj = solved(sums, ratio, torch.arange(6))
    # Ridge is least squares with √λ I below the examples, and zeros below the targets.
    phi_nm = (features_nd.double() @ projection_md.double().T).clamp_min(0)
    targets_nj = (output_n[:, None] == torch.arange(6)).double()
    below = (
        torch.cat([phi_nm, ratio**0.5 * torch.eye(12).double()]),
        torch.cat([targets_nj, torch.zeros(12, 6).double()]),
    )
    torch.testing.assert_close(weight_mj, torch.linalg.lstsq(*below).solution, rtol=1e-3, atol=1e-5)


def test_outputs_of_one_class_have_the_column_of_all_its_examples():
    projection_md = projection(12, 5, torch.Generator().manual_seed(1))
    (first_nd, first_n), (second_nd, second_n) = examples(2, 40), examples(3, 31)
    twice = Sums.zero(12).plus(projection_md, first_nd, first_n, 3).plus(projection_md, second_nd, second_n, 3)
    once = Sums.zero(12).plus(projection_md, torch.cat([first_nd, second_nd]), torch.cat([first_n, second_n]), 3)
    weight_mj, expected_mj = solved(twice, 1.0, torch.arange(6) % 3), solved(once, 1.0, torch.arange(3))
    torch.testing.assert_close(weight_mj[:, :3], weight_mj[:, 3:], rtol=0, atol=0)
    torch.testing.assert_close(weight_mj[:, :3], expected_mj, rtol=1e-4, atol=1e-6)


def test_lambda_has_the_smallest_error_on_every_fifth_example_output_by_output():
    projection_md = projection(30, 5, torch.Generator().manual_seed(1))
    features_nd, output_n = examples(4, 60)
    features_nd = features_nd + torch.randn(60, 5, generator=torch.Generator().manual_seed(5))
    phi_nm = random_features(features_nd, projection_md).double()
    ordered = [n for j in range(3) for n, output in enumerate(output_n.tolist()) if output == j]
    held = ordered[HELD_OUT - 1 :: HELD_OUT]
    fit = [n for n in ordered if n not in held]
    targets_nj = torch.eye(3).double()[output_n]
    errors = {}
    for ratio in LAMBDAS:
        inverse_mm = torch.linalg.inv(phi_nm[fit].T @ phi_nm[fit] + ratio * torch.eye(30).double())
        weight_mj = inverse_mm @ phi_nm[fit].T @ targets_nj[fit]
        errors[ratio] = float((phi_nm[held] @ weight_mj - targets_nj[held]).square().sum())
    found = selected(projection_md, features_nd, output_n, 3)
    assert 1e-8 < found < 1e8
    assert found == min(errors, key=lambda ratio: errors[ratio])


def test_one_example_per_output_and_more_features_than_examples_have_a_solution():
    projection_md = projection(50, 5, torch.Generator().manual_seed(1))
    features_nd, output_n = examples(6, 3)
    sums = Sums.zero(50).plus(projection_md, features_nd, output_n, 3)
    ratio = selected(projection_md, features_nd, output_n, 3)
    assert ratio == 1
    assert torch.isfinite(solved(sums, ratio, torch.arange(3))).all()
    zero = Sums.zero(50).plus(projection_md, torch.zeros(3, 5), output_n, 3)
    assert not solved(zero, LAMBDAS[0], torch.arange(3)).any()


def slow_losses(phi_nm: Tensor, output_n: Tensor, outputs: int, newest: range) -> Tensor:
    """For every λ and τ: the cross-entropies of the newest examples, each left out for real, and fitted again."""
    targets_nj = torch.eye(outputs).double()[output_n]
    penalty_mm = float((phi_nm.T @ phi_nm).diagonal().mean()) * torch.eye(phi_nm.shape[1]).double()
    share = 1 / (len(newest) + 1)
    smooth_nj = (1 - share) * targets_nj + share / outputs
    found_rt = torch.zeros(len(RATIOS), len(TAUS)).double()
    for r, ratio in enumerate(RATIOS):
        for i in newest:
            others = [n for n in range(len(phi_nm)) if n != i]
            gram_mm = phi_nm[others].T @ phi_nm[others] + ratio * penalty_mm
            score_j = phi_nm[i] @ torch.linalg.solve(gram_mm, phi_nm[others].T @ targets_nj[others])
            for t, tau in enumerate(TAUS):
                found_rt[r, t] -= (smooth_nj[i] * (score_j / tau).log_softmax(0)).sum()
    return found_rt


def test_scores_with_an_example_left_out_are_those_of_a_fit_without_it():
    projection_md = projection(20, 5, torch.Generator().manual_seed(1))
    (old_nd, old_n), (new_nd, new_n) = examples(2, 40), examples(3, 30)
    new_nd = new_nd + 1.5 * torch.randn(30, 5, generator=torch.Generator().manual_seed(8))
    sums = Sums.zero(20).plus(projection_md, old_nd, old_n, 3)
    first = calibrated(sums, projection_md, old_nd, old_n)
    sums = sums.plus(projection_md, new_nd, new_n, 3)
    found = calibrated(sums, projection_md, new_nd, new_n + 3, first.losses_rt)
    features_nd, output_n = torch.cat([old_nd, new_nd]), torch.cat([old_n, new_n + 3])
    phi_nm = random_features(features_nd, projection_md).double()
    losses_rt = slow_losses(phi_nm[:40], old_n, 3, range(40)) + slow_losses(phi_nm, output_n, 6, range(40, 70))
    torch.testing.assert_close(found.losses_rt, losses_rt, rtol=1e-4, atol=1e-4)
    ratio, t = divmod(int(losses_rt.argmin()), len(TAUS))
    assert found.temperature == TAUS[t]
    gram_mm = phi_nm.T @ phi_nm
    penalty_mm = RATIOS[ratio] * float(gram_mm.diagonal().mean()) * torch.eye(20).double()
    wanted_mj = torch.linalg.solve(gram_mm + penalty_mm, phi_nm.T @ torch.eye(6).double()[output_n])
    torch.testing.assert_close(found.weight_mj, wanted_mj, rtol=1e-3, atol=1e-5)


def test_an_easy_task_after_a_hard_one_leaves_the_temperature():
    generator = torch.Generator().manual_seed(0)
    projection_md = projection(200, 20, generator)
    hard_nd = torch.cat(
        [0.55 * torch.randn(20, generator=generator) + torch.randn(60, 20, generator=generator) for _ in range(4)]
    )
    hard_n, easy_nd = torch.arange(4).repeat_interleave(60), 8 + 0.3 * torch.randn(60, 20, generator=generator)
    sums = Sums.zero(200).plus(projection_md, hard_nd, hard_n, 4)
    before = calibrated(sums, projection_md, hard_nd, hard_n)
    sums = sums.plus(projection_md, easy_nd, torch.zeros(60, dtype=torch.int64), 1)
    after = calibrated(sums, projection_md, easy_nd, torch.full((60,), 4), before.losses_rt)
    assert 0.05 < before.temperature < 0.5
    assert after.temperature == pytest.approx(before.temperature, rel=0.5)


def test_a_single_output_says_nothing_about_the_temperature():
    projection_md = projection(12, 5, torch.Generator().manual_seed(1))
    features_nd, output_n = examples(2, 20)[0], torch.zeros(20, dtype=torch.int64)
    found = calibrated(
        Sums.zero(12).plus(projection_md, features_nd, output_n, 1), projection_md, features_nd, output_n
    )
    assert found.temperature == 1
    assert not found.losses_rt.any()


def test_sums_that_no_penalty_mends_are_refused():
    features_nd, output_n = examples(2, 20)
    projection_md = projection(12, 5, torch.Generator().manual_seed(1))
    sums = Sums.zero(12).plus(projection_md, features_nd, output_n, 3)
    with pytest.raises(ValueError, match="not positive definite"):
        calibrated(sums._replace(gram_mm=sums.gram_mm - 1e6 * torch.eye(12)), projection_md, features_nd, output_n)
