"""Schedules against their formulas; optimisers whose state, saved and restored, goes on to the same bits."""

import math

import pytest
import torch
from tests.tiny import noise
from torch import nn

from lamina.config import TrainingConfig
from lamina.engine.optim import for_task, make_optimizer, optimizer_tensors, rate_factor, restore_optimizer, set_rate

NAMES = ("block0.k/t/up", "block0.k/t/down", "head/t/weight")


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(noise((3, 2), name)) for name in NAMES}


def steps(found: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        set_rate(optimizer, 1 / (1 + number))
        for name, parameter in found.items():
            parameter.grad = noise((3, 2), name, "gradient", number)
        optimizer.step()


SCHEDULES = {
    "constant": lambda e, k: 1.0,
    "cosine": lambda e, k: 0.5 * (1 + math.cos(math.pi * e / k)),
    "quarter-cosine": lambda e, k: math.cos(99 * math.pi * e / (200 * (k - 1))) if k > 1 else 1.0,
    "step": lambda e, k: 0.5 ** ((e >= 3) + (e >= 5)),
}


@pytest.mark.parametrize("epochs", [1, 2, 7, 50])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_their_formulas(schedule: str, epochs: int):
    config = TrainingConfig(schedule=schedule, epochs=epochs, milestones=(3, 5), gamma=0.5)
    for epoch in range(epochs):
        assert rate_factor(config, epoch) == pytest.approx(SCHEDULES[schedule](epoch, epochs), abs=1e-15)
    assert rate_factor(config, 0) == 1


def test_the_quarter_cosine_ends_where_the_released_code_ends():
    assert rate_factor(TrainingConfig(epochs=20), 19) == pytest.approx(0.0157, abs=5e-5)
    assert TrainingConfig().schedule == "quarter-cosine"


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("done", [0, 1, 4])
def test_a_restored_optimiser_goes_on_to_the_same_bits(kind: str, done: int):
    config = TrainingConfig(optimizer=kind, weight_decay=0.01, lr=0.1, head_lr=0.3)
    unbroken = parameters()
    optimizer = make_optimizer(unbroken, config)
    steps(unbroken, optimizer, range(done))
    saved = {name: value.clone() for name, value in optimizer_tensors(optimizer, unbroken).items()}
    resumed = {name: nn.Parameter(value.detach().clone()) for name, value in unbroken.items()}
    steps(unbroken, optimizer, range(done, 8))

    again = make_optimizer(resumed, config)
    restore_optimizer(again, resumed, saved)
    steps(resumed, again, range(done, 8))
    assert all(torch.equal(resumed[name], unbroken[name]) for name in NAMES)
    ours, theirs = optimizer_tensors(again, resumed), optimizer_tensors(optimizer, unbroken)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 3 * (1 if kind == "sgd" else 3)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    if done:
        without = {name: nn.Parameter(value.detach().clone()) for name, value in parameters().items()}
        fresh = make_optimizer(without, config)
        steps(without, fresh, range(done, 8))
        assert not any(torch.equal(without[name], unbroken[name]) for name in NAMES)


def test_restoring_copies():
    found = parameters()
    optimizer = make_optimizer(found, TrainingConfig())
    steps(found, optimizer, range(1))
    saved = optimizer_tensors(optimizer, found)
    again = parameters()
    other = make_optimizer(again, TrainingConfig())
    restore_optimizer(other, again, saved)
    before = {name: value.clone() for name, value in saved.items()}
    steps(again, other, range(1, 3))
    assert all(torch.equal(saved[name], before[name]) for name in before)


def test_the_head_has_a_rate_of_its_own():
    found = parameters()
    optimizer = make_optimizer(found, TrainingConfig(lr=0.1, head_lr=0.4))
    set_rate(optimizer, 0.5)
    assert [(group["lr"], len(group["params"])) for group in optimizer.param_groups] == [(0.05, 2), (0.2, 1)]
    assert optimizer.param_groups[1]["params"][0] is found["head/t/weight"]
    set_rate(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.04]), "always of the base rate"
    same = make_optimizer(found, TrainingConfig(lr=0.1, head_lr=None))
    assert [group["lr"] for group in same.param_groups] == [0.1, 0.1]


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_what_is_named_is_not_decayed_and_trained_like_the_others(kind: str):
    config = TrainingConfig(optimizer=kind, weight_decay=0.5, lr=0.1, head_lr=0.4)
    found, all_decayed, none_decayed = parameters(), parameters(), parameters()
    optimizer = make_optimizer(found, config, {"block0.k/t/down", "block9.k/t/gate"})
    assert [(g["base_lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [
        (0.1, 0.5, 1),
        (0.4, 0.5, 1),
        (0.1, 0.0, 1),
    ]
    steps(found, optimizer, range(3))
    steps(all_decayed, make_optimizer(all_decayed, config), range(3))
    steps(none_decayed, make_optimizer(none_decayed, config.model_copy(update={"weight_decay": 0.0})), range(3))
    for name in NAMES:
        like = none_decayed if name == "block0.k/t/down" else all_decayed
        assert torch.equal(found[name], like[name]), name
        assert not torch.equal(all_decayed[name], none_decayed[name]), name


@pytest.mark.parametrize(
    ("kind", "expected"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_optimisers_and_their_settings(kind: str, expected: type):
    optimizer = make_optimizer(parameters(), TrainingConfig(optimizer=kind, weight_decay=0.02, momentum=0.7))
    assert type(optimizer) is expected
    for group in optimizer.param_groups:
        assert group["weight_decay"] == 0.02
        assert group.get("momentum", 0.7) == 0.7
        assert group.get("betas", (0.9, 0.999)) == (0.9, 0.999)
        assert not group.get("amsgrad", False)


@pytest.mark.parametrize(("per_epoch", "epochs"), [(1, 25), (10, 3), (13, 2), (100, 2)])
def test_small_tasks_get_more_epochs(per_epoch: int, epochs: int):
    assert for_task(TrainingConfig(epochs=2, least_steps=25), per_epoch).epochs == epochs
    assert for_task(TrainingConfig(epochs=2), per_epoch).epochs == 2
