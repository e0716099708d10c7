"""SD-LoRA (Wu et al., ICLR 2025) against its formula, written out in numpy, and against a truly shared scale.

Shape letters: n examples, o outputs, i inputs, r rank, t tasks.
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
from lamina.learner import Learner
from lamina.methods.sdlora import SHARED, Directions, SDLoRA, SDLoRAConfig, norm_of, rank_of_task, share_gradient

TRAINING = TrainingConfig(epochs=2, batch_size=16, lr=0.05, head_lr=0.05, optimizer="sgd", schedule="constant")


class Watched(SDLoRA):
    """Keeps what the formula needs: the factors of every task as they were when it ended."""

    def end(self, learner: Learner, task: Any, batches: Any) -> None:
        super().end(learner, task, batches)
        self.ended = [*getattr(self, "ended", []), {name: copied(site) for name, site in learner.sites.items()}]


def copied(site: Any) -> dict[str, np.ndarray]:
    return {part: value.detach().numpy().copy() for part, value in site.live()[SHARED].trained().items()}


def make_loop(folder: Path, training: TrainingConfig = TRAINING, tasks: int = 3, **settings: Any) -> Loop:
    data = tiny_images(24 * tasks, classes=2 * tasks)
    return Loop(
        learner=Learner(tiny_vit(blocks=2), ("q", "fc1")),
        method=Watched(SDLoRAConfig(**{"rank": 3} | settings)),
        stream=make_stream(data, class_plan(data, tasks), "class"),
        training=training,
        evaluation=EvaluationConfig(),
        seed=0,
        checkpoints=folder,
    )


def begin(loop: Loop, number: int) -> None:
    task = loop.stream[number]
    torch.manual_seed(number)
    loop.method.begin(loop.learner, task, loop.pass_over("begin", task))


def move(learner: Learner, key: str) -> None:
    """As if training had moved every factor."""
    with torch.no_grad():
        for site in learner.sites.values():
            for part, value in site.live()[SHARED].trained().items():
                if part != "scale":
                    value.copy_(noise(tuple(value.shape), key, site.name, part))


def ready(folder: Path, tasks: int, **settings: Any) -> Loop:
    """In the middle of the last of these tasks: its factors and the older ones have all moved."""
    loop = make_loop(folder, tasks=tasks, **settings)
    for number in range(tasks):
        begin(loop, number)
        move(loop.learner, f"task {number}")
    return loop


def loss(loop: Loop, number: int) -> Tensor:
    task = loop.stream[number]
    return loop.method.loss(loop.learner, task.train.batch(np.arange(8)), task)


# -------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("norm", ["released", "paper"])
@pytest.mark.parametrize("carry", [False, True])
def test_the_folded_weight_is_the_sum_of_the_formula(tmp_path: Path, norm: str, carry: bool):
    """After three trained tasks, from the factors as each task left them."""
    loop = make_loop(tmp_path, norm=norm, carry=carry)
    loop.run()
    *finished, last = loop.method.ended
    for name, site in loop.learner.sites.items():
        scales = last[name]["scale"]
        weight_oi = site.layer.base_oi.double().numpy().copy()
        for k, parts in enumerate(finished):
            up_or, down_ri = parts[name]["up"].astype(float), parts[name]["down"].astype(float)
            direction_oi = up_or @ down_ri
            lengths = {
                "paper": np.sqrt((direction_oi**2).sum()),
                "released": np.sqrt((up_or**2).sum() * (down_ri**2).sum()),
            }
            weight_oi += scales[k] * direction_oi / lengths[norm]
        weight_oi += scales[-1] * last[name]["up"].astype(float) @ last[name]["down"]
        with loop.learner.folded():
            np.testing.assert_allclose(site.layer.weight_oi, weight_oi, atol=1e-6)
        assert np.abs(weight_oi - site.layer.base_oi.numpy()).max() > 1e-3, "there is something to compare"


@pytest.mark.parametrize("norm", ["released", "paper"])
def test_a_direction_is_divided_by_its_norm(norm: Any):
    up_or, down_ri = noise((6, 3), "up"), noise((3, 5), "down")
    length = norm_of(up_or, down_ri, norm)
    product_oi = (up_or @ down_ri).numpy()
    if norm == "paper":
        assert np.linalg.norm(product_oi / length.item()) == pytest.approx(1, abs=1e-6)
    else:
        assert length.item() == pytest.approx(np.linalg.norm(up_or) * np.linalg.norm(down_ri), rel=1e-6)
        assert np.linalg.norm(product_oi / length.item()) < 1
    assert torch.count_nonzero(torch.zeros(6, 3) / norm_of(torch.zeros(6, 3), down_ri, norm)) == 0


def test_one_task_with_scale_one_is_plain_lora():
    """Outputs to the bit, gradients too."""
    up_or, down_ri, x_ni = noise((6, 3), "up"), noise((3, 5), "down"), noise((7, 5), "x")
    branches = (
        LowRank(trained={"up": up_or, "down": down_ri}),
        Directions(trained={"up": up_or, "down": down_ri, "scale": torch.ones(1)}),
    )
    outputs = []
    for branch in branches:
        layer = AdaptedLinear(nn.Linear(5, 6))
        layer.base_oi, layer.bias_o = noise((6, 5), "base"), noise((6,), "bias")
        layer.add("x", branch)
        layer.refold()
        outputs.append(layer(x_ni))
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    for part in ("up", "down"):
        assert torch.equal(*(branch.trained()[part].grad for branch in branches))


def test_a_stream_of_one_task_with_a_held_scale_of_one_trains_as_plain_lora(tmp_path: Path, monkeypatch: Any):
    loop = make_loop(tmp_path, tasks=1, scale=1.0)
    monkeypatch.setattr(
        SDLoRA,
        "after_backward",
        lambda _, learner: [s.live()[SHARED].scale.grad.zero_() for s in learner.sites.values()],
    )
    plain = make_loop(tmp_path / "plain", tasks=1)
    monkeypatch.setattr(plain.method, "after_backward", lambda learner: None)
    start = plain.method.begin

    def begin_plain(learner: Learner, task: Any, batches: Any) -> None:
        start(learner, task, batches)
        for site in learner.sites.values():
            ours = site.live()[SHARED].trained()
            site.replace(SHARED, LowRank(trained={"up": ours["up"], "down": ours["down"]}))

    monkeypatch.setattr(plain.method, "begin", begin_plain)
    loop.run()
    plain.run()
    for name, site in loop.learner.sites.items():
        for ours, theirs in zip(
            site.live()[SHARED].factors(), plain.learner.sites[name].live()[SHARED].factors(), strict=True
        ):
            assert torch.equal(ours, theirs)
            assert torch.count_nonzero(ours) > 0


# ----------------------------------------------------------------------------------------------- one shared scale


def test_the_gradient_reaches_every_scale_and_no_old_factor(tmp_path: Path):
    loop = ready(tmp_path, 3)
    loss(loop, 2).backward()
    loop.method.after_backward(loop.learner)
    for site in loop.learner.sites.values():
        branch = site.live()[SHARED]
        assert branch.scale.shape == branch.scale.grad.shape == (3,)
        assert (branch.scale.grad.abs() > 1e-6).all()
        assert set(branch.trained()) == {"up", "down", "scale"}
        assert set(branch.frozen()) == {"up1", "down1", "up2", "down2"}
        assert all(value.grad is None and not value.requires_grad for value in branch.frozen().values())


def test_the_gradient_of_the_copies_is_that_of_one_shared_scale(tmp_path: Path):
    """Shared in earnest: the same parameter in every site, whose gradient autograd adds up itself."""
    loop, truth = ready(tmp_path, 3), ready(tmp_path, 3)
    truth.learner.head.load_state_dict(loop.learner.head.state_dict())
    shared = nn.Parameter(torch.full((3,), 0.8))
    for site in truth.learner.sites.values():
        site.live()[SHARED].scale = shared
    loss(loop, 2).backward()
    loss(truth, 2).backward()
    copies = [site.live()[SHARED].scale for site in loop.learner.sites.values()]
    apart = [copy.grad.clone() for copy in copies]
    loop.method.after_backward(loop.learner)
    for copy in copies:
        torch.testing.assert_close(copy.grad, shared.grad, atol=1e-6, rtol=1e-5)
        assert torch.equal(copy.grad, copies[0].grad)
    assert not torch.allclose(apart[0], shared.grad, rtol=1e-2), "one site's own share is not the gradient"


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_copies_stay_equal_to_the_bit_and_follow_the_shared_scale(tmp_path: Path, kind: Any):
    """A whole second task by the engine, beside a plain loop in which one parameter serves all sites."""
    training = TrainingConfig(epochs=3, batch_size=16, lr=0.02, head_lr=0.05, optimizer=kind, schedule="constant")
    loop = make_loop(tmp_path, training, tasks=2)
    trajectory: list[Tensor] = []
    step = loop.method.after_step

    def watch(learner: Learner, at: Any) -> None:
        step(learner, at)
        copies = [site.live()[SHARED].scale.detach().clone() for site in learner.sites.values()]
        assert all(torch.equal(copy, copies[0]) for copy in copies)
        trajectory.append(copies[0])

    loop.method.after_step = watch  # type: ignore[method-assign]
    loop.run()

    truth = make_loop(tmp_path / "truth", training, tasks=2)
    begin_phase = truth.method.begin
    made: list[nn.Parameter] = []

    def share(learner: Learner, task: Any, batches: Any) -> None:
        begin_phase(learner, task, batches)
        made.append(nn.Parameter(torch.full((len(made) + 1,), 0.8)))
        for site in learner.sites.values():
            site.live()[SHARED].scale = made[-1]
        whole = type(learner).trainable
        learner.trainable = lambda: unique(whole(learner))  # type: ignore[method-assign]

    truth.method.begin = share  # type: ignore[method-assign]
    truth.method.after_backward = lambda learner: None  # type: ignore[method-assign]
    shared: list[Tensor] = []
    truth.method.after_step = lambda learner, at: shared.append(made[-1].detach().clone())  # type: ignore[method-assign]
    truth.save = lambda: None  # type: ignore[method-assign]  # a checkpoint holds no tensor twice
    truth.run()
    assert len(trajectory) == len(shared) > 6
    for ours, theirs in zip(trajectory, shared, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (trajectory[-1] - 0.8).abs().min() > 1e-4, "they moved"


def unique(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return dict({id(p): (name, p) for name, p in parameters.items()}.values())


def test_sharing_sums_the_copies():
    copies = [torch.zeros(2, requires_grad=True) for _ in range(3)]
    for number, copy in enumerate(copies):
        copy.grad = torch.tensor([1.0, 10.0]) * 2**number
    share_gradient(copies)
    assert [copy.grad.tolist() for copy in copies] == [[7.0, 70.0]] * 3
    assert len({copy.grad.data_ptr() for copy in copies}) == 3


# ------------------------------------------------------------------------------------------------ tasks and growth


def test_scales_start_anew_or_are_carried_over(tmp_path: Path):
    for carry, expected in ((False, [0.8, 0.8, 0.8]), (True, [0.3, -0.2, 0.8])):
        loop = ready(tmp_path, 2, carry=carry)
        for site in loop.learner.sites.values():
            site.live()[SHARED].scale.data = torch.tensor([0.3, -0.2])
        loop.stream = make_loop(tmp_path).stream
        begin(loop, 2)
        for site in loop.learner.sites.values():
            assert site.live()[SHARED].scale.tolist() == pytest.approx(expected)


def test_it_grows_by_a_direction_and_a_copy_of_a_scale_per_map_and_task(tmp_path: Path):
    loop = make_loop(tmp_path)
    loop.run()
    sites = loop.learner.sites.values()
    per_task = sum((site.d_in + site.d_out) * 3 + 1 for site in sites)
    head = 2 * (32 + 1)
    assert [entry.stored_parameters for entry in loop.state.lineage] == [t * (per_task + head) for t in (1, 2, 3)]
    assert [entry.trainable_parameters for entry in loop.state.lineage] == [
        per_task + head + t * len(sites) for t in (0, 1, 2)
    ]
    assert not loop.method.memory


def test_finished_directions_never_change(tmp_path: Path):
    loop = make_loop(tmp_path)
    loop.run()
    first, second, _ = loop.method.ended
    for name, site in loop.learner.sites.items():
        frozen = site.live()[SHARED].frozen()
        for number, ended in ((1, first), (2, second)):
            assert np.array_equal(frozen[f"down{number}"], ended[name]["down"])
            length = norm_of(torch.tensor(ended[name]["up"]), torch.tensor(ended[name]["down"]), "released")
            assert torch.equal(frozen[f"up{number}"], torch.tensor(ended[name]["up"]) / length)


def test_the_rank_falls_at_the_milestones(tmp_path: Path):
    released = ((5, 8), (9, 6))
    assert [rank_of_task(number, 10, released) for number in range(1, 12)] == [10] * 4 + [8] * 4 + [6] * 3
    assert [rank_of_task(number, 10, released[::-1]) for number in (1, 5, 9)] == [10, 8, 6]
    assert rank_of_task(7, 10, ()) == 10
    loop = make_loop(tmp_path, falling=[[2, 2], [3, 1]])
    loop.run()
    for site in loop.learner.sites.values():
        branch = site.live()[SHARED]
        assert [part.shape[1] for part in (*branch.old("up"), branch.up)] == [3, 2, 1]
    again = make_loop(tmp_path, falling=[[2, 2], [3, 1]])
    again.restore()
    batch = loop.stream[0].test.batch(np.arange(6))
    with loop.learner.folded(), again.learner.folded():
        assert torch.equal(again.learner.features(batch), loop.learner.features(batch))


@pytest.mark.parametrize("falling", [[[0, 3]], [[2, 0]], [[2, 3, 4]], [5]])
def test_milestones_that_make_no_sense_are_refused(falling: Any):
    with pytest.raises(ValueError, match="falling"):
        SDLoRAConfig(falling=falling)
