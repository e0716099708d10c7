"""Optimisers and learning-rate schedules of the papers. Every task starts with a new optimiser."""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lamina.config import TrainingConfig


def make_optimizer(
    parameters: Mapping[str, nn.Parameter],
    config: TrainingConfig,
    undecayed: Collection[str] = (),
    *,
    later: bool = False,
) -> torch.optim.Optimizer:
    """Returns an optimiser with up to three groups, each with its base rate as `base_lr`: the adapters, the head (names
    starting with `head/`), and parameters excluded from weight decay (`undecayed`, by name).

    later: whether the task is not the first. Fused, since dozens of small matrices take longer to launch than to compute."""
    adapter_lr = adapter_rate(config, later=later)
    head = {name for name in parameters if name.startswith("head/")}
    head_lr = config.head_lr if config.head_lr is not None else config.lr
    groups = [
        {"params": [parameters[name] for name in parameters if name in names], "lr": lr, "base_lr": lr} | decay
        for names, lr, decay in (
            (parameters.keys() - head - set(undecayed), adapter_lr, {}),
            (head, head_lr, {}),
            (undecayed, adapter_lr, {"weight_decay": 0.0}),
        )
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay, fused=True)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, betas=(0.9, 0.999), weight_decay=config.weight_decay, fused=True)


def for_task(config: TrainingConfig, per_epoch: int) -> TrainingConfig:
    """Returns the settings for a task with this many steps per epoch: with more epochs where `least_steps` asks for them."""
    return config.model_copy(update={"epochs": max(config.epochs, math.ceil(config.least_steps / per_epoch))})


def adapter_rate(config: TrainingConfig, *, later: bool) -> float:
    """Returns the base learning rate of the adapters. later: whether the task is not the first."""
    return config.lr * (config.later_lr if later else 1.0)


def total_rate(config: TrainingConfig, per_epoch: int, *, later: bool) -> float:
    """Returns the sum of the adapters' learning rates over all steps of a task. per_epoch: its steps per epoch."""
    factors = (rate_factor(config, epoch) for epoch in range(config.epochs))
    return adapter_rate(config, later=later) * per_epoch * sum(factors)


def rate_factor(config: TrainingConfig, epoch: int) -> float:
    """Returns the factor of the base rate in this epoch of a task (0-based)."""
    last = max(config.epochs - 1, 1)
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * epoch / config.epochs)) / 2
    if config.schedule == "quarter-cosine":  # InfLoRA's utils/schedulers.py: cos(99 pi e / (200 (K - 1)))
        return math.cos(99 * math.pi * epoch / (200 * last))
    if config.schedule == "step":
        return config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    return 1.0


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Returns the optimiser's state by parameter name: `exp_avg:block0.k/task-01/up`."""
    return {
        f"{kind}:{name}": value.detach()
        for name, parameter in parameters.items()
        for kind, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    for key, value in tensors.items():
        kind, _, name = key.partition(":")
        optimizer.state[parameters[name]][kind] = value.to(parameters[name].device, copy=True)
