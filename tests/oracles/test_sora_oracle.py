"""SoRA (Ding et al., EMNLP 2023) against slow loops over single gates, and what its pruning promises.

Shape letters: n examples, o outputs, i inputs, r rank.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import noise, tiny_images, tiny_vit

from lamina.adapters import AdaptedLinear
from lamina.config import EvaluationConfig, TrainingConfig
from lamina.data.streams import class_plan, make_stream
from lamina.engine import checkpoint
from lamina.engine.loop import Loop
from lamina.learner import Learner
from lamina.maths.linalg import soft_threshold
from lamina.methods.base import Step
from lamina.methods.sora import Gated, SoRA, SoRAConfig, gated, pruned, released_threshold, strength

TRAINING = TrainingConfig(epochs=4, batch_size=16, lr=0.02, head_lr=0.05, schedule="cosine")


def make_loop(folder: Path, training: TrainingConfig = TRAINING, **settings: Any) -> Loop:
    """Two tasks of 36 training examples, 3 steps an epoch."""
    data = tiny_images(96)
    return Loop(
        learner=Learner(tiny_vit(blocks=2)),
        method=SoRA(SoRAConfig(**{"rank": 4} | settings)),
        stream=make_stream(data, class_plan(data, 2), "class"),
        training=training,
        evaluation=EvaluationConfig(),
        seed=0,
        checkpoints=folder,
    )


def ranks(learner: Learner) -> list[int]:
    return [f.down_ri.shape[0] for site in learner.sites.values() for f in site.finished().values()]


def begun(folder: Path, **settings: Any) -> Loop:
    loop = make_loop(folder, **settings)
    torch.manual_seed(0)
    loop.method.begin(loop.learner, loop.stream[0], loop.pass_over("begin", loop.stream[0]))
    return loop


# ------------------------------------------------------------------------------------------------- the threshold


def proximal(gate: float, threshold: float) -> float:
    """The best of a fine grid: argmin_z (z - g)² / 2 + ξ |z|."""
    grid = np.append(np.linspace(gate - 1, gate + 1, 200_001), 0.0)
    return float(grid[np.argmin((grid - gate) ** 2 / 2 + threshold * np.abs(grid))])


def released(gate: float, threshold: float) -> float:
    """The released optimiser's three masks, one after the other, on one number."""
    if gate > threshold:
        gate -= threshold
    if gate < -threshold:
        gate += threshold
    if abs(gate) < threshold:
        gate = 0.0
    return gate


GATES = torch.tensor([-2.0, -1.01, -0.99, -0.51, -0.49, -0.1, 0.0, 0.1, 0.49, 0.51, 0.75, 0.99, 1.01, 1.5])


def test_the_soft_threshold_is_the_proximal_step():
    found = soft_threshold(GATES, 0.5)
    np.testing.assert_allclose(found, [proximal(g, 0.5) for g in GATES.tolist()], atol=2e-5)
    assert torch.count_nonzero(found[GATES.abs() < 0.5]) == 0, "exactly zero"
    assert torch.count_nonzero(found[GATES.abs() > 0.5]) == (GATES.abs() > 0.5).sum()


def test_the_released_operator_has_twice_the_dead_zone():
    found = released_threshold(GATES, 0.5)
    np.testing.assert_allclose(found, [released(g, 0.5) for g in GATES.tolist()], atol=1e-7)
    assert found.tolist()[10] == 0
    assert soft_threshold(GATES, 0.5).tolist()[10] == 0.25, "1.5 ξ: the released code has 0, the soft threshold ξ / 2"
    assert torch.count_nonzero(found[GATES.abs() < 1]) == 0


@pytest.mark.parametrize(
    ("warmup", "levels", "expected"),
    [
        (0.0, 1, [3.0] * 10),
        (0.4, 1, [0.0] * 4 + [3.0] * 6),
        (0.4, 3, [0.0] * 4 + [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]),
        (0.99, 3, [0.0] * 9 + [1.0]),
        (0.0, 4, [0.75, 0.75, 0.75, 1.5, 1.5, 2.25, 2.25, 2.25, 3.0, 3.0]),
    ],
)
def test_the_schedule_rises_in_equal_stages_after_the_warm_up(warmup: float, levels: int, expected: list[float]):
    assert [strength(3.0, done, 10, warmup, levels) for done in range(10)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "threshold"),
    [
        ({"lam": 5.0}, 0.1),
        ({"lam": 5.0, "warmup": 0.9}, 0.0),
        ({"lam": 0.1, "threshold": "constant"}, 0.1),
        ({"lam": 0.1, "threshold": "constant", "operator": "released"}, 0.1),
        ({"lam": 10.0, "levels": 2}, 0.1),
    ],
)
def test_every_gate_and_nothing_else_is_shrunk_after_a_step(tmp_path: Path, settings: dict[str, Any], threshold: float):
    loop = begun(tmp_path, **{"gate_start": "normal", "warmup": 0.0} | settings)
    before = {name: value.clone() for name, value in loop.learner.tensors().items()}
    loop.method.after_step(loop.learner, Step(done=2, total=10, rate=0.02))
    gates = 0
    for name, value in loop.learner.tensors().items():
        if name.endswith("/gate"):
            gates += 1
            shrink = released if settings.get("operator") == "released" else proximal
            np.testing.assert_allclose(value, [shrink(g, threshold) for g in before[name].tolist()], atol=2e-5)
        else:
            assert torch.equal(value, before[name]), name
    assert gates == len(loop.learner.sites)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "quarter-cosine"])
def test_an_idle_gate_falls_by_lam_of_its_start_however_long_the_task(tmp_path: Path, schedule: Any):
    """The engine says the sum of the rates beforehand. With SGD, and a loss that has no gradient, the threshold alone acts."""
    for epochs, later_lr in ((2, 1.0), (5, 0.25)):
        training = TrainingConfig(
            optimizer="sgd", epochs=epochs, batch_size=16, lr=0.02, later_lr=later_lr, schedule=schedule
        )
        loop = make_loop(tmp_path / f"{epochs}", training, lam=0.6, warmup=0.0)
        rates: list[tuple[float, float]] = []
        left: list[float] = []
        after, end = loop.method.after_step, loop.method.end

        def watched(learner: Learner, at: Step, loop: Loop = loop, after: Any = after, rates: Any = rates) -> None:
            after(learner, at)
            rates.append((at.rate, loop.method.total_rate))

        def ending(learner: Learner, *rest: Any, loop: Loop = loop, end: Any = end, left: Any = left) -> None:
            left.extend(v for b in gated(learner) for v in (b.gate / loop.method.total_rate).tolist())
            end(learner, *rest)

        loop.method.loss = lambda learner, *_, **__: sum(p.sum() for p in learner.trainable().values()) * 0.0  # type: ignore[method-assign]
        loop.method.after_step, loop.method.end = watched, ending  # type: ignore[method-assign]
        loop.run()
        half = len(rates) // 2
        for task in (rates[:half], rates[half:]):
            assert sum(rate for rate, _ in task) == pytest.approx(task[0][1])
        assert left == pytest.approx([0.4] * len(left), abs=1e-5)


def test_where_gates_start_does_not_change_what_the_adapter_does(tmp_path: Path):
    plain, scaled = begun(tmp_path, gate_start="ones"), begun(tmp_path)
    assert scaled.method.total_rate == 1.0, "said by the engine only"
    scaled.method.total_rate = 0.05
    scaled.learner.reset()
    torch.manual_seed(0)
    scaled.method.begin(scaled.learner, scaled.stream[0], scaled.pass_over("begin", scaled.stream[0]))
    for one, other in zip(gated(plain.learner), gated(scaled.learner), strict=True):
        one.up.data, other.up.data = (torch.ones_like(one.up) for _ in range(2))
        assert other.gate.tolist() == pytest.approx([0.05] * 4)
        for mine, theirs in zip(one.factors(), other.factors(), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_at_the_first_step_no_gradient_reaches_a_gate(tmp_path: Path):
    """up is 0: without a warm-up the threshold would be all that acts on the gates."""
    loop = begun(tmp_path)
    task = loop.stream[0]
    loop.method.loss(loop.learner, task.train.batch(np.arange(8)), task).backward()
    for branch in gated(loop.learner):
        assert torch.count_nonzero(branch.gate.grad) == 0
        assert torch.count_nonzero(branch.up.grad) > 0
        assert branch.gate.tolist() == [1.0] * 4


def test_the_penalty_is_the_mean_over_all_gates(tmp_path: Path):
    plain, penal = begun(tmp_path, gate_start="normal"), begun(tmp_path, gate_start="normal", penalty=10.0)
    penal.learner.head.load_state_dict(plain.learner.head.state_dict())
    task = plain.stream[0]
    batch = task.train.batch(np.arange(8))
    gates = [g for branch in gated(penal.learner) for g in branch.gate.tolist()]
    extra = penal.method.loss(penal.learner, batch, task) - plain.method.loss(plain.learner, batch, task)
    assert extra.item() == pytest.approx(10 * sum(map(abs, gates)) / len(gates), rel=1e-5)


# ----------------------------------------------------------------------------------------------------- the branch


def branch(gate: list[float]) -> Gated:
    r = len(gate)
    trained = {"up": noise((6, r), "up"), "gate": torch.tensor(gate), "down": noise((r, 5), "down")}
    return Gated(trained=trained, frozen={"scale": torch.tensor(2.0)})


def test_the_change_is_the_gated_sum_over_ranks():
    whole = branch([0.5, 0.0, -1.5])
    up_or, down_ri = whole.factors()
    up, gate, down = (whole.trained()[part].detach().numpy() for part in ("up", "gate", "down"))
    by_hand = sum(2.0 * gate[r] * np.outer(up[:, r], down[r]) for r in range(3))
    np.testing.assert_allclose((up_or @ down_ri).detach(), by_hand, atol=1e-6)


@pytest.mark.parametrize("gate", [[0.5, 0.0, -1.5], [0.0, -0.0, 0.0], [1.0, 2.0], [0.0, 1e-30]])
def test_pruning_cuts_out_zero_gates_and_nothing_changes(gate: list[float]):
    whole = branch(gate)
    small = pruned(whole)
    assert not small.trained()
    assert small.up.shape == (6, sum(g != 0 for g in gate))
    layers = []
    for part in (whole, small):
        layers.append(AdaptedLinear(torch.nn.Linear(5, 6)))
        layers[-1].base_oi, layers[-1].bias_o = noise((6, 5), "base"), noise((6,), "bias")
        layers[-1].add("x", part)
    x_ni = noise((7, 5), "x")
    for step in ("live", "finished"):
        for layer in layers:
            if step == "finished":
                layer.finish("x")
            else:
                layer.refold()
        torch.testing.assert_close(layers[0](x_ni), layers[1](x_ni), atol=1e-6, rtol=1e-6)
    assert torch.equal(layers[1].weight_oi, layers[1].base_oi) == (max(map(abs, gate)) < 1e-20)


# ------------------------------------------------------------------------------------------------- whole streams


def test_the_end_of_a_task_changes_no_answer(tmp_path: Path):
    loop = make_loop(tmp_path, gate_start="normal", lam=3.0)
    seen: list[torch.Tensor] = []
    batch = loop.stream[1].test.batch(np.arange(len(loop.stream[1].test)))
    end = loop.method.end

    def watched(*arguments: Any) -> None:
        with torch.no_grad():
            before = loop.method.predict(loop.learner, batch)
            live = gated(loop.learner)
            assert any((b.gate == 0).any() for b in live)
            assert all((b.gate != 0).any() for b in live)
            end(*arguments)
            assert not gated(loop.learner)
            seen.append(loop.method.predict(loop.learner, batch))
        torch.testing.assert_close(seen[-1], before, atol=1e-5, rtol=1e-5)

    loop.method.end = watched  # type: ignore[method-assign]
    loop.run()
    assert len(seen) == 2


def test_the_stronger_lambda_the_fewer_ranks(tmp_path: Path):
    kept = []
    for lam in (0.0, 3.0, 9.0):
        loop = make_loop(tmp_path / str(lam), lam=lam, gate_start="normal")
        loop.run()
        kept.append(sum(ranks(loop.learner)))
        held = sum(
            f.up_or.numel() + f.down_ri.numel() for s in loop.learner.sites.values() for f in s.finished().values()
        )
        head = sum(p.numel() for p in loop.learner.head.parameters())
        assert loop.learner.stored_parameters() == held + head
        assert loop.state.lineage[1].stored_parameters == held + head
    assert kept[0] == 4 * 2 * 4, "nothing is pruned without λ: 4 ranks, 2 tasks, 4 maps"
    assert kept[0] > kept[1] > kept[2] > 0


def test_where_every_rank_is_pruned_it_is_the_bare_backbone_saved_restored_and_folded(tmp_path: Path):
    loop = make_loop(tmp_path, lam=1e6, threshold="constant", warmup=0.5)
    loop.run()
    assert ranks(loop.learner) == [0] * 8
    again = make_loop(tmp_path)
    again.restore()
    assert ranks(again.learner) == [0] * 8
    ours, theirs = again.learner.tensors(), loop.learner.tensors()
    assert all(torch.equal(ours[name], value) and ours[name].shape == value.shape for name, value in theirs.items())
    batch = loop.stream[0].test.batch(np.arange(8))
    bare = Learner(tiny_vit(blocks=2)).features(batch)
    for learner in (loop.learner, again.learner):
        assert all(torch.equal(layer.weight_oi, layer.base_oi) for layer in learner.layers.values())
        with learner.folded():
            assert torch.equal(learner.features(batch), bare)


def test_a_process_that_dies_after_all_is_pruned_goes_on(tmp_path: Path):
    """From every state saved on the way, finished branches of rank 0 and live gates of 0 among them."""
    keep, checkpoint.KEEP = checkpoint.KEEP, 10**6
    try:
        loop = make_loop(tmp_path / "whole", lam=1e6, warmup=0.5)
        loop.checkpoint_seconds = 0.0
        loop.run()
    finally:
        checkpoint.KEEP = keep
    saved = sorted(p for p in (tmp_path / "whole").iterdir() if not p.name.startswith("."))
    for number in (len(saved) // 2, len(saved) - 4):
        (tmp_path / str(number)).mkdir()
        saved[number].rename(tmp_path / str(number) / saved[number].name)
        again = make_loop(tmp_path / str(number), lam=1e6, warmup=0.5)
        again.restore()
        again.run()
        ours, theirs = again.learner.tensors(), loop.learner.tensors()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_weight_decay_leaves_gates_alone(tmp_path: Path, kind: Any):
    """In the engine: in the first step up is 0, no gradient reaches the gates, and a decayed one would leave 1."""
    training = TrainingConfig(optimizer=kind, lr=0.1, weight_decay=0.5, batch_size=16, epochs=1)
    loop = make_loop(tmp_path, training, lam=0.0, gate_start="ones")
    gates: list[list[float]] = []
    step = loop.method.after_step

    def watched(learner: Learner, at: Step) -> None:
        step(learner, at)
        gates.extend(branch.gate.tolist() for branch in gated(learner) if at.done == 0)

    loop.method.after_step = watched  # type: ignore[method-assign]
    loop.run()
    assert gates == [[1.0] * 4] * 8, "4 maps, 2 tasks"
