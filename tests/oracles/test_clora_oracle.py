"""C-LoRA (Zhang et al., 2025) against its equations, written out in numpy.

Shape letters: n examples, o outputs, i inputs, r rank.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import noise, tiny_images, tiny_vit
from torch import Tensor, nn

from lamina.adapters import AdaptedLinear, LowRank
from lamina.config import EvaluationConfig, TrainingConfig
from lamina.data.streams import class_plan, make_stream
from lamina.engine.loop import Loop
from lamina.errors import MethodError
from lamina.learner import Learner
from lamina.methods.clora import SHARED, CLoRA, CLoRAConfig, Routed, column_space, kept_out, overlap, parts_of

TRAINING = TrainingConfig(epochs=2, batch_size=16, lr=0.02, head_lr=0.05, schedule="constant")
RANK = 3


class Watched(CLoRA):
    """Keeps a copy of every site's parts: as a task begins, after every step, and before and after a task ends."""

    def __init__(self, config: CLoRAConfig) -> None:
        super().__init__(config)
        self.begun: list[dict[str, Any]] = []
        self.steps: list[list[dict[str, Any]]] = []
        self.trained: list[dict[str, Any]] = []
        self.ended: list[dict[str, Any]] = []

    def begin(self, learner: Learner, task: Any, batches: Any) -> None:
        super().begin(learner, task, batches)
        self.begun.append(copied(learner))
        self.steps.append([])

    def after_step(self, learner: Learner, step: Any) -> None:
        super().after_step(learner, step)
        self.steps[-1].append(copied(learner))

    def end(self, learner: Learner, task: Any, batches: Any) -> None:
        self.trained.append(copied(learner))
        super().end(learner, task, batches)
        self.ended.append(copied(learner))


def copied(learner: Learner) -> dict[str, dict[str, np.ndarray]]:
    return {
        name: {part: value.detach().double().numpy() for part, value in parts_of(site.live()[SHARED]).items()}
        for name, site in learner.sites.items()
    }


def make_loop(folder: Path, tasks: int = 3, **settings: Any) -> Loop:
    data = tiny_images(24 * tasks, classes=2 * tasks)
    return Loop(
        learner=Learner(tiny_vit(blocks=2), ("q", "fc1")),
        method=Watched(CLoRAConfig(**{"rank": RANK} | settings)),
        stream=make_stream(data, class_plan(data, tasks), "class"),
        training=TRAINING,
        evaluation=EvaluationConfig(),
        seed=0,
        checkpoints=folder,
    )


def run(folder: Path, **settings: Any) -> Watched:
    loop = make_loop(folder, **settings)
    loop.run()
    return loop.method


def begun(folder: Path, **settings: Any) -> Loop:
    """At the start of the first task."""
    loop = make_loop(folder, **settings)
    torch.manual_seed(0)
    loop.method.begin(loop.learner, loop.stream[0], loop.pass_over("begin", loop.stream[0]))
    return loop


def amid_second_task(folder: Path, **settings: Any) -> Loop:
    """R_old and R_δ are anything but zero."""
    loop = begun(folder, **settings)
    for number in range(2):
        if number:
            loop.method.end(loop.learner, loop.stream[0], loop.pass_over("end", loop.stream[0]))
            loop.method.begin(loop.learner, loop.stream[1], loop.pass_over("begin", loop.stream[1]))
        for name, site in loop.learner.sites.items():
            with torch.no_grad():
                parts_of(site.live()[SHARED])["delta"].copy_(noise((RANK, RANK), "delta", number, name))
    return loop


def parts(**replaced: Tensor) -> dict[str, Tensor]:
    shapes = {"a": (6, RANK), "b": (RANK, 5), "old": (RANK, RANK), "delta": (RANK, RANK)}
    return {name: noise(shape, name) for name, shape in shapes.items()} | replaced


def branch(given: dict[str, Tensor], *, stop: bool) -> Routed:
    old = {"old" if stop else "begun": given["old"]}
    return Routed(trained={name: given[name] for name in ("a", "b", "delta")}, frozen=old)


def backward(adapter: Any) -> tuple[Tensor, np.ndarray, Tensor, Tensor]:
    """G = ∂L/∂W in numpy, the weight in use, the gradient of the input, and the output, for L = Σ y² / 2."""
    layer, x_ni = AdaptedLinear(nn.Linear(5, 6)), noise((7, 5), "x").requires_grad_()
    layer.base_oi, layer.bias_o = noise((6, 5), "base"), noise((6,), "bias")
    layer.add("x", adapter)
    layer.refold()
    y_no = layer(x_ni)
    (y_no.square().sum() / 2).backward()
    assert x_ni.grad is not None
    return y_no.detach(), y_no.detach().double().numpy().T @ x_ni.detach().double().numpy(), x_ni.grad, x_ni.detach()


# ------------------------------------------------------------------------------------------------- the equations


@pytest.mark.parametrize("stop", [True, False])
def test_gradients_are_those_of_the_paper(stop: bool):
    given = parts()
    adapter = branch(given, stop=stop)
    _, gradient_oi, _, _ = backward(adapter)
    a_or, b_ri, old_rr, delta_rr = (given[name].double().numpy() for name in ("a", "b", "old", "delta"))
    seen_rr = delta_rr if stop else old_rr + delta_rr
    for name, expected in {
        "a": gradient_oi @ b_ri.T @ seen_rr.T,
        "b": seen_rr.T @ a_or.T @ gradient_oi,
        "delta": a_or.T @ gradient_oi @ b_ri.T,
    }.items():
        found = adapter.trained()[name].grad
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max(), err_msg=name)
    assert set(adapter.trained()) == {"a", "b", "delta"}, "R_old learns nothing"


def test_the_stop_changes_no_output_and_lets_the_input_have_its_whole_gradient():
    given = parts()
    a_or, b_ri, routing_rr = given["a"], given["b"], given["old"] + given["delta"]
    resting = Routed(trained={}, frozen={"a": a_or, "b": b_ri, "old": routing_rr})
    weight_oi = (noise((6, 5), "base") + a_or @ routing_rr @ b_ri).double()
    for adapter in (branch(given, stop=True), branch(given, stop=False), resting):
        y_no, _, x_gradient_ni, x_ni = backward(adapter)
        torch.testing.assert_close(
            y_no.double(), x_ni.double() @ weight_oi.T + noise((6,), "bias"), atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(x_gradient_ni.double(), y_no.double() @ weight_oi, atol=1e-3, rtol=1e-4)


def test_layers_below_learn_through_the_old_path_too(tmp_path: Path):
    """In a whole model the gradient of every R_δ is the same with and without the stop: it is on A and B alone."""
    gradients = {}
    for stop in (True, False):
        loop = amid_second_task(tmp_path, stop_gradient=stop, penalty=0)
        torch.manual_seed(5)
        task = loop.stream[1]
        loop.method.loss(loop.learner, task.train.batch(np.arange(8)), task).backward()
        gradients[stop] = {name: p.grad for name, p in loop.learner.trainable().items()}
    assert gradients[True].keys() == gradients[False].keys()
    for name, gradient in gradients[True].items():
        same = torch.allclose(gradient, gradients[False][name], rtol=1e-3, atol=1e-3 * gradient.abs().max().item())
        assert same == (not name.endswith(("/a", "/b"))), name


def size_of_gradients(stop: bool, **replaced: Tensor) -> tuple[float, float]:
    """‖∂A‖² and ‖∂B‖², at one and the same G."""
    given = parts(**replaced)
    adapter = branch(given, stop=stop)
    up_or, down_ri = adapter.factors()
    (noise((6, 5), "G") * (up_or @ down_ri)).sum().backward()
    return tuple(adapter.trained()[part].grad.double().square().sum().item() for part in ("a", "b"))  # type: ignore[return-value]


def orthogonal(sides: str) -> dict[str, Tensor]:
    """R_old of rank 1 and R_δ of rank 2, orthogonal on these sides only."""
    left_rr, right_rr = (torch.linalg.qr(noise((RANK, RANK), side))[0] for side in "lr")
    old_rr = 2 * torch.outer(left_rr[:, 0], right_rr[:, 0])
    own = right_rr[:, 1:] if sides == "two" else right_rr[:, :2] + right_rr[:, 2:]
    return {"old": old_rr, "delta": left_rr[:, 1:] @ noise((2, 2), "mix") @ own.T}


def test_theorem_3_1_for_a_where_the_penalty_is_zero():
    """‖∂A whole‖² - ‖∂A stopped‖² = ‖∂A old‖² > 0 for every G; for B this needs R_old R_δ^T = 0 as well."""
    one, two = orthogonal("one"), orthogonal("two")
    assert overlap(one["old"], one["delta"], "one") < 1e-10 < 0.01 < overlap(one["old"], one["delta"], "two")
    assert overlap(two["old"], two["delta"], "two") < 1e-10
    for given in (one, two):
        whole, stopped = size_of_gradients(False, **given), size_of_gradients(True, **given)
        alone = size_of_gradients(True, old=given["old"], delta=given["old"])
        assert whole[0] - stopped[0] == pytest.approx(alone[0], rel=1e-4)
        assert whole[0] > stopped[0]
        assert (whole[1] - stopped[1] == pytest.approx(alone[1], rel=1e-4)) == (given is two)


def test_theorem_3_1_does_not_hold_without_its_conditions():
    """Where R_δ points against R_old the stopped gradient is the larger one; of B even where eq. 26 is zero."""
    old_rr = noise((RANK, RANK), "old")
    for part in range(2):
        opposed = {"old": old_rr, "delta": -0.9 * old_rr}
        assert size_of_gradients(False, **opposed)[part] < size_of_gradients(True, **opposed)[part]
    # R_old = e_1 e_1^T and R_δ = -e_2 e_1^T do not overlap, but where the first two columns of A agree they cancel in ∂B.
    a_or = parts()["a"].clone()
    a_or[:, 1] = a_or[:, 0]
    old_rr, delta_rr = torch.zeros(RANK, RANK), torch.zeros(RANK, RANK)
    old_rr[0, 0], delta_rr[1, 0] = 1, -1
    assert overlap(old_rr, delta_rr, "one") == 0
    assert size_of_gradients(False, a=a_or, old=old_rr, delta=delta_rr)[1] < 1e-8
    assert size_of_gradients(True, a=a_or, old=old_rr, delta=delta_rr)[1] > 1e-2


# --------------------------------------------------------------------------------------------------- the penalty


def overlap_by_hand(old_rr: np.ndarray, delta_rr: np.ndarray, sides: str) -> float:
    columns = sum((old_rr[:, j] @ delta_rr[:, k]) ** 2 for j in range(RANK) for k in range(RANK))
    rows = sum((old_rr[j] @ delta_rr[k]) ** 2 for j in range(RANK) for k in range(RANK))
    return float(columns if sides == "one" else columns + rows)


@pytest.mark.parametrize("sides", ["one", "two"])
@pytest.mark.parametrize("stop", [True, False])
def test_the_loss_is_cross_entropy_and_the_overlap_of_all_maps(tmp_path: Path, sides: str, stop: bool):
    loop = amid_second_task(tmp_path, penalty=0.7, sides=sides, stop_gradient=stop)
    task = loop.stream[1]
    batch = task.train.batch(np.arange(8))
    found = loop.method.loss(loop.learner, batch, task) - loop.learner.loss(batch, task)
    routings = [(site["old" if stop else "begun"], site["delta"]) for site in copied(loop.learner).values()]
    assert len(routings) == 4
    assert found.item() == pytest.approx(0.7 * sum(overlap_by_hand(*pair, sides) for pair in routings), rel=1e-4)


def test_the_penalty_moves_only_the_new_routing(tmp_path: Path):
    loop = amid_second_task(tmp_path)
    for name, site in loop.learner.sites.items():
        adapter = site.live()[SHARED]
        given = parts_of(adapter)
        overlap(given["old"], given["delta"], "two").backward()
        assert adapter.trained()["delta"].grad.abs().max() > 0, name
        assert adapter.trained()["a"].grad is None


def test_the_first_task_has_no_penalty(tmp_path: Path):
    loop = begun(tmp_path, start="lora", penalty=1e6)
    task = loop.stream[0]
    batch = task.train.batch(np.arange(8))
    assert loop.method.loss(loop.learner, batch, task) == loop.learner.loss(batch, task)


def test_the_heavier_the_penalty_the_smaller_the_overlap(tmp_path: Path):
    """Relative to the sizes of R_old and R_δ, so that a small R_δ does not count as a separate one."""
    found = []
    for penalty in (0.0, 10.0, 1000.0):
        method = run(tmp_path / str(penalty), penalty=penalty, tasks=2)
        ratios = [
            overlap_by_hand(p["old"], p["delta"], "one") / (p["old"] ** 2).sum() / (p["delta"] ** 2).sum()
            for p in method.trained[1].values()
        ]
        found.append(float(np.mean(ratios)))
    assert found[0] > found[1] > found[2]


# ----------------------------------------------------------------------------------------------- tasks and growth


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("start", ["kaiming", "lora"])
def test_routings_add_up_and_the_folded_weight_is_the_sum(tmp_path: Path, stop: bool, start: str):
    loop = make_loop(tmp_path, stop_gradient=stop, start=start)
    loop.run()
    method, old = loop.method, "old" if stop else "begun"
    for name, site in loop.learner.sites.items():
        deltas = [trained[name]["delta"] for trained in method.trained]
        assert all(np.abs(delta_rr).max() > 1e-3 for delta_rr in deltas)
        for number in range(3):
            before = sum(deltas[:number], np.zeros((RANK, RANK)))
            np.testing.assert_allclose(method.begun[number][name][old], before, atol=1e-6)
            np.testing.assert_allclose(method.ended[number][name]["old"], before + deltas[number], atol=1e-6)
            start_rr = np.eye(RANK) if (number, start) == (0, "lora") else np.zeros((RANK, RANK))
            assert np.array_equal(method.begun[number][name]["delta"], start_rr)
            assert all(
                np.array_equal(step[name][old], method.begun[number][name][old]) for step in method.steps[number]
            )
        last = method.trained[-1][name]
        weight_oi = site.layer.base_oi.double().numpy() + last["a"] @ sum(deltas) @ last["b"]
        with loop.learner.folded():
            np.testing.assert_allclose(site.layer.weight_oi, weight_oi, atol=1e-5)


def test_its_size_does_not_depend_on_the_number_of_tasks(tmp_path: Path):
    loop = make_loop(tmp_path)
    loop.run()
    sites, head = loop.learner.sites.values(), 2 * (32 + 1)
    factors = sum((site.d_in + site.d_out) * RANK + RANK**2 for site in sites)
    assert [entry.stored_parameters for entry in loop.state.lineage] == [factors + t * head for t in (1, 2, 3)]
    assert [entry.trainable_parameters for entry in loop.state.lineage] == [factors + head] * 3
    assert [entry.memory_bytes for entry in loop.state.lineage] == [0] * 3


def test_the_end_of_a_task_changes_no_weight(tmp_path: Path):
    loop = amid_second_task(tmp_path)
    before = folded_weights(loop.learner)
    loop.method.end(loop.learner, loop.stream[1], loop.pass_over("end", loop.stream[1]))
    for name, weight_oi in folded_weights(loop.learner).items():
        torch.testing.assert_close(weight_oi, before[name], atol=1e-5, rtol=1e-5)


def folded_weights(learner: Learner) -> dict[str, Tensor]:
    with learner.folded():
        return {name: site.layer.weight_oi.clone() for name, site in learner.sites.items()}


# ------------------------------------------------------------------------------------------- starts and variants


def test_the_first_step_moves_the_routing_only(tmp_path: Path):
    """A, B drawn and R_δ = 0: the change is zero, and A and B have no gradient yet."""
    method = run(tmp_path, tasks=2)
    for number in range(2):
        for name, start in method.begun[number].items():
            first, second = method.steps[number][0][name], method.steps[number][1][name]
            assert np.abs(start["a"]).min() > 0
            assert np.abs(start["b"]).min() > 0
            assert not start["delta"].any()
            assert np.abs(first["delta"]).min() > 0
            assert np.array_equal(first["a"], start["a"])
            assert np.array_equal(first["b"], start["b"])
            assert not np.array_equal(second["a"], start["a"])
            assert not np.array_equal(second["b"], start["b"])
            assert np.abs(start["a"]).max() <= RANK**-0.5 or number == 1


def test_the_other_start_is_that_of_lora(tmp_path: Path):
    loop = begun(tmp_path, start="lora")
    for site in loop.learner.sites.values():
        ours = site.live()[SHARED]
        plain = LowRank(trained={"up": ours.trained()["a"], "down": ours.trained()["b"]})
        outputs = []
        for adapter in (ours, plain):
            up_or, down_ri = adapter.factors()
            outputs.append(up_or @ down_ri)
            (outputs[-1] * noise(tuple(outputs[-1].shape), "G")).sum().backward()
        assert torch.equal(*outputs)
        torch.testing.assert_close(ours.trained()["a"].grad, plain.up.grad)
        assert ours.trained()["a"].grad.abs().max() > 0
        assert not ours.trained()["b"].grad.any()
        assert not plain.down.grad.any()


@pytest.mark.parametrize(("shared", "moving"), [("trained", 3), ("frozen after first", 1), ("frozen", 0)])
def test_a_and_b_learn_only_as_long_as_they_are_meant_to(tmp_path: Path, shared: str, moving: int):
    loop = make_loop(tmp_path, shared=shared)
    loop.run()
    method = loop.method
    for number in range(3):
        for name, start in method.begun[number].items():
            for part in ("a", "b"):
                moved = not np.array_equal(method.ended[number][name][part], start[part])
                assert moved == (number < moving), f"{part} of {name} in task {number + 1}"
            assert method.trained[number][name]["delta"].any()
    per_slot = [site.d_in * RANK + site.d_out * RANK for site in loop.learner.sites.values()]
    fixed = len(per_slot) * RANK**2 + 2 * (32 + 1)
    assert [entry.trainable_parameters for entry in loop.state.lineage] == [
        fixed + (sum(per_slot) if number < moving else 0) for number in range(3)
    ]


def test_a_start_that_could_learn_nothing_is_refused(tmp_path: Path):
    with pytest.raises(MethodError, match="start = 'lora' and shared = 'frozen'"):
        begun(tmp_path, start="lora", shared="frozen")
    begun(tmp_path, start="lora", shared="frozen after first")


# ------------------------------------------------------------------------------------------- the hard projection


@pytest.mark.parametrize("sides", ["one", "two"])
def test_the_hard_projection_leaves_no_overlap_after_any_step(tmp_path: Path, sides: str):
    """With a first task that gave R_old rank 1; what is left is rounding, and R_δ has moved."""
    loop = make_loop(tmp_path, tasks=2, projection=1.0, sides=sides)
    method, end = loop.method, loop.method.end

    def end_with_rank_one(learner: Learner, task: Any, batches: Any) -> None:
        if task is loop.stream[0]:
            for name, site in learner.sites.items():
                with torch.no_grad():
                    column_r, row_r = noise((RANK,), "column", name), noise((RANK,), "row", name)
                    parts_of(site.live()[SHARED])["delta"].copy_(torch.outer(column_r, row_r))
        end(learner, task, batches)

    method.end = end_with_rank_one  # type: ignore[method-assign]
    loop.run()
    assert len(method.steps[1]) >= 4
    for step in method.steps[1]:
        for name, site in step.items():
            sizes = np.linalg.norm(site["old"]) * np.linalg.norm(site["delta"])
            assert np.linalg.norm(site["delta"]) > 1e-3, name
            assert np.abs(site["old"].T @ site["delta"]).max() < 1e-6 * sizes
            assert (np.abs(site["old"] @ site["delta"].T).max() < 1e-6 * sizes) == (sides == "two")


def test_once_the_old_routing_is_of_full_rank_the_hard_projection_leaves_nothing(tmp_path: Path):
    method = run(tmp_path, tasks=2, projection=1.0)
    for name, site in method.trained[1].items():
        assert np.linalg.matrix_rank(site["old"]) == RANK
        assert np.abs(site["delta"]).max() < 1e-6, name


def test_the_projection_keeps_out_of_the_main_directions(tmp_path: Path):
    method = run(tmp_path, tasks=2, projection=0.6)
    for site in method.trained[1].values():
        vectors_rr, values_r, _ = np.linalg.svd(site["old"])
        count = next(k for k in range(1, RANK + 1) if (values_r[:k] ** 2).sum() >= 0.6 * (values_r**2).sum())
        assert np.abs(vectors_rr[:, :count].T @ site["delta"]).max() < 1e-6
        if count < RANK:
            assert np.abs(site["delta"]).max() > 1e-3


def test_the_column_space_is_counted_to_rounding_and_by_energy():
    left_rr, right_rr = (torch.linalg.qr(noise((4, 4), side))[0] for side in "lr")
    matrix_rr = left_rr @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.0])) @ right_rr.T  # energies 16, 4, 1, 0 of 21
    for share, count in ((0.5, 1), (0.76, 1), (0.77, 2), (0.95, 2), (0.96, 3), (1.0, 3)):
        basis_rk = column_space(matrix_rr, share)
        assert basis_rk.shape == (4, count), share
        torch.testing.assert_close(basis_rk @ basis_rk.T, left_rr[:, :count] @ left_rr[:, :count].T, atol=1e-5, rtol=0)
    assert column_space(torch.zeros(4, 4), 1.0).shape == (4, 0)
    delta_rr = noise((4, 4), "delta")
    assert torch.equal(kept_out(torch.zeros(4, 4), delta_rr, 1.0, "two"), delta_rr)
