"""Limits that depend on the machine and the backbone. A setting beyond them is refused before memory is asked for."""

import os
from collections.abc import Iterator

import psutil

from lamina.backbones import Backbone
from lamina.config import MethodConfig, RunConfig
from lamina.errors import ConfigError

THREADS_PER_CORE = 4
"""More threads than this only wait for each other."""
BYTES_PER_PIXEL = 3 * 4
RIDGE_MATRICES = 6
"""Square float64 matrices of the random features that are held at a time."""


def check_machine(config: RunConfig) -> None:
    """Raises ConfigError for threads and images that this machine has no cores or memory for."""
    cores, memory = os.cpu_count() or 1, psutil.virtual_memory().total
    if config.threads is not None and config.threads > THREADS_PER_CORE * cores:
        raise ConfigError(
            f"threads = {config.threads}: this machine has {cores} cores. Allowed are 1 to {THREADS_PER_CORE * cores}."
        )
    size, batch = config.backbone.image_size, config.training.batch_size
    if size is not None and batch * BYTES_PER_PIXEL * size**2 > memory:
        most = int((memory / batch / BYTES_PER_PIXEL) ** 0.5)
        raise ConfigError(
            f"backbone.image_size = {size}: a batch of {batch} such images takes {_gb(batch * BYTES_PER_PIXEL * size**2)}, "
            f"and this machine has {_gb(memory)}. At most {most} fits in memory; backbones take 224 or so."
        )


def check_backbone(config: RunConfig, settings: MethodConfig, backbone: Backbone) -> None:
    """Raises ConfigError for ranks beyond the backbone's width, and features that this machine has no memory for."""
    width = backbone.width
    for name, rank in _ranks(settings):
        if rank > width:
            raise ConfigError(
                f"method.{name} = {rank}: the linear layers of backbone {backbone.name!r} are {width} wide. Allowed are 1 to "
                f"{width}."
            )
    section, memory = config.consolidation, psutil.virtual_memory().total
    layers = min(section.layers, backbone.blocks)
    if section.class_covariance_rank > layers * width:
        raise ConfigError(
            f"consolidation.class_covariance_rank = {section.class_covariance_rank}: with consolidation.layers = "
            f"{section.layers} the features of backbone {backbone.name!r} are {layers * width} wide. Allowed are 0 to "
            f"{layers * width}."
        )
    asked = {"method.random_features": getattr(settings, "random_features", 0)}
    if section.classifier in ("ridge", "lda+ridge", "gram"):
        asked["consolidation.random_features"] = section.random_features
    for key, count in asked.items():
        needed = RIDGE_MATRICES * 8 * count**2
        if needed > memory:
            raise ConfigError(
                f"{key} = {count}: their matrices would take {_gb(needed)}, and this machine has {_gb(memory)}. Allowed are "
                f"1 to {int((memory / RIDGE_MATRICES / 8) ** 0.5)}."
            )


def _ranks(settings: MethodConfig) -> Iterator[tuple[str, int]]:
    """Yields name and value of the settings that are ranks of adapters."""
    for name, value in settings:
        if name == "rank" or name.endswith("_rank"):
            yield name, value


def _gb(count: float) -> str:
    return f"{count / 2**30:,.1f} GB"
