"""Continual learning of pre-trained transformers with low-rank adapters. See docs/reading-order.md.

Importing this imports no torch; the names below are loaded when they are first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.3.0"

_WHERE = {
    "AccuracyMatrix": "lamina.maths.metrics",
    "Backbone": "lamina.backbones",
    "Batch": "lamina.types",
    "Branch": "lamina.adapters",
    "LaminaError": "lamina.errors",
    "Learner": "lamina.learner",
    "LowRank": "lamina.adapters",
    "METHODS": "lamina.methods",
    "Method": "lamina.methods.base",
    "Model": "lamina.model",
    "Stream": "lamina.data.streams",
    "Task": "lamina.types",
}
__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'lamina' has no attribute {name!r}")
