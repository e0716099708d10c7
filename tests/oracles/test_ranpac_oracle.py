"""RanPAC's sums against one least-squares problem over all examples, and the choice of λ against loops."""

import pytest
import torch
from torch import Tensor

from lamina.maths.classifiers import temperature
from lamina.maths.ranpac import (
    HELD_OUT,
    LAMBDAS,
    RATIOS,
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


def test_scores_with_an_example_left_out_are_those_of_a_fit_without_it():
    """λ and τ by leaving every example out for real, and fitting again."""
    projection_md = projection(20, 5, torch.Generator().manual_seed(1))
    (old_nd, old_n), (new_nd, new_n) = examples(2, 40), examples(3, 30)
    new_nd = new_nd + 1.5 * torch.randn(30, 5, generator=torch.Generator().manual_seed(8))
    sums = Sums.zero(20).plus(projection_md, old_nd, old_n, 3).plus(projection_md, new_nd, new_n, 3)
    features_nd, output_n = torch.cat([old_nd, new_nd]), torch.cat([old_n, new_n + 3])
    phi_nm = random_features(features_nd, projection_md).double()
    targets_nj = torch.eye(6).double()[output_n]
    gram_mm = phi_nm.T @ phi_nm
    best = (float("inf"), 0.0, torch.zeros(0))
    for ratio in RATIOS:
        penalty_mm = ratio * gram_mm.diagonal().mean() * torch.eye(20).double()
        rows = []
        for i in range(40, 70):
            others = [n for n in range(70) if n != i]
            weight_mj = torch.linalg.solve(
                phi_nm[others].T @ phi_nm[others] + penalty_mm, phi_nm[others].T @ targets_nj[others]
            )
            rows.append(phi_nm[i] @ weight_mj)
        left_nj = torch.stack(rows)
        tau = temperature(left_nj, output_n[40:])
        cost = float(torch.nn.functional.cross_entropy(left_nj / tau, output_n[40:]))
        best = min(
            best, (cost, tau, torch.linalg.solve(gram_mm + penalty_mm, phi_nm.T @ targets_nj)), key=lambda one: one[0]
        )
    found = calibrated(sums, projection_md, new_nd, new_n + 3)
    assert found.temperature == pytest.approx(best[1], rel=1e-3)
    torch.testing.assert_close(found.weight_mj, best[2], rtol=1e-3, atol=1e-5)
