"""Models by cost and quality as inline SVG: a named point for each, and a line through the Pareto front.

Colours and fonts are those of the page's classes: `c0`, `soft`, `hollow`, `front`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from eupe.pages.viz_chart import (
    HEIGHT,
    LEFT,
    LOG_FROM,
    RIGHT,
    WIDTH,
    Axis,
    Point,
    across,
    axis_labels,
    down,
    linear_axis,
    log_axis,
    x_tick,
    y_tick,
)

RADIUS = 4.5
LETTER_PX, LINE_PX = 6.4, 13.0
"""Approximate width of a letter, and height of a line, in names."""
SHIFTS = (0, -1, 1, -2, 2, -3, 3)
"""Offsets of a name from its point, in lines, tried in turn."""
LINE_BOXES = 40
"""Number of boxes along a segment of the line that keep names away."""
MARGIN = 0.06
"""Share of the range of values that is left free at both ends."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class Spot:
    """A model's point."""

    name: str
    cost: float
    """Cost of the model, above 0."""
    quality: float
    compared: bool = True
    """False if its feature settings differ from the others'; it is then drawn hollow and is not part of the line."""


def front(spots: Sequence[Spot], *, lower_is_better: bool) -> list[Spot]:
    """Return the Pareto front by rising cost: spots that no other beats in one measure without losing in the other."""
    sign = -1.0 if lower_is_better else 1.0
    kept: list[Spot] = []
    compared = [spot for spot in spots if spot.compared]
    for spot in sorted(compared, key=lambda spot: (spot.cost, -sign * spot.quality)):
        if not kept or sign * spot.quality > sign * kept[-1].quality:
            kept.append(spot)
    return kept


def svg_scatter(spots: Sequence[Spot], *, label: str, x_label: str, y_label: str, lower_is_better: bool) -> str:
    """Draw cost to the right and quality upwards; if lower is better, better points are further down.

    Args:
        spots: at least one, values finite.
        label: description of the chart for screen readers.
    """
    x = _cost_axis([spot.cost for spot in spots])
    y = _quality_axis([spot.quality for spot in spots])
    best = front(spots, lower_is_better=lower_is_better)
    places = [(across(x, spot.cost), down(y, spot.quality)) for spot in best]
    # names keep clear of all points, and of the line
    taken = [_box(across(x, spot.cost), down(y, spot.quality), 2 * RADIUS, 2 * RADIUS) for spot in spots]
    taken += [box for start, end in pairwise(places) for box in _along(start, end)]
    line = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">',
        *(y_tick(y, tick) for tick in y.ticks),
        *(x_tick(x, tick) for tick in x.ticks),
        f'<polyline class="front" points="{line}"/>',
        *(_spot(spot, x, y, spot in best, taken) for spot in spots),
        axis_labels(f"{x_label} (log scale)" if x.log else x_label, y_label),
        "</svg>",
    ]
    return "\n".join(parts)


def _cost_axis(values: Sequence[float]) -> Axis:
    low, high = min(values), max(values)
    return log_axis(low / 1.2, high * 1.2) if high / low >= LOG_FROM else linear_axis(0.0, high * (1 + MARGIN), most=5)


def _quality_axis(values: Sequence[float]) -> Axis:
    spare = MARGIN * (max(values) - min(values))
    return linear_axis(min(values) - spare, max(values) + spare, most=5)


def _spot(spot: Spot, x: Axis, y: Axis, is_best: bool, taken: list[Box]) -> str:
    px, py = across(x, spot.cost), down(y, spot.quality)
    width = LETTER_PX * len(spot.name)
    gap = RADIUS + 5
    sides = [(px + gap, "start"), (px - gap - width, "end")]
    if px + gap + width > WIDTH - RIGHT:
        sides.reverse()
    places = [
        (left, py + shift * LINE_PX, anchor)
        for shift in SHIFTS
        for left, anchor in sides
        if LEFT <= left <= WIDTH - RIGHT - width
    ]
    boxes = [_box(left + width / 2, middle, width, LINE_PX) for left, middle, _ in places]
    free = next((i for i, box in enumerate(boxes) if not any(_overlap(box, other) for other in taken)), None)
    name = ""
    if free is not None:
        left, middle, anchor = places[free]
        taken.append(boxes[free])
        at = left if anchor == "start" else left + width
        name = f'<text class="name" x="{at:.1f}" y="{middle + 4:.1f}" text-anchor="{anchor}">{escape(spot.name)}</text>'
    said = f"{escape(spot.name)}: {spot.quality:.4g} at {spot.cost:.4g}"
    css = "c0" if is_best else "soft" if spot.compared else "hollow"
    return f'<circle class="{css}" cx="{px:.1f}" cy="{py:.1f}" r="{RADIUS}"><title>{said}</title></circle>{name}'


def _along(start: Point, end: Point) -> list[Box]:
    """Return the boxes that a segment of the line occupies."""
    shares = [i / LINE_BOXES for i in range(LINE_BOXES + 1)]
    return [
        _box(start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1]), 2, 2) for share in shares
    ]


def _box(x: float, y: float, width: float, height: float) -> Box:
    """Return the box around a centre."""
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
