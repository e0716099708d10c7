"""Low-rank adapters: branches, and the one layer that holds them."""

from lamina.adapters.adapted_linear import AdaptedLinear, all_folded, bare, inject
from lamina.adapters.low_rank import Branch, Finished, LowRank, OutputRange, Update
from lamina.adapters.mixture import Mixture, Router

__all__ = [
    "AdaptedLinear",
    "Branch",
    "Finished",
    "LowRank",
    "Mixture",
    "OutputRange",
    "Router",
    "Update",
    "all_folded",
    "bare",
    "inject",
]
