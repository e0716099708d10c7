"""O-LoRA (Wang et al., 2023) against its sums, written out as loops.

Shape letters: o outputs, i inputs, r rank, p rows of all old downs.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import noise, tiny_fused_vit, tiny_images
from torch import Tensor

from lamina.config import EvaluationConfig, TrainingConfig
from lamina.data.streams import class_plan, make_stream
from lamina.engine.loop import Loop
from lamina.learner import Learner
from lamina.methods.olora import OLoRA, OLoRAConfig, overlap

TRAINING = TrainingConfig(epochs=4, batch_size=16, lr=5e-3, head_lr=0.05, schedule="cosine")
RANK = 2


def make_loop(folder: Path, tasks: int = 3, **settings: Any) -> Loop:
    data = tiny_images(24 * tasks, classes=2 * tasks)
    return Loop(
        learner=Learner(tiny_fused_vit(blocks=2), ("q", "v")),
        method=OLoRA(OLoRAConfig(**{"rank": RANK} | settings)),
        stream=make_stream(data, class_plan(data, tasks), "class"),
        training=TRAINING,
        evaluation=EvaluationConfig(),
        seed=0,
        checkpoints=folder,
    )


def in_task(folder: Path, number: int, **settings: Any) -> Loop:
    """In the middle of this task (counted from 0); all factors have moved."""
    loop = make_loop(folder, **settings)
    for k, task in enumerate(loop.stream.tasks[: number + 1]):
        torch.manual_seed(k)
        loop.method.begin(loop.learner, task, loop.pass_over("begin", task))
        with torch.no_grad():
            for name, factor in loop.learner.trainable().items():
                factor.copy_(0.1 * noise(tuple(factor.shape), name))
        if k < number:
            loop.method.end(loop.learner, task, loop.pass_over("end", task))
    return loop


def overlap_by_hand(olds: list[Tensor], new_ri: Tensor) -> float:
    return sum(
        abs(float(np.dot(old_row.double().numpy(), new_row.detach().double().numpy())))
        for old_ri in olds
        for old_row in old_ri
        for new_row in new_ri
    )


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_loss_is_cross_entropy_overlap_and_norms(tmp_path: Path, number: int):
    loop = in_task(tmp_path, number, orthogonality=0.3, shrinkage=0.07)
    task = loop.stream[number]
    batch = task.train.batch(np.arange(8))
    expected = loop.learner.loss(batch, task).item()
    overlaps = []
    for site in loop.learner.sites.values():
        new = site.live()[task.name].trained()
        olds = [site.finished()[old.name].down_ri for old in loop.stream.tasks[:number]]
        overlaps.append(overlap_by_hand(olds, new["down"]))
        expected += 0.3 * overlaps[-1]
        expected += 0.07 * sum(np.sqrt((factor.detach().double().numpy() ** 2).sum()) for factor in new.values())
    assert len(overlaps) == 4
    assert all(value > 0.01 for value in overlaps) == (number > 0)
    assert loop.method.loss(loop.learner, batch, task).item() == pytest.approx(expected, rel=1e-5)


def test_the_overlap_is_zero_for_orthogonal_rows_only():
    basis_ii = torch.linalg.qr(noise((6, 6), "basis"))[0]
    old_pi = noise((4, 3), "mix") @ basis_ii[:3]
    assert overlap(old_pi, noise((2, 3), "other mix") @ basis_ii[3:]) < 1e-5
    leaning_ri = basis_ii[3:5] + 0.1 * basis_ii[:2]
    assert overlap(old_pi, leaning_ri) > 0.1
    assert overlap(old_pi, leaning_ri).item() == pytest.approx(overlap_by_hand([old_pi], leaning_ri), rel=1e-5)
    assert overlap(old_pi, -leaning_ri) == overlap(old_pi, leaning_ri), "no sign makes it smaller"


def test_the_penalty_moves_only_the_new_downs(tmp_path: Path):
    loop = in_task(tmp_path, 2)
    task = loop.stream[2]
    batch = task.train.batch(np.arange(8))
    (loop.method.loss(loop.learner, batch, task) - loop.learner.loss(batch, task)).backward()
    for name, parameter in loop.learner.trainable().items():
        moves = parameter.grad is not None and parameter.grad.abs().max() > 1e-4
        assert moves == name.endswith("/down"), name
    for site in loop.learner.sites.values():
        old_pi = torch.cat([finished.down_ri for finished in site.finished().values()])
        new_ri = site.live()[task.name].trained()["down"]
        expected_ri = 0.5 * torch.sign(new_ri.detach() @ old_pi.T) @ old_pi
        torch.testing.assert_close(new_ri.grad, expected_ri, atol=1e-4, rtol=1e-3)


def test_heavier_penalties_make_adapters_more_orthogonal_but_never_quite(tmp_path: Path):
    cosines = []
    for orthogonality in (0.0, 0.05, 0.5):
        loop = make_loop(tmp_path / str(orthogonality), orthogonality=orthogonality)
        loop.run()
        found = []
        for site in loop.learner.sites.values():
            first, second, third = (
                torch.nn.functional.normalize(finished.down_ri) for finished in site.finished().values()
            )
            found += [(first @ second.T).abs().mean(), (first @ third.T).abs().mean(), (second @ third.T).abs().mean()]
        cosines.append(float(torch.stack(found).mean()))
    assert cosines[0] > 2 * cosines[1] > 0
    assert cosines[0] > 2 * cosines[2] > 0


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (6.0, 3.0)])
def test_the_weight_is_the_sum_of_all_adapters(tmp_path: Path, alpha: float | None, scale: float):
    loop = in_task(tmp_path, 2, alpha=alpha)
    task = loop.stream[2]
    learnt: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in loop.learner.sites}
    again = make_loop(tmp_path, alpha=alpha)
    for k, each in enumerate(again.stream.tasks):
        torch.manual_seed(k)
        again.method.begin(again.learner, each, again.pass_over("begin", each))
        for name, site in again.learner.sites.items():
            shapes = {part: tuple(value.shape) for part, value in site.live()[each.name].trained().items()}
            learnt[name].append(
                {p: 0.1 * noise(s, f"{name}/{each.name}/{p}").double().numpy() for p, s in shapes.items()}
            )
    loop.method.end(loop.learner, task, loop.pass_over("end", task))
    for name, site in loop.learner.sites.items():
        rows = slice(site.outputs.start, site.outputs.stop)
        expected_oi = site.layer.base_oi[rows].double().numpy()
        expected_oi = expected_oi + sum(scale * parts["up"] @ parts["down"] for parts in learnt[name])
        np.testing.assert_allclose(site.layer.weight_oi[rows], expected_oi, atol=1e-5)
        assert not site.live()


def folded_weights(learner: Learner) -> dict[str, Tensor]:
    with learner.folded():
        return {name: site.layer.weight_oi.clone() for name, site in learner.sites.items()}


def test_every_task_starts_from_a_fresh_adapter_without_effect(tmp_path: Path):
    loop = make_loop(tmp_path)
    starts = []
    for k, task in enumerate(loop.stream.tasks):
        torch.manual_seed(k)
        before = folded_weights(loop.learner)
        loop.method.begin(loop.learner, task, loop.pass_over("begin", task))
        for name, site in loop.learner.sites.items():
            new = site.live()[task.name].trained()
            assert not new["up"].any()
            assert new["down"].abs().max() <= site.d_in**-0.5
            assert torch.equal(folded_weights(loop.learner)[name], before[name])
            starts.append(new["down"].detach().clone())
        loop.method.end(loop.learner, task, loop.pass_over("end", task))
    assert len({tuple(start.flatten().tolist()) for start in starts}) == len(starts) == 12


def test_a_norm_of_zero_has_no_gradient_that_is_not_a_number(tmp_path: Path):
    """Up starts at zero, where the norm has a corner."""
    loop = make_loop(tmp_path, shrinkage=0.1)
    torch.manual_seed(0)
    task = loop.stream[0]
    loop.method.begin(loop.learner, task, loop.pass_over("begin", task))
    loop.method.loss(loop.learner, task.train.batch(np.arange(8)), task).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in loop.learner.trainable().values())


def test_it_grows_by_one_adapter_per_task(tmp_path: Path):
    loop = make_loop(tmp_path)
    loop.run()
    per_task = sum((site.d_in + site.d_out) * RANK for site in loop.learner.sites.values()) + 2 * (32 + 1)
    assert [entry.stored_parameters for entry in loop.state.lineage] == [t * per_task for t in (1, 2, 3)]
    assert not loop.method.memory
