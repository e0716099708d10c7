"""The configuration of a run: its settings, how they are read, and their fingerprint."""

from lamina.config.fingerprint import fingerprint
from lamina.config.reading import OF_A_CLASSIFIER, check, explain, listed, load, parse_override, put, unknown, with_line
from lamina.config.schema import (
    BackboneConfig,
    Columns,
    ConsolidationConfig,
    DataConfig,
    EvaluationConfig,
    MethodConfig,
    PlanConfig,
    RehearsalConfig,
    Role,
    RunConfig,
    Section,
    StreamConfig,
    TrainingConfig,
)
from lamina.config.yaml_text import Loader, read_yaml, to_yaml

__all__ = [
    "OF_A_CLASSIFIER",
    "BackboneConfig",
    "Columns",
    "ConsolidationConfig",
    "DataConfig",
    "EvaluationConfig",
    "Loader",
    "MethodConfig",
    "PlanConfig",
    "RehearsalConfig",
    "Role",
    "RunConfig",
    "Section",
    "StreamConfig",
    "TrainingConfig",
    "check",
    "explain",
    "fingerprint",
    "listed",
    "load",
    "parse_override",
    "put",
    "read_yaml",
    "to_yaml",
    "unknown",
    "with_line",
]
