"""Every figure of continual learning against a loop over its definition, on matrices of any shape."""

import math
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.maths import metrics
from lamina.maths.metrics import AccuracyMatrix, wilson_interval

often = settings(deadline=None, max_examples=50, derandomize=True)


@st.composite
def matrices(draw: st.DrawFn, smallest: int = 1) -> AccuracyMatrix:
    """1 to 6 tasks learnt, up to 2 more measured, test sets of different sizes, what was not measured at random."""
    tasks = draw(st.integers(smallest, 6))
    columns = tasks + draw(st.integers(0, 2))
    sizes = draw(st.lists(st.integers(1, 9), min_size=columns, max_size=columns))
    correct, total = np.zeros((2, tasks, columns), np.int64)
    for i in range(tasks):
        for j in range(columns):
            if j <= i or draw(st.booleans()):
                total[i, j], correct[i, j] = sizes[j], draw(st.integers(0, sizes[j]))
    return AccuracyMatrix(correct, total)


def a(matrix: AccuracyMatrix, i: int, j: int) -> float:
    return int(matrix.correct_ij[i, j]) / int(matrix.total_ij[i, j])


def near(value: float) -> object:
    return pytest.approx(value, abs=1e-12, nan_ok=True)


@often
@given(matrices())
def test_accuracies(matrix: AccuracyMatrix):
    tasks = range(matrix.tasks)
    means = [fmean(a(matrix, i, j) for j in range(i + 1)) for i in tasks]
    shares = [
        sum(int(matrix.correct_ij[i, j]) for j in range(i + 1)) / sum(int(matrix.total_ij[i, j]) for j in range(i + 1))
        for i in tasks
    ]
    assert metrics.incremental_accuracy(matrix).tolist() == near(means)
    assert metrics.incremental_accuracy_micro(matrix).tolist() == near(shares)
    assert metrics.final_accuracy(matrix) == near(means[-1])
    assert metrics.final_accuracy_micro(matrix) == near(shares[-1])
    assert metrics.average_accuracy(matrix) == near(fmean(means))
    assert metrics.average_accuracy_micro(matrix) == near(fmean(shares))
    assert metrics.learning_accuracy(matrix) == near(fmean(a(matrix, j, j) for j in tasks))


@often
@given(matrices())
def test_forgetting_and_transfer(matrix: AccuracyMatrix):
    """The best is over the models from j on, before the last: a task that improved counts negative."""
    last = matrix.tasks - 1
    for end in range(matrix.tasks):
        drops = [max(a(matrix, i, j) for i in range(j, end)) - a(matrix, end, j) for j in range(end)]
        assert metrics.forgetting_after(matrix)[end] == near(fmean(drops) if drops else 0.0)
    by_task = metrics.forgetting_by_task(matrix)
    assert by_task[:last].tolist() == near(drops)
    assert math.isnan(by_task[last])
    assert metrics.forgetting(matrix) == near(fmean(drops) if drops else 0.0)
    gains = [a(matrix, last, j) - a(matrix, j, j) for j in range(last)]
    assert metrics.backward_transfer(matrix) == near(fmean(gains) if gains else 0.0)


@often
@given(matrices(), st.lists(st.floats(0, 1), min_size=8, max_size=8))
def test_forward_transfer_needs_what_is_above_the_diagonal(matrix: AccuracyMatrix, chance: list[float]):
    pairs = [(j - 1, j) for j in range(1, matrix.tasks)]
    measured = all(matrix.total_ij[pair] > 0 for pair in pairs)
    found = metrics.forward_transfer(matrix, np.array(chance))
    if pairs and measured:
        assert found == near(fmean(a(matrix, i, j) - chance[j] for i, j in pairs))
    else:
        assert math.isnan(found)


@often
@given(matrices())
def test_a_matrix_grows_by_rows_and_survives_its_record(matrix: AccuracyMatrix):
    grown = AccuracyMatrix.empty()
    for i in range(matrix.tasks):
        row = {
            j: (int(matrix.correct_ij[i, j]), int(matrix.total_ij[i, j]))
            for j in range(matrix.total_ij.shape[1])
            if matrix.total_ij[i, j] or j == matrix.total_ij.shape[1] - 1
        }
        grown = grown.with_row(row)
        assert grown.tasks == i + 1
    assert grown == matrix
    assert grown.as_dict() == matrix.as_dict()
    again = AccuracyMatrix.from_dict(matrix.as_dict())
    assert again == matrix
    assert hash(again) == hash(matrix)
    assert again != again.with_row({again.tasks: (1, 2)})
    assert np.array_equal(np.isnan(again.accuracy_ij), matrix.total_ij == 0)


@often
@given(matrices(smallest=2), st.integers(0, 2**30))
def test_renumbering_the_examples_of_a_task_changes_nothing_and_growing_a_test_set_only_the_micro_metrics(
    matrix: AccuracyMatrix, seed: int
):
    factors = np.random.default_rng(seed).integers(1, 5, matrix.total_ij.shape[1])
    larger = AccuracyMatrix(matrix.correct_ij * factors, matrix.total_ij * factors)
    before, after = metrics.summary(matrix), metrics.summary(larger)
    assert before.keys() == after.keys() <= metrics.DEFINITIONS.keys()
    for name in before:
        assert name.endswith("micro") or after[name] == near(before[name])


def test_an_example_worked_by_hand():
    """Task 1 of 4 examples goes 4, 2, 3 right; task 2 of 2 goes 1, 2; task 3 of 10 gets 5."""
    matrix = AccuracyMatrix(np.array([[4, 0, 0], [2, 1, 0], [3, 2, 5]]), np.array([[4, 0, 0], [4, 2, 0], [4, 2, 10]]))
    assert metrics.incremental_accuracy(matrix).tolist() == near([1.0, 0.5, 0.75])
    assert metrics.incremental_accuracy_micro(matrix).tolist() == near([1.0, 0.5, 10 / 16])
    assert metrics.summary(matrix) == {
        "final_accuracy": near(0.75),
        "final_accuracy_micro": near(0.625),
        "average_accuracy": near(0.75),
        "average_accuracy_micro": near((1 + 0.5 + 0.625) / 3),
        "forgetting": near((0.25 - 0.5) / 2),  # 1 - 0.75, and 0.5 - 1: task 2 improved
        "backward_transfer": near((-0.25 + 0.5) / 2),
        "learning_accuracy": near((1 + 0.5 + 0.5) / 3),
    }
    assert metrics.forgetting_after(matrix).tolist() == near([0.0, 0.5, -0.125])


def test_a_single_task():
    matrix = AccuracyMatrix.empty().with_row({0: (3, 4)})
    assert metrics.forgetting(matrix) == metrics.backward_transfer(matrix) == 0
    assert metrics.final_accuracy(matrix) == metrics.average_accuracy(matrix) == 0.75
    assert math.isnan(metrics.forward_transfer(matrix, np.array([0.5])))


def test_the_documentation_has_every_definition():
    page = Path(__file__).parents[2].joinpath("docs", "metrics.md").read_text(encoding="utf-8")
    rows = [
        f"| `{name}` | {text} | {metrics.FORMULAS.get(name, '')} |".replace("  |", " |")
        for name, text in metrics.DEFINITIONS.items()
    ]
    assert "\n".join(rows) in page


def test_nothing_learnt_yet_has_no_tasks():
    empty = AccuracyMatrix.empty()
    assert empty.tasks == 0
    assert AccuracyMatrix.from_dict(empty.as_dict()) == empty


@pytest.mark.parametrize(
    ("correct", "total"),
    [([[3]], [[2]]), ([[-1]], [[2]]), ([[1], [1]], [[1], [1]]), ([[1, 1]], [[1]]), ([1], [1])],
    ids=["more right than asked", "negative", "fewer columns than rows", "two shapes", "not a matrix"],
)
def test_impossible_counts_are_refused(correct: list, total: list):
    with pytest.raises(ValueError, match=r"correct and total must|number of correct predictions"):
        AccuracyMatrix(np.array(correct), np.array(total))


@pytest.mark.parametrize(
    "counts",
    [
        {},
        {"correct": [[1]]},
        {"correct": [[1]], "total": [[1]], "more": 1},
        {"correct": 1, "total": 1},
        {"correct": [[1], [1, 2]], "total": [[1], [1, 2]]},
        {"correct": [[0.5]], "total": [[1]]},
        {"correct": [["1"]], "total": [[1]]},
        {"correct": [[True]], "total": [[1]]},
        {"correct": [[1]], "total": [[2**64]]},
    ],
    ids=str,
)
def test_what_is_no_matrix_is_refused(counts: dict):
    with pytest.raises(ValueError, match=r"."):
        AccuracyMatrix.from_dict(counts)


# ------------------------------------------------------------------------------------------------------ single metrics


@often
@given(st.integers(1, 3000), st.data())
def test_wilson_bounds_hold_the_share_and_stay_in_range(total: int, data: st.DataObject):
    correct = data.draw(st.integers(0, total))
    low, high = wilson_interval(correct, total)
    share = correct / total
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    assert high - low > 0
    mirrored = wilson_interval(total - correct, total)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)
    wider, narrower = wilson_interval(correct, total, z=3.0), wilson_interval(10 * correct, 10 * total)
    assert wider[1] - wider[0] > high - low > narrower[1] - narrower[0]


@often
@given(st.integers(1, 500), st.data())
def test_wilson_bounds_solve_their_equation(total: int, data: st.DataObject):
    """(p - share)^2 = z^2 p (1 - p) / n at each end (Wilson, 1927)."""
    correct, z = data.draw(st.integers(0, total)), 1.959964
    for p in wilson_interval(correct, total):
        assert (p - correct / total) ** 2 == pytest.approx(z * z * p * (1 - p) / total, abs=1e-12)


def test_wilson_as_tabulated():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    assert wilson_interval(0, 10)[0] == 0


@often
@given(st.lists(st.tuples(*[st.integers(0, 2)] * 3), max_size=20))
def test_negative_flips(triples: list[tuple[int, int, int]]):
    before, after, labels = np.array(triples, np.int64).reshape(-1, 3).T
    count = sum(b == label != now for b, now, label in triples)
    assert metrics.negative_flips(before, after, labels) == near(count / len(triples) if triples else 0.0)
