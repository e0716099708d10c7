"""The settings of a model: how they are read, and which may change once something is learnt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lamina import config as configuration
from lamina.backbones import Kind, is_language
from lamina.config import ModelConfig
from lamina.engine.fitting import check_method_for_language
from lamina.errors import ConfigError
from lamina.methods import METHODS
from lamina.runs.setup import method_settings

FIXED = (
    *("method", "consolidation", "precision", "backbone.targets", "backbone.blocks"),
    *("backbone.image_size", "backbone.pooling", "backbone.mean", "backbone.std"),
    *("data.kind", "data.max_length", "data.evaluate"),
)
"""What cannot change after a model is made, since its weights depend on it."""


def load_model_config(
    file: Path | None, overrides: Sequence[tuple[str, Any]], *, base: ModelConfig | None = None
) -> ModelConfig:
    """Returns the settings of a YAML file, with `key.path` = value on top; or those of `base` with these changed.

    Raises ConfigError listing every error.
    """
    given = list(overrides)
    if base is not None:
        given = [*base.model_dump(mode="json").items(), *given]
    config = configuration.load(
        file, given, method_settings=method_settings(), schema=ModelConfig, is_language=is_language
    )
    if config.stream.scenario == "domain" and is_language(config.backbone.name):  # the default of language models
        config = config.model_copy(update={"stream": config.stream.model_copy(update={"scenario": "class"})})
    if config.stream != configuration.StreamConfig(validation=config.stream.validation):
        raise ConfigError(
            "stream: a model has no stream in advance; its tasks come with `lamina learn`. Of this section, only "
            "stream.validation applies."
        )
    if config.evaluation.split != "test" or config.jobs != 1:
        raise ConfigError(
            "evaluation.split and jobs: a model measures on held-out examples (test), and learns one task at a time. "
            "Leave both out."
        )
    return config


def refuse_fixed(old: ModelConfig, new: ModelConfig, where: Path) -> None:
    """Raises ConfigError where a setting differs that the weights of a model depend on."""
    for key, then, now in configuration.differences(old.model_dump(mode="json"), new.model_dump(mode="json")):
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED):
            raise ConfigError(
                f"{key} = {now!r}: the weights of {where} depend on it, and it is {then!r} there. Leave it out; it can be "
                "chosen when a model is made (`lamina create`)."
            )


def refuse_method(given: Mapping[str, Any], old: ModelConfig, where: Path) -> None:
    """Raises ConfigError for another method than the model has, before its settings are judged as those of that method."""
    own = old.method["name"]
    if given.get("method.name", own) != own:
        raise ConfigError(
            f"method.name = {given['method.name']!r}: the method of {where} is {own}, and cannot change. Leave it out; `lamina "
            "create` makes a model with another one."
        )


def refuse_inapplicable(config: ModelConfig, kind: Kind) -> None:
    """Raises MethodError for a method that does not fit this kind of backbone, ConfigError for a limit of the gate that is not
    measured for it."""
    limit = config.gate.calibration_error
    if kind == "language":
        check_method_for_language(METHODS[config.method["name"]], config.backbone.name, METHODS)
    if kind == "language" and limit is not None:
        raise ConfigError(
            f"gate.calibration_error = {limit}: the model is a language model, whose calibration is not measured. Leave it out "
            "(null); gate.task_drop, class_drop, negative_flips, new_accuracy and slowdown apply."
        )
