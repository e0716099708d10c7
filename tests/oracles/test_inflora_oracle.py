"""InfLoRA against a slow and obvious numpy version of its paper (Liang & Li, CVPR 2024) and of its released code.

The oracle keeps what the library never does: the matrix H (d, n) of all inputs, whose singular value decompositions are
those of section 3.2 and of GPM (Saha et al., ICLR 2021); thresholds are loops.

Shape letters: d inputs of a layer, o outputs, n input vectors, r rank, k columns of a basis.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.tiny import noise, tiny_images, tiny_vit

from lamina.adapters import AdaptedLinear, LowRank
from lamina.config import EvaluationConfig, TrainingConfig
from lamina.data.streams import class_plan, make_stream
from lamina.engine.loop import Loop
from lamina.learner import Learner
from lamina.methods.base import growing_threshold
from lamina.methods.inflora import InfLoRA, InfLoRAConfig, Subspace, extend, main_directions
from lamina.types import Batch


@dataclass
class Oracle:
    """source: "paper" works on inputs H, "released" on their second moment C = H H^T / n."""

    source: str
    kind: str = "old"
    basis_dk: np.ndarray | None = None
    flips: list[str] = field(default_factory=list)

    def what(self, inputs_dn: np.ndarray) -> np.ndarray:
        return inputs_dn if self.source == "paper" else inputs_dn @ inputs_dn.T / inputs_dn.shape[1]

    def freed(self, what_dn: np.ndarray) -> np.ndarray:
        """Equations 6 and 7."""
        if self.basis_dk is None:
            return what_dn
        inside_dn = self.basis_dk @ (self.basis_dk.T @ what_dn)
        return what_dn - inside_dn if self.kind == "old" else inside_dn

    def down(self, inputs_dn: np.ndarray, rank: int) -> np.ndarray:
        """Equation 8: the first r principal directions, (r, d)."""
        u_dk, _, _ = np.linalg.svd(self.freed(self.what(inputs_dn)))
        return u_dk[:, :rank].T

    def learn(self, inputs_dn: np.ndarray, epsilon: float) -> None:
        what_dn = self.what(inputs_dn)
        d, total = len(what_dn), np.sum(what_dn**2)
        if self.basis_dk is None:
            u_dk, s_k, _ = np.linalg.svd(what_dn)
            count, held = 0, 0.0
            while held / total < epsilon:
                held += s_k[count] ** 2
                count += 1
            if self.source == "released":  # sum(cumsum < threshold): one fewer than reaches it, but at least one
                count = max(1, count - 1)
            self.basis_dk = u_dk[:, :count]
        elif self.kind == "old":
            rest_dn = self.freed(what_dn)
            u_dk, s_k, _ = np.linalg.svd(rest_dn)
            count, held = 0, total - np.sum(rest_dn**2)
            while held / total < epsilon and self.basis_dk.shape[1] + count < d:
                held += s_k[count] ** 2
                count += 1
            self.basis_dk = np.hstack([self.basis_dk, u_dk[:, :count]])
        else:
            inside_dn = self.freed(what_dn)
            u_dk, s_k, _ = np.linalg.svd(inside_dn)
            free, count, left = self.basis_dk.shape[1], 0, np.sum(inside_dn**2)
            while left / total >= 1 - epsilon and count < free:
                left -= s_k[count] ** 2
                count += 1
            given_dk = u_dk[:, :count]
            f_dk, _, _ = np.linalg.svd(self.basis_dk - given_dk @ (given_dk.T @ self.basis_dk))
            self.basis_dk = f_dk[:, : free - count]
        if self.kind == "old" and self.basis_dk.shape[1] > d / 2:
            u_dd, _, _ = np.linalg.svd(self.basis_dk)
            self.kind, self.basis_dk = "free", u_dd[:, self.basis_dk.shape[1] :]
        self.flips.append(self.kind)


def inputs_of_task(task: int, d: int, n: int, seed: int) -> np.ndarray:
    """Inputs with a spectrum that falls, in directions partly shared between tasks."""
    generator = np.random.default_rng([seed, task])
    turn_dd, _ = np.linalg.qr(generator.normal(size=(d, d)))
    return (
        turn_dd @ (0.75 ** np.arange(d)[:, None] * generator.normal(size=(d, n))) + generator.normal(size=(d, 1)) * 0.3
    )


def moment(inputs_dn: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(inputs_dn @ inputs_dn.T / inputs_dn.shape[1])


def gram(rows_rd: np.ndarray) -> np.ndarray:
    return rows_rd.T @ rows_rd


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("source", ["released", "paper"])
def test_spaces_and_directions_over_a_stream(source: str, seed: int):
    d, rank, tasks, epsilon = 14 + seed, 3, 7, 0.6 + 0.1 * seed
    oracle, old, compared = Oracle(source), None, 0
    for task in range(tasks):
        inputs_dn = inputs_of_task(task, d, 60, seed)
        moment_dd = moment(inputs_dn)
        directions_rd = main_directions(moment_dd, old, rank, source).T.numpy()
        free = d if oracle.basis_dk is None else np.linalg.matrix_rank(oracle.freed(np.eye(d)))
        if free > rank:
            np.testing.assert_allclose(gram(directions_rd), gram(oracle.down(inputs_dn, rank)), atol=1e-8)
            compared += 1
        elif free == rank:
            np.testing.assert_allclose(gram(directions_rd), oracle.freed(np.eye(d)), atol=1e-8)
        share = growing_threshold(epsilon, task, tasks)
        assert share == pytest.approx(epsilon + (1 - epsilon) * task / tasks)
        old = extend(old, moment_dd, share, source)
        oracle.learn(inputs_dn, share)
        assert old.kind == oracle.kind
        assert old.basis_dk.shape == oracle.basis_dk.shape
        np.testing.assert_allclose(gram(old.basis_dk.numpy().T), gram(oracle.basis_dk.T), atol=1e-8)
        np.testing.assert_allclose(old.basis_dk.T @ old.basis_dk, np.eye(old.basis_dk.shape[1]), atol=1e-10)
        np.testing.assert_allclose(old.project_out_old(moment_dd), oracle.freed(moment_dd.numpy()), atol=1e-8)
    assert compared >= 2
    assert set(oracle.flips) == {"old", "free"}, "the stream must pass from one form to the other"


def test_the_two_sources_differ():
    inputs_dn = inputs_of_task(0, 20, 80, 9)
    released, paper = (extend(None, moment(inputs_dn), 0.9, source) for source in ("released", "paper"))
    assert released.old_dimension < paper.old_dimension
    later_dd, old = moment(inputs_of_task(1, 20, 80, 9)), released
    grams = [gram(main_directions(later_dd, old, 3, source).T.numpy()) for source in ("released", "paper")]
    assert not np.allclose(*grams, atol=1e-4)


def test_without_a_task_count_the_threshold_is_constant_and_beyond_it_the_last_value_holds():
    assert [growing_threshold(0.9, t, None) for t in range(3)] == [0.9] * 3
    assert growing_threshold(0.9, 3, 4) == growing_threshold(0.9, 7, 4) == pytest.approx(0.975)


# ----------------------------------------------------------------------------------------------- what the paper promises


@pytest.mark.parametrize("source", ["released", "paper"])
@pytest.mark.parametrize("dimension", [4, 9], ids=["old", "free"])
def test_nothing_is_added_to_old_inputs_when_their_whole_space_is_kept(source: str, dimension: int):
    d, rank = 12, 3
    generator = np.random.default_rng(dimension)
    span_dk, _ = np.linalg.qr(generator.normal(size=(d, dimension)))
    old_dn = span_dk @ generator.normal(size=(dimension, 50))
    old = None
    for _ in range(2):  # the released first step keeps one direction too few; the second time it comes in
        old = extend(old, moment(old_dn), 1 - 1e-9, source)
    assert old.old_dimension == dimension
    assert old.kind == ("old" if dimension <= d / 2 else "free")
    down_rd = main_directions(moment(generator.normal(size=(d, 50))), old, rank, source).T.numpy()
    np.testing.assert_allclose(down_rd @ down_rd.T, np.eye(rank), atol=1e-10)
    np.testing.assert_allclose(generator.normal(size=(5, rank)) @ down_rd @ old_dn, 0, atol=1e-10)


@pytest.mark.parametrize("row_norm", [1.0, 3**-0.5])
def test_proposition_1_a_step_on_up_is_the_projected_full_step(row_norm: float):
    """-lr dL/dW B^T B (eqs. 2 to 5), where B^T B is row_norm^2 times a projector."""
    d, o, rank, lr = 10, 6, 3, 0.1
    x_nd, target_n = noise((16, d), "x"), torch.arange(16) % o
    linear = torch.nn.Linear(d, o).requires_grad_(False)
    linear.weight.copy_(noise((o, d), "weight"))
    directions_dr = main_directions(moment(noise((d, 40), "inputs").double().numpy()), None, rank, "paper")
    down_rd = (row_norm * directions_dr.T).float()
    layer = AdaptedLinear(linear)
    branch = LowRank(trained={"up": torch.zeros(o, rank)}, frozen={"down": down_rd})
    layer.add("task", branch)
    optimizer = torch.optim.SGD(branch.parameters(), lr=lr)
    F.cross_entropy(layer(x_nd), target_n).backward()
    optimizer.step()
    up_or, _ = branch.factors()

    weight_od = linear.weight.clone().requires_grad_()
    F.cross_entropy(F.linear(x_nd, weight_od, linear.bias), target_n).backward()
    projector_dd = (directions_dr @ directions_dr.T).float()
    expected_od = -lr * row_norm**2 * weight_od.grad @ projector_dd
    assert expected_od.norm() > 1e-3
    torch.testing.assert_close(up_or.detach() @ down_rd, expected_od, atol=1e-7, rtol=1e-5)


def test_where_no_direction_is_free_rows_are_zero():
    moment_dd = moment(inputs_of_task(0, 8, 30, 0))
    for old in (
        Subspace("free", torch.zeros(8, 0, dtype=torch.float64)),
        Subspace("old", torch.eye(8, dtype=torch.float64)),
    ):
        assert torch.count_nonzero(main_directions(moment_dd, old, 3, "released")) == 0
    one_left = Subspace("free", torch.eye(8, dtype=torch.float64)[:, 2:3])
    directions_dr = main_directions(moment_dd, one_left, 3, "released")
    assert directions_dr[:, 0].abs().tolist() == pytest.approx([0, 0, 1, 0, 0, 0, 0, 0])
    assert torch.count_nonzero(directions_dr[:, 1:]) == 0
    still = extend(Subspace("free", torch.zeros(8, 0, dtype=torch.float64)), moment_dd, 0.9, "released")
    assert (still.kind, still.old_dimension) == ("free", 8)


def test_where_no_direction_is_free_nothing_is_learnt_in_the_slot(tmp_path: Path):
    """A whole task through the engine, one group full and the others not."""
    data = tiny_images(48)
    stream = make_stream(data, class_plan(data, 2), "class")
    learner, method = Learner(tiny_vit(blocks=2)), InfLoRA(InfLoRAConfig(rank=2), task_count=2)
    method.memory = {"block0.attention/free": torch.zeros(32, 0), "tasks": torch.tensor(1)}
    loop = Loop(
        learner=learner,
        method=method,
        stream=stream,
        training=TrainingConfig(epochs=1, lr=0.01),
        evaluation=EvaluationConfig(),
        seed=0,
        checkpoints=tmp_path,
    )
    loop.run()
    for name, site in learner.sites.items():
        up_or, down_rd = site.finished()["task-01"].up_or, site.finished()["task-01"].down_ri
        full = name.startswith("block0.")
        assert (torch.count_nonzero(down_rd) == 0) == full
        assert (torch.count_nonzero(up_or) == 0) == full
        assert torch.equal(site.layer.weight_oi, site.layer.base_oi) == full


@pytest.mark.parametrize("source", ["released", "paper"])
@pytest.mark.parametrize("width", [32, 192])
def test_rounding_noise_of_the_moments_is_no_direction(source: str, width: int):
    """The second task brings the first task's own images: none of their inputs is free in the first block, so no row is left.
    Moments are sums of float32 products."""
    data = tiny_images(8, classes=2)
    task = make_stream(data, class_plan(data, 1), "class")[0]
    config = InfLoRAConfig(rank=3, epsilon=1 - 1e-5, spectrum=source, criterion="paper", augmented_moments=False)
    learner, method = Learner(tiny_vit(blocks=1, width=width)), InfLoRA(config)

    def batches(*, augmented: bool) -> Iterator[Batch]:
        for rows in np.array_split(np.arange(len(task.train)), 2):
            yield task.train.batch(rows)

    method.begin(learner, task, batches)
    method.end(learner, task, batches)
    kept = method.old("block0.attention")
    assert kept is not None
    assert kept.old_dimension == 4 * len(task.train) + 1, "every patch, and the class token"
    method.begin(learner, replace(task, name="the same again"), batches)
    for site in learner.sites.values():
        assert torch.count_nonzero(site.live()["the same again"].factors()[1]) == 0


def test_old_inputs_of_a_first_block_are_left_alone_by_a_later_task(tmp_path: Path):
    """With epsilon near 1 what task 1 sends into the first block is hardly changed by what task 2 learns there."""
    data = tiny_images(64, classes=4)
    stream = make_stream(data, class_plan(data, 2), "class")
    changes = {}
    for epsilon in (0.01, 1 - 1e-9):
        learner = Learner(tiny_vit(blocks=1))
        config = InfLoRAConfig(rank=4, epsilon=epsilon, growing_threshold=False, augmented_moments=False)
        Loop(
            learner=learner,
            method=InfLoRA(config),
            stream=stream,
            training=TrainingConfig(epochs=2, lr=0.05, schedule="constant"),
            evaluation=EvaluationConfig(),
            seed=0,
            checkpoints=tmp_path / str(epsilon),
        ).run()
        site = learner.sites["block0.k"]
        seen: list[torch.Tensor] = []
        handle = site.layer.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        with learner.folded():
            learner.features(stream[0].train.batch(np.arange(len(stream[0].train))))
        handle.remove()
        second = site.finished()["task-02"]
        change_nto = seen[0] @ (second.up_or @ second.down_ri).T
        changes[epsilon] = change_nto.norm() / seen[0].norm()
    kept, unkept = changes[1 - 1e-9], changes[0.01]
    assert unkept > 1e-2
    assert kept < 0.05 * unkept


def test_the_controls_of_the_ablation(tmp_path: Path):
    """OutputRange of B_t are orthogonal to what is kept of the old tasks, unless they are not freed of it; and within the main
    directions of the task's inputs, unless they are random."""
    data = tiny_images(64, classes=4)
    stream = make_stream(data, class_plan(data, 2), "class")
    overlap, inside = {}, {}
    for design in ("freed", "not freed", "random"):
        learner, rank = Learner(tiny_vit(blocks=1)), 3
        method = InfLoRA(InfLoRAConfig(rank=rank, design=design, augmented_moments=False))

        def batches(*, augmented: bool, task: int) -> Iterator[Batch]:
            examples = stream[task].train
            yield examples.batch(np.arange(len(examples)))

        for t, task in enumerate(stream):
            method.begin(learner, task, partial(batches, task=t))
            old = method.old("block0.attention")
            down_rd = learner.sites["block0.k"].live()[task.name].factors()[1].double()
            assert down_rd.norm(dim=1).tolist() == pytest.approx([3**-0.5] * rank)
            if old is not None:
                assert old.kind == "old"
                overlap[design] = (down_rd @ old.basis_dk).norm().item()
                moment_dd = learner.input_moments(batches(augmented=False, task=t))["block0.attention"]
                main_dr = main_directions(moment_dd, None if design == "not freed" else old, rank, "released")
                inside[design] = (down_rd @ main_dr).norm().item()
            method.end(learner, task, partial(batches, task=t))
    assert overlap["freed"] < 1e-6
    assert overlap["random"] < 1e-6
    assert overlap["not freed"] > 0.1
    assert inside["freed"] == pytest.approx(1, abs=1e-6)
    assert inside["not freed"] == pytest.approx(1, abs=1e-6)
    assert inside["random"] < 0.9
