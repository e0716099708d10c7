"""Which methods fit a language model, a scenario, and rehearsal."""

from typing import Any

from lamina.config import RehearsalConfig
from lamina.errors import MethodError
from lamina.learner import LanguageLearner, Learner
from lamina.methods.base import Method


def check_language(learner: Learner, method: Method[Any], scenario: str) -> None:
    """Raises MethodError for a language model with a method that needs a classifier, or with a stream of classes."""
    if learner.generates and method.refuses_language:
        raise MethodError(
            f"method {method.name!r} cannot adapt the language model {learner.backbone.name!r}: {method.refuses_language}. "
            f"Choose another method; `lamina methods` lists them."
        )
    if scenario in ("class", "task") and learner.generates:
        raise MethodError(
            f"stream.scenario = {scenario!r}: the tasks of a language model are domains, because the options of an example are "
            f"those of its whole domain. Choose domain, or mixed with whole domains."
        )
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
