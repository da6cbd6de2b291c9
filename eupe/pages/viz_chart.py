"""Charts as inline SVG: lines, bars, heat maps.

Colours and fonts are those of the page's classes: `ink`, `c0`, ..., `dashed`, `bar`.
"""

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
"""A curve with more points is drawn as this many means of consecutive points."""
LOG_FROM = 3.0
"""Positive values get a logarithmic axis, if allowed, when the largest is at least this many times the smallest."""
LOG_TICKS = ((20.0, (1, 1.5, 2, 3, 5, 7)), (1000.0, (1, 2, 5)), (math.inf, (1,)))
"""Largest ratio of an axis's ends, and the factors of powers of ten that get ticks up to that ratio."""
MARKED_POINTS = 12
"""A curve with at most this many points shows each of them."""

LEAST_BAR = 1.5
"""Least height of a bar that is not zero, so that rare values can be seen."""
PADDING_BINS = 3
"""Number of empty bins shown on either side of a histogram."""
HEAT_STEPS = 24
"""Number of steps in a heat map's scale."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A curve of a chart."""

    name: str
    points: Sequence[Point]
    """Points with rising x, all values finite."""
    colour: int | None = None
    """Number of one of the page's colours; None for its ink, drawn thicker."""
    dashed: bool = False

    @property
    def css(self) -> str:
        """Return the CSS classes of the curve."""
        colour = "ink" if self.colour is None else f"c{self.colour % NUM_COLOURS}"
        return f"{colour} dashed" if self.dashed else colour


@dataclass(frozen=True)
class Axis:
    """A range of values, with its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def share(self, value: float) -> float:
        """Return the position of a value along the axis: 0 at `low`, 1 at `high`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def linear_axis(low: float, high: float, *, most: int = 6) -> Axis:
    """Return an axis from the round number at or below `low` to the one at or above `high`, with about `most` ticks."""
    if high <= low:
        low, high = low - 0.5, low + 0.5
    step = _round_step((high - low) / most)
    # the tolerance keeps a rounding error from adding a step at either end
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(i * step, 12) for i in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def _round_step(least: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def log_axis(low: float, high: float) -> Axis:
    """Return an axis that extends a little beyond both values, with round ticks that are denser on a shorter range."""
    low, high = low / 1.08, high * 1.08
    factors = next(chosen for ratio, chosen in LOG_TICKS if high / low <= ratio)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = (round(factor * 10.0**power, 12) for power in powers for factor in factors)
    return Axis(low, high, tuple(tick for tick in ticks if low <= tick <= high), log=True)


def value_axis(values: Sequence[float], *, allow_log: bool) -> Axis:
    """Return the axis that suits the values; a linear one always includes 0."""
    low, high = min(values), max(values)
    if allow_log and low > 0 and high / low >= LOG_FROM:
        return log_axis(low, high)
    return linear_axis(min(low, 0.0), max(high, 0.0), most=5)


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """Return the points; if there are more than `most`, that many means of consecutive points."""
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
    """Draw curves over a horizontal axis that starts at 0.

    Args:
        series: at least one, each with at least one point.
        label: description of the chart for screen readers.
        allow_log: use a logarithmic axis if the values' range is wide enough (`LOG_FROM`); the axis's label then says
            so.
    """
    thinned = [(one, thin(one.points)) for one in series]
    x = _steps_axis(max(point[0] for _, points in thinned for point in points))
    y = value_axis([point[1] for _, points in thinned for point in points], allow_log=allow_log)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">',
        *(y_tick(y, tick) for tick in y.ticks),
        *(x_tick(x, tick) for tick in x.ticks),
        *(_curve(one, points, x, y) for one, points in thinned),
        axis_labels(x_label, f"{y_label} (log scale)" if y.log else y_label),
        "</svg>",
    ]
    return "\n".join(parts)


def svg_histogram(
    edges: Sequence[float], counts: Sequence[int], *, mark: float, label: str, x_label: str, y_label: str
) -> str:
    """Draw bars over a logarithmic axis, each the share of one bin in the total; empty bins at both ends are cut.

    Args:
        edges: one more than `counts`, rising by a constant factor.
        counts: at least one is not zero.
        mark: value at which a dashed line is drawn.
        label: description of the chart for screen readers.
    """
    used = [i for i, count in enumerate(counts) if count]
    step = edges[1] / edges[0]
    low, high = edges[used[0]] * step**-PADDING_BINS, edges[used[-1] + 1] * step**PADDING_BINS
    ticks = tuple(tick for tick in log_axis(low, high).ticks if low <= tick <= high)
    x, total = Axis(low, high, ticks, log=True), sum(counts)
    y = linear_axis(0.0, max(counts) / total, most=5)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">',
        *(y_tick(y, tick) for tick in y.ticks),
        *(x_tick(x, tick) for tick in x.ticks),
        *(_bar(edges[i : i + 2], counts[i], total, x, y) for i in used),
        f'<line class="ink dashed" x1="{across(x, mark):.1f}" x2="{across(x, mark):.1f}" '
        f'y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>',
        axis_labels(x_label, y_label),
        "</svg>",
    ]
    return "\n".join(parts)


def _bar(edges: Sequence[float], count: int, total: int, x: Axis, y: Axis) -> str:
    left, right = (across(x, edge) for edge in edges)
    height = max(HEIGHT - BOTTOM - down(y, count / total), LEAST_BAR)
    return (
        f'<rect class="bar" x="{left + 0.5:.1f}" y="{HEIGHT - BOTTOM - height:.1f}" '
        f'width="{max(right - left - 1, 1):.1f}" height="{height:.1f}">'
        f"<title>{edges[0]:.4g} to {edges[1]:.4g}: {count:,} ({count / total:.3%})</title></rect>"
    )


def svg_heat_map(rates: Sequence[Sequence[float]], *, label: str) -> str:
    """Draw a grid of cells, each with the opacity of its share, beside a scale from 0 to the largest share.

    Args:
        rates: rows of shares, at least one of them above 0.
        label: description of the chart for screen readers.
    """
    rows, columns, largest = len(rates), len(rates[0]), max(map(max, rates))
    side = min((HEIGHT - TOP - BOTTOM) / rows, (WIDTH - 2 * LEFT - 80) / columns)
    width, height = side * columns, side * rows
    cells = [
        _cell(LEFT + side * j, TOP + side * i, side, rate / largest, f"row {i}, column {j}: {rate:.2%} of views")
        for i, row in enumerate(rates)
        for j, rate in enumerate(row)
        if rate > 0
    ]
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">',
        f'<rect class="empty" x="{LEFT}" y="{TOP}" width="{width:.2f}" height="{height:.2f}"/>',
        *cells,
        *_cell_numbers(rows, columns, side),
        *_heat_scale(LEFT + width + 40, height, largest),
        "</svg>",
    ]
    return "\n".join(parts)


def _cell(x: float, y: float, side: float, strength: float, title: str) -> str:
    gap = 0.04 * side
    return (
        f'<rect class="heat" x="{x + gap:.2f}" y="{y + gap:.2f}" width="{side - 2 * gap:.2f}" '
        f'height="{side - 2 * gap:.2f}" fill-opacity="{strength:.3f}"><title>{title}</title></rect>'
    )


def _cell_numbers(rows: int, columns: int, side: float) -> list[str]:
    """Return the numbers of the first and last row and column, and the labels of both axes."""
    bottom, right = TOP + side * rows, LEFT + side * columns
    return [
        f'<text x="{LEFT - 8}" y="{TOP + side / 2 + 4:.1f}" text-anchor="end">0</text>',
        f'<text x="{LEFT - 8}" y="{bottom - side / 2 + 4:.1f}" text-anchor="end">{rows - 1}</text>',
        f'<text x="{LEFT + side / 2:.1f}" y="{bottom + 17:.1f}" text-anchor="middle">0</text>',
        f'<text x="{right - side / 2:.1f}" y="{bottom + 17:.1f}" text-anchor="middle">{columns - 1}</text>',
        f'<text x="{(LEFT + right) / 2:.1f}" y="{bottom + 17:.1f}" text-anchor="middle">column</text>',
        f'<text transform="translate({LEFT - 20} {(TOP + bottom) / 2:.1f}) rotate(-90)" '
        'text-anchor="middle">row</text>',
    ]


def _heat_scale(left: float, height: float, largest: float) -> list[str]:
    step = height / HEAT_STEPS
    strips = [
        f'<rect class="heat" x="{left:.1f}" y="{TOP + height - step * (i + 1):.2f}" width="14" '
        f'height="{step:.2f}" fill-opacity="{(i + 0.5) / HEAT_STEPS:.3f}"/>'
        for i in range(HEAT_STEPS)
    ]
    numbers = [
        f'<text x="{left + 22:.1f}" y="{TOP + height * (1 - share) + 4:.1f}">{100 * share * largest:.3g}%</text>'
        for share in (0.0, 0.5, 1.0)
    ]
    backdrop = f'<rect class="empty" x="{left:.1f}" y="{TOP}" width="14" height="{height:.2f}"/>'
    return [backdrop, *strips, *numbers]


def _steps_axis(last: float) -> Axis:
    """Return an axis from 0 to exactly the last step, so that the curves fill the chart."""
    last = max(last, 1.0)
    ticks = tuple(tick for tick in linear_axis(0.0, last).ticks if tick <= last and tick == round(tick))
    return Axis(0.0, last, ticks)


def across(axis: Axis, value: float) -> float:
    """Return the x coordinate of a value on a horizontal axis."""
    return LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT)


def down(axis: Axis, value: float) -> float:
    """Return the y coordinate of a value on a vertical axis."""
    return HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - TOP - BOTTOM)


def y_tick(axis: Axis, tick: float) -> str:
    """Return a line across the chart, with its number."""
    y = down(axis, tick)
    css = "zero" if tick == 0 else "rule"
    return (
        f'<line class="{css}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short_number(tick)}</text>'
    )


def x_tick(axis: Axis, tick: float) -> str:
    """Return a number below the chart."""
    at_end = axis.share(tick) > 0.98
    return (
        f'<text x="{across(axis, tick):.1f}" y="{HEIGHT - BOTTOM + 17}" '
        f'text-anchor="{"end" if at_end else "middle"}">{short_number(tick)}</text>'
    )


def _curve(series: Series, points: Sequence[Point], x: Axis, y: Axis) -> str:
    places = [(across(x, px), down(y, py)) for px, py in points]
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
    marks = ""
    if len(points) <= MARKED_POINTS:
        marks = "".join(
            f'<circle class="{series.css}" cx="{px:.1f}" cy="{py:.1f}" r="3.2">'
            f"<title>{escape(series.name)}: {value:.4g} at {step:g}</title></circle>"
            for (px, py), (step, value) in zip(places, points, strict=True)
        )
    return f'<polyline class="{series.css}" points="{path}"/>{marks}'


def axis_labels(x_label: str, y_label: str) -> str:
    """Return the labels of both axes."""
    middle, centre = LEFT + (WIDTH - LEFT - RIGHT) / 2, TOP + (HEIGHT - TOP - BOTTOM) / 2
    return (
        f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text transform="translate(11 {centre}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )


def short_number(value: float) -> str:
    """Format a number in short: 12000 as 12k, 0.5 as 0.5, 0.0001 as 1e-4."""
    if 0 < abs(value) < 0.01:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
