"""A model that keeps learning: a directory with its versions, what they were learnt from, and what each has changed."""

from lamina.model.card import Card, Facts
from lamina.model.gate import GateResult
from lamina.model.language import Asked, Completion, LanguagePredictor, Ranked
from lamina.model.learning import GateRefused, Learnt
from lamina.model.model import Evaluation, Model
from lamina.model.predictor import Guess, Prediction, Predictor
from lamina.model.store import Store

__all__ = [
    "Asked",
    "Card",
    "Completion",
    "Evaluation",
    "Facts",
    "GateRefused",
    "GateResult",
    "Guess",
    "LanguagePredictor",
    "Learnt",
    "Model",
    "Prediction",
    "Predictor",
    "Ranked",
    "Store",
]
