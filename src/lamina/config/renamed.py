"""Settings of older versions of lamina. They are refused with the name to use instead, or the reason why they went."""

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "consolidation.merge": "consolidation.merging",
    "consolidation.head": "consolidation.classifier",
    "consolidation.own_rank": "consolidation.class_covariance_rank",
    "stream.joined": "stream.joint",
    "method.horizon": "method.task_count",
}
RENAMED_VALUES: dict[tuple[str, Any], str] = {
    ("consolidation.classifier", "local"): "own",
    ("consolidation.drift", "oracle"): "remeasured",
}
REMOVED = {
    "consolidation.gamma": "the weight of a new task in a merge is fixed, since no result table used another",
    "consolidation.floor": "the least weight of a new task in a merge is fixed, since no result table used another",
    "consolidation.shrinkage": "the shrinkage is always chosen by its sampling error (OAS)",
    "training.distil": "self-distillation doubled the time of a step and improved no result",
    "backbone.reuse_mb": "the feature cache is gone",
    "data.views": "it served the feature cache, which is gone",
    "method.basis_norm": "DualLoRA's bases always have the norm of InfLoRA's released code",
    "method.merge": "task arithmetic always adds the scaled updates, since no result table used another merge",
    "method.density": "it served other merges than the scaled sum, which are gone",
    "method.head": "every task keeps its own outputs, not scaled",
    "keep_chain": "the benchmarks of consolidation keep what they need themselves",
}
OTHER_METHODS = {"lamina": "random_features"}
"""Methods that were other ones in older versions, and a setting that only the present ones have."""


def is_other_method(method: Mapping[str, Any]) -> bool:
    """Whether complete settings, as they are stored, are of another method that once had this name."""
    name = method.get("name")
    return name in OTHER_METHODS and OTHER_METHODS[str(name)] not in method


def made_before(method: Mapping[str, Any]) -> str:
    """Returns what to say of a directory with such settings, after its name."""
    return f"was made before lamina 0.3, when {method['name']!r} was a different method."


def advice(key: str, value: object) -> str | None:
    """Returns what to say about a setting of an older version; None for a setting that never existed."""
    if key in RENAMED:
        new = RENAMED[key]
        value = RENAMED_VALUES.get((new, value), value) if isinstance(value, str) else value
        return f"this setting is now called {new}. Write {new} = {value!r}."
    if key in REMOVED:
        return f"this setting was removed: {REMOVED[key]}. Leave it out."
    return None
