"""Which methods fit a language model, a scenario, and rehearsal."""

from collections.abc import Mapping
from typing import Any

from lamina.config import RehearsalConfig
from lamina.errors import MethodError
from lamina.learner import LanguageLearner, Learner
from lamina.methods.base import Method


def check_method_for_language(
    method: type[Method[Any]], backbone: str, known: Mapping[str, type[Method[Any]]] | None = None
) -> None:
    """Raises MethodError where a method needs a classifier: the language model of this name has none. known: methods to
    choose from."""
    if method.refuses_language:
        fitting = [name for name, one in (known or {}).items() if not one.refuses_language]
        raise MethodError(
            f"method {method.name!r} cannot adapt the language model {backbone!r}: {method.refuses_language}. Choose "
            + (f"one of {', '.join(fitting)}." if fitting else "another method.")
        )


def check_scenario_for_language(scenario: str) -> None:
    """Raises MethodError for a stream of classes, which a language model cannot learn."""
    if scenario in ("class", "task"):
        raise MethodError(
            f"stream.scenario = {scenario!r}: the tasks of a language model are whole domains, because it has no outputs that "
            f"a task could add classes to. Choose domain, or mixed with whole domains."
        )


def check_language(learner: Learner, method: Method[Any], scenario: str) -> None:
    """Raises MethodError for a language model with a method that needs a classifier, or with a stream of classes."""
    if learner.generates:
        check_method_for_language(type(method), learner.backbone.name)
        check_scenario_for_language(scenario)
    if isinstance(learner, LanguageLearner) and learner.recompute and method.routes_training:
        raise MethodError(
            f"training.gradient_checkpointing does not go with method {method.name!r}, which selects adapters within a step. "
            f"Leave it out."
        )


def check_rehearsal(rehearsal: RehearsalConfig, method: type[Method[Any]]) -> None:
    """Raises MethodError where examples would be kept for a method that trains nothing."""
    if rehearsal.per_class and not method.trains_on(1):
        raise MethodError(
            f"rehearsal.per_class = {rehearsal.per_class} does not go with method {method.name!r}: it trains nothing after the "
            f"first task, so old examples would never be used. Leave it at 0."
        )
