"""Inline SVG as pure functions of numbers.

Colours are CSS variables of the page (--s0 … --s5 for runs, --accent for the run at hand, --heat for the matrix), so
one drawing serves the light and the dark theme. Nothing depends on colour alone: lines also differ by marker and dash.
Text is drawn at 12 units in drawings 400 units wide, which stays legible on a phone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

COLOURS = 6
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "13 4")
MARKERS = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0",
    "M-3-3h6v6h-6z",
    "M0-4.2L4.2 3.2h-8.4z",
    "M0-4.6L4.6 0L0 4.6L-4.6 0z",
    "M0 4.2L4.2-3.2h-8.4z",
    "M-1.3-4h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z",
)
WIDTH, HEIGHT = 400.0, 236.0
LABELS = 12
"""Most lines that get a label at their end; more could not be told apart there."""
LETTERS = 18
"""Most letters of such a label."""
NUMBERED = 15
"""Most tasks for which the matrix has room for numbers in its cells."""

Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""
LETTER = 6.6
"""Upper estimate of the width of a letter in a label, in units of a drawing."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line. `style` picks colour, marker and dash; None is the thin neutral line of one task among many."""

    name: str
    points: Sequence[Point]
    style: int | None = None
    accent: bool = False
    """Use the colour of the run whose section this is, instead of the colour of `style`."""
    label: str | None = None
    """Short name written at the end of the line."""
    markers: bool = True


def tag(name: str, *children: str, **attributes: Any) -> Markup:
    """An element. Attributes named with `_` get `-`; None is left out; floats are rounded to a tenth."""

    def text(value: Any) -> Markup:
        return escape(f"{round(value, 1):g}" if isinstance(value, float) else value)

    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    opening = Markup("").join(Markup(' {}="{}"').format(key, text(value)) for key, value in pairs)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), opening, Markup("").join(children))


def clip(text: str, length: int) -> str:
    """Cut in the middle: the ends of names, where seeds and numbers stand, tell runs apart."""
    tail = length // 2 - 1
    return text if len(text) <= length else text[: length - tail - 1].rstrip() + "…" + text[-tail:]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round positions (1, 2 or 5 times a power of ten) inside [low, high], at most `most` of them."""
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    steps = (power * s for s in (1, 2, 5, 10, 20))
    step = next(s for s in steps if math.floor(high / s) - math.ceil(low / s) < most)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, in the same order, at least `gap` apart and within [low, high] if they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    floor = low
    for i in order:
        placed[i] = max(wanted[i], floor)
        floor = placed[i] + gap
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def colour(style: int | None, accent: bool = False) -> str:
    if accent:
        return "--c:var(--accent)"
    return "--c:var(--soft)" if style is None else f"--c:var(--s{style % COLOURS})"


def marker(style: int, x: float, y: float, tooltip: str | None = None) -> Markup:
    # (style + style // COLOURS): the seventh run repeats the first colour, but not with the same marker.
    inside = [tag("title", escape(tooltip))] if tooltip else []
    path = MARKERS[(style + style // COLOURS) % len(MARKERS)]
    return tag("path", *inside, class_="m", d=path, transform=f"translate({x:.1f} {y:.1f})")


def dash(style: int) -> str | None:
    return DASHES[(style + style // COLOURS) % len(DASHES)] or None


def key(style: int, accent: bool = False) -> Markup:
    """The sample of a line that stands in a legend."""
    line = tag("path", class_="l", d="M1 7H33", stroke_dasharray=dash(style))
    return tag("svg", line, marker(style, 17, 7), width=34, height=14, aria_hidden="true", style=colour(style, accent))


@dataclass(frozen=True)
class Frame:
    """The plotting area in drawing units, and the range of the data in it."""

    x_range: Point
    y_range: Point
    right: float = WIDTH - 12
    left: float = 38.0
    top: float = 26.0
    bottom: float = HEIGHT - 38

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (self.right - self.left) * ((value - low) / (high - low) if high > low else 0.5)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.bottom - (self.bottom - self.top) * ((value - low) / (high - low) if high > low else 0.5)

    def axes(self, x_name: str, y_name: str, whole_x: bool = True, x_ticks: bool = True) -> list[Markup]:
        parts = [tag("text", escape(y_name), class_="a", x=2, y=12)]
        for value in ticks(*self.y_range):
            y = self.y(value)
            parts.append(tag("path", class_="g", d=f"M{self.left:g} {y:.1f}H{self.right:g}"))
            parts.append(tag("text", f"{value:g}".replace("-", "−"), class_="t e", x=self.left - 6, y=y + 4))
        for value in ticks(*self.x_range, 8) if x_ticks else ():
            if not whole_x or value == int(value):
                parts.append(tag("text", f"{value:g}", class_="t c", x=self.x(value), y=self.bottom + 16))
        middle = (self.left + self.right) / 2
        return [*parts, tag("text", escape(x_name), class_="a c", x=middle, y=self.bottom + 33)]


def drawing(title: str, description: str, parts: Sequence[str], **attributes: Any) -> Markup:
    width, height = attributes.get("width", WIDTH), attributes.get("height", HEIGHT)
    named = (tag("title", escape(title)), tag("desc", escape(description)))
    return tag("svg", *named, *parts, viewBox=f"0 0 {width:g} {height:g}", role="img", **attributes)


def lines(
    title: str,
    description: str,
    series: Sequence[Series],
    *,
    x_name: str,
    y_name: str,
    x_range: Point,
    y_range: Point,
    write: Callable[[float], str],
    whole_x: bool = True,
    marks: Sequence[float] = (),
) -> Markup:
    """A line chart. write: the text of one value in its tooltip; marks: x positions of faint upright lines."""
    series = [s for s in series if s.points]
    labelled = [s for s in series if s.label]
    labelled = labelled if len(labelled) <= LABELS else []
    gutter = max((len(clip(s.label or "", LETTERS)) for s in labelled), default=0) * 6.6 + (16 if labelled else 0)
    frame = Frame(x_range, y_range, right=WIDTH - 12 - gutter)
    parts = frame.axes(x_name, y_name, whole_x)
    parts += [tag("path", class_="g b", d=f"M{frame.x(x):.1f} {frame.top:g}V{frame.bottom:g}") for x in marks]
    heights = spread([frame.y(s.points[-1][1]) for s in labelled], 13.5, frame.top, frame.bottom)
    ends = dict(zip((id(s) for s in labelled), heights, strict=True))
    for s in series:
        at = [(frame.x(x), frame.y(y)) for x, y in s.points]
        path = "M" + "L".join(f"{round(x, 1):g} {round(y, 1):g}" for x, y in at)
        thin = s.style is None
        drawn = [
            tag("path", tag("title", escape(s.name)), class_="l thin" if thin else "l", d=path,
                stroke_dasharray=None if s.style is None else dash(s.style))
        ]  # fmt: skip
        if s.style is None:
            drawn.append(tag("circle", class_="m", cx=at[0][0], cy=at[0][1], r=1.8))
        elif s.markers:
            for (x, y), (px, py) in zip(s.points, at, strict=True):
                drawn.append(marker(s.style, px, py, f"{s.name}, {x:g}: {write(y)}"))
        if id(s) in ends and s.label:
            y = ends[id(s)]
            if abs(y - at[-1][1]) > 3 or at[-1][0] < frame.right - 3:
                leader = f"M{at[-1][0] + 5:.1f} {at[-1][1]:.1f}L{frame.right + 8:.1f} {y:.1f}"
                drawn.append(tag("path", class_="leader", d=leader))
            drawn.append(tag("text", escape(clip(s.label, LETTERS)), class_="label", x=frame.right + 10, y=y + 4))
        parts.append(tag("g", *drawn, style=colour(s.style, s.accent)))
    return drawing(title, description, parts, class_="chart")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean with its single values and, if known, its interval."""

    name: str
    values: Sequence[float]
    mean: float
    low: float | None = None
    high: float | None = None
    style: int | None = None


def strips(title: str, description: str, rows: Sequence[Estimate], *, x_range: Point, x_name: str) -> Markup:
    """One line for each row: a faint dot for each value, a marker at the mean, a bar for the interval; names at the left."""
    row, top = 21.0, 10.0
    left = 16 + 6.6 * max(len(clip(r.name, LETTERS)) for r in rows)
    bottom = top + row * len(rows)
    frame = Frame(x_range, (0.0, 1.0), left=left, top=top, bottom=bottom)
    parts: list[Markup] = []
    for value in ticks(*x_range, 7):
        x = frame.x(value)
        parts.append(tag("path", class_="g", d=f"M{x:.1f} {top:g}V{bottom:g}"))
        parts.append(tag("text", f"{value:g}", class_="t c", x=x, y=bottom + 16))
    parts.append(tag("text", escape(x_name), class_="a c", x=(frame.left + frame.right) / 2, y=bottom + 33))
    for number, one in enumerate(rows):
        y = top + row * (number + 0.5)
        said = f"{one.name}: {one.mean:.1f}" + (
            "" if one.low is None else f", interval {one.low:.1f} to {one.high:.1f}"
        )
        drawn = [tag("title", escape(said))]
        drawn.append(tag("text", escape(clip(one.name, LETTERS)), class_="t e", x=left - 8, y=y + 4))
        if one.low is not None and one.high is not None:
            drawn.append(tag("path", class_="l", d=f"M{frame.x(one.low):.1f} {y:.1f}H{frame.x(one.high):.1f}"))
        drawn += [tag("circle", class_="dot", cx=frame.x(value), cy=y, r=3.4) for value in one.values]
        drawn.append(tag("path", class_="l", d=f"M{frame.x(one.mean):.1f} {y - 6:.1f}V{y + 6:.1f}"))
        parts.append(tag("g", *drawn, style=colour(one.style)))
    return drawing(title, description, parts, height=bottom + 42, class_="chart")


@dataclass(frozen=True, kw_only=True)
class Spot:
    """A point of a scatter chart."""

    name: str
    x: float
    y: float
    style: int | None = None
    labelled: bool = False


def scatter(
    title: str,
    description: str,
    spots: Sequence[Spot],
    *,
    y_range: Point,
    x_name: str,
    y_name: str,
    front: Sequence[Point],
) -> Markup:
    """Points over a logarithmic x axis, and a line through those that no other point beats in both. Raises ValueError for an x
    that is not positive."""
    low, high = math.log10(min(s.x for s in spots)), math.log10(max(s.x for s in spots))
    margin = 0.06 * (high - low) or 0.3
    frame = Frame((low - margin, high + margin), y_range)
    parts = frame.axes("", y_name, whole_x=False, x_ticks=False)
    left, right = 10.0 ** (low - margin), 10.0 ** (high + margin)
    powers = range(math.floor(math.log10(left)), math.ceil(math.log10(right)) + 1)
    marked = [value for power in powers for f in (1, 2, 5) if left <= (value := f * 10.0**power) <= right]
    for value in marked if len(marked) > 1 else ticks(left, right, 5):
        parts.append(tag("text", f"{value:g}", class_="t c", x=frame.x(math.log10(value)), y=frame.bottom + 16))
    parts.append(tag("text", escape(x_name), class_="a c", x=(frame.left + frame.right) / 2, y=frame.bottom + 33))
    corners = [(frame.x(math.log10(x)), frame.y(y)) for x, y in front]
    if corners:
        stairs = "".join(f"H{x:.1f}V{y:.1f}" for x, y in corners[1:])
        parts.append(tag("path", class_="g b", d=f"M{corners[0][0]:.1f} {corners[0][1]:.1f}{stairs}H{frame.right:.1f}"))
    places = [(frame.x(math.log10(spot.x)), frame.y(spot.y)) for spot in spots]
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    for spot, (x, y) in zip(spots, places, strict=True):
        said = f"{spot.name}: {spot.y:.1f} %, {spot.x:,.0f} s"
        drawn = [
            tag("circle", tag("title", escape(said)), class_="dot", cx=x, cy=y, r=3.4)
            if spot.style is None
            else marker(spot.style, x, y, said)
        ]
        if spot.labelled:
            text = clip(spot.name, LETTERS)
            left_of, below = _beside(x, y, LETTER * len(text), frame, taken)
            place = {"class_": "label e" if left_of else "label", "x": x - 7 if left_of else x + 7, "y": below}
            drawn.append(tag("text", escape(text), **place))
        parts.append(tag("g", *drawn, style=colour(spot.style)))
    return drawing(title, description, parts, class_="chart")


def _beside(x: float, y: float, width: float, frame: Frame, taken: list[Box]) -> tuple[bool, float]:
    """Returns whether the label of a point ends left of it, and its baseline. It covers no other label and no point where there
    is such a place. Its box is added to those taken."""
    leftwards = x > (frame.left + frame.right) / 2
    boxes = []
    for baseline in (y - 5, y + 15, y - 17, y + 27, y - 29, y + 39, y - 41):
        for left_of in (leftwards, not leftwards):
            start = x - 7 - width if left_of else x + 7
            if 0 <= start <= WIDTH - width and (baseline == y - 5 or baseline + 3 <= frame.bottom):
                boxes.append((left_of, baseline, (start, baseline - 11, start + width, baseline + 3)))
    free = (one for one in boxes if not any(overlap(one[2], other) for other in taken))
    left_of, baseline, box = next(free, boxes[0])
    taken.append(box)
    return left_of, baseline


def overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def drops(
    title: str, description: str, rows: Sequence[tuple[str, float | None, float]], *, y_range: Point, y_name: str
) -> Markup:
    """For each task its tooltip, the best value it had (an open ring, if any) and its last value (a dot), joined."""
    frame = Frame((0.5, len(rows) + 0.5), y_range)
    parts = frame.axes("task", y_name)
    drawn: list[Markup] = []
    for number, (tooltip, best, last) in enumerate(rows, start=1):
        x, y = frame.x(number), frame.y(last)
        inside = [tag("title", escape(tooltip))]
        if best is not None:
            inside.append(tag("path", class_="l", d=f"M{x:.1f} {frame.y(best):.1f}V{y:.1f}"))
            inside.append(tag("circle", class_="ring", cx=x, cy=frame.y(best), r=3.4))
        inside.append(tag("circle", class_="m", cx=x, cy=y, r=3.0))
        drawn.append(tag("g", *inside))
    parts.append(tag("g", *drawn, style=colour(None, accent=True)))
    return drawing(title, description, parts, class_="chart")


def heat_map(
    title: str,
    description: str,
    value_ij: NDArray[np.float64],
    tooltip: Callable[[int, int], str],
    names: Sequence[str],
    labels: Sequence[str],
    low: float,
) -> Markup:
    """A matrix of percentages, nan where empty; the deeper the hue the higher, from `low` to 100.

    The hue stops short of where text would fade, so the numbers need no second colour in either theme. What lies above
    the diagonal, measured before the task was learnt, is only outlined.
    """
    rows, columns = value_ij.shape
    numbered = columns <= NUMBERED
    wide, high = (48.0, 28.0) if numbered else (19.0, 19.0)
    rows_named = [clip(label, LETTERS) for label in labels]
    left, top = max(62.0, 16 + 6.6 * max(map(len, rows_named), default=0)), 40.0
    parts = [
        tag("text", "on task", class_="a", x=left + 2, y=14),
        tag("text", "after task", class_="a", x=0, y=top - 7),
    ]
    for j in range(columns):
        named = tag("title", escape(f"task {j + 1}: {names[j]}"))
        parts.append(tag("text", named, str(j + 1), class_="t c", x=left + (j + 0.5) * wide, y=top - 7))
    learnt: list[Markup] = []
    ahead: list[Markup] = []
    numbers: list[Markup] = []
    for i in range(rows):
        parts.append(tag("text", escape(rows_named[i]), class_="t e", x=left - 8, y=top + (i + 0.5) * high + 4))
        for j in map(int, np.flatnonzero(~np.isnan(value_ij[i]))):
            value, x, y = float(value_ij[i, j]), left + j * wide, top + i * high
            depth = f"{0.06 + 0.94 * max(0.0, value - low) / (100 - low):.2f}"
            outline = f"M{x:g} {y:g}h{wide - 2:g}v{high - 2:g}h{2 - wide:g}z"
            hover = tag("title", escape(tooltip(i, j)))
            if j <= i:
                learnt.append(tag("path", hover, d=outline, opacity=depth))
            else:
                ahead.append(tag("path", hover, d=outline))
            if numbered:
                numbers.append(tag("text", f"{value:.1f}", x=x + wide / 2 - 1, y=y + high / 2 + 3))
    parts += [tag("g", *group, class_=name) for group, name in ((learnt, "h"), (ahead, "u"), (numbers, "n"))]
    width, height = max(left + columns * wide, 120.0), top + rows * high
    return drawing(title, description, parts, width=width, height=height, class_="heat")
