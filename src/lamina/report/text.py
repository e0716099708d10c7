"""Formatting of numbers. A missing value (None or nan) is an en dash."""

import math
from typing import Any

from jinja2 import Undefined

from lamina.maths.metrics import wilson_interval

DASH = "–"


def known(value: Any) -> bool:
    """False for None, for nan, and for a key that the template did not find."""
    return (
        value is not None and not isinstance(value, Undefined) and not (isinstance(value, float) and math.isnan(value))
    )


def signed(text: str) -> str:
    """With a real minus sign, and without one on a zero."""
    return text.replace("-", "−") if any(c in "123456789" for c in text) else text.replace("-", "")


def percent(share: float | None, digits: int = 1) -> str:
    return signed(f"{100 * share:.{digits}f} %") if share is not None and known(share) else DASH


def points(share: float | None) -> str:
    """A difference of two accuracies."""
    return signed(f"{100 * share:.1f}") + " points" if share is not None and known(share) else DASH


def interval(correct: int, total: int) -> str:
    low, high = wilson_interval(correct, total)
    return f"{100 * low:.1f} to {100 * high:.1f} %" if total else DASH


def seconds(value: float | None) -> str:
    if value is None or not known(value):
        return DASH
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def scaled(value: float | None, unit: str = "") -> str:
    """Three figures and a decimal prefix: 4.05 M, 120 kB."""
    if value is None or not known(value):
        return DASH
    power = next((p for p in (4, 3, 2, 1) if abs(value) >= 999.5 * 1000 ** (p - 1)), 0)
    number = f"{value:g}" if power == 0 else f"{value / 1000**power:#.3g}".rstrip(".")
    prefix = ("", "k", "M", "G", "T")[power] if unit else ("", "k", "M", "billion", "trillion")[power]
    return f"{number} {prefix}{unit}".rstrip()


def number(value: Any, digits: int = 3) -> str:
    return signed(f"{value:.{digits}g}") if known(value) and isinstance(value, int | float) else DASH


def count(how_many: int, thing: str) -> str:
    return f"{how_many} {thing}" + ("" if how_many == 1 else "es" if thing.endswith("s") else "s")


def plain(value: Any) -> str:
    return str(value) if known(value) and value != "" else DASH
