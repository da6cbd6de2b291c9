"""Line charts as inline SVG. Colours and fonts are the page's: classes `ink`, `c0`, `c1`, ..., `dashed`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 40
NUM_COLOURS = 6
MAX_POINTS = 300
"""A longer curve is drawn as the means of this many runs of its points."""
LOG_FROM = 3.0
"""Positive values whose largest is this many times the smallest get a logarithmic axis, if allowed."""
LOG_TICKS = ((20.0, (1, 1.5, 2, 3, 5, 7)), (1000.0, (1, 2, 5)), (math.inf, (1,)))
"""Factors of powers of ten, for a largest value of up to so many times the smallest."""
MARKED_POINTS = 12
"""A curve of so few points shows each of them."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One curve."""

    name: str
    points: Sequence[Point]
    """x rising, all values finite."""
    colour: int | None = None
    """One of the page's colours; None for its ink, drawn thicker."""
    dashed: bool = False

    @property
    def css(self) -> str:
        """Its classes."""
        colour = "ink" if self.colour is None else f"c{self.colour % NUM_COLOURS}"
        return f"{colour} dashed" if self.dashed else colour


@dataclass(frozen=True)
class Axis:
    """A range of values, and the ticks in it."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies along the axis: 0 at `low`, 1 at `high`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def linear_axis(low: float, high: float, *, most: int = 6) -> Axis:
    """From the round number at or below `low` to the one at or above `high`, with about `most` ticks."""
    if high <= low:
        low, high = low - 0.5, low + 0.5
    step = _round_step((high - low) / most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(i * step, 12) for i in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def log_axis(low: float, high: float) -> Axis:
    """A little beyond both values, with round ticks that lie the closer, the shorter the range is."""
    low, high = low / 1.08, high * 1.08
    factors = next(chosen for ratio, chosen in LOG_TICKS if high / low <= ratio)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = (round(factor * 10.0**power, 12) for power in powers for factor in factors)
    return Axis(low, high, tuple(tick for tick in ticks if low <= tick <= high), log=True)


def value_axis(values: Sequence[float], *, allow_log: bool) -> Axis:
    """The axis that suits the values; a linear one always shows 0."""
    low, high = min(values), max(values)
    if allow_log and low > 0 and high / low >= LOG_FROM:
        return log_axis(low, high)
    return linear_axis(min(low, 0.0), max(high, 0.0), most=5)


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """The points, or the means of `most` runs of them."""
    if len(points) <= most:
        return list(points)
    edges = [i * len(points) // most for i in range(most + 1)]
    return [_mean(points[start:end]) for start, end in pairwise(edges)]


def _mean(points: Sequence[Point]) -> Point:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def svg_chart(
    series: Sequence[Series],
    *,
    label: str,
    y_label: str,
    x_label: str,
    allow_log: bool = False,
) -> str:
    """Curves over a horizontal axis that begins at 0.

    Args:
        series: at least one, each with at least one point.
        label: says what is drawn to those who cannot see it.
        allow_log: use a logarithmic axis where the values ask for one; the axis's label then says so.
    """
    thinned = [(one, thin(one.points)) for one in series]
    x = _steps_axis(max(point[0] for _, points in thinned for point in points))
    y = value_axis([point[1] for _, points in thinned for point in points], allow_log=allow_log)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">',
        *(_y_tick(y, tick) for tick in y.ticks),
        *(_x_tick(x, tick) for tick in x.ticks),
        *(_curve(one, points, x, y) for one, points in thinned),
        _axis_labels(x_label, f"{y_label} (log scale)" if y.log else y_label),
        "</svg>",
    ]
    return "\n".join(parts)


def _steps_axis(last: float) -> Axis:
    """From 0 to the last step exactly, so that the curves fill the chart."""
    last = max(last, 1.0)
    ticks = tuple(tick for tick in linear_axis(0.0, last).ticks if tick <= last and tick == round(tick))
    return Axis(0.0, last, ticks)


def _across(axis: Axis, value: float) -> float:
    return LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT)


def _down(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - TOP - BOTTOM)


def _y_tick(axis: Axis, tick: float) -> str:
    y = _down(axis, tick)
    css = "zero" if tick == 0 else "rule"
    return (
        f'<line class="{css}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short_number(tick)}</text>'
    )


def _x_tick(axis: Axis, tick: float) -> str:
    at_end = axis.share(tick) > 0.98
    return (
        f'<text x="{_across(axis, tick):.1f}" y="{HEIGHT - BOTTOM + 17}" '
        f'text-anchor="{"end" if at_end else "middle"}">{short_number(tick)}</text>'
    )


def _curve(series: Series, points: Sequence[Point], x: Axis, y: Axis) -> str:
    places = [(_across(x, px), _down(y, py)) for px, py in points]
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
    marks = ""
    if len(points) <= MARKED_POINTS:
        marks = "".join(
            f'<circle class="{series.css}" cx="{px:.1f}" cy="{py:.1f}" r="3.2">'
            f"<title>{escape(series.name)}: {value:.4g} at {step:g}</title></circle>"
            for (px, py), (step, value) in zip(places, points, strict=True)
        )
    return f'<polyline class="{series.css}" points="{path}"/>{marks}'


def _axis_labels(x_label: str, y_label: str) -> str:
    across, down = LEFT + (WIDTH - LEFT - RIGHT) / 2, TOP + (HEIGHT - TOP - BOTTOM) / 2
    return (
        f'<text x="{across}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text transform="translate(13 {down}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )


def short_number(value: float) -> str:
    """12000 as 12k, 0.5 as 0.5."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
