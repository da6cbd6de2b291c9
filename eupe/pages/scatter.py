"""Models by cost and quality as inline SVG: each a point with its name, and the line of those that none beats twice.

Colours and fonts are the page's: `c0`, `soft`, `hollow`, `front`.
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
"""About what a letter of a name takes, and a line of names."""
SHIFTS = (0, -1, 1, -2, 2, -3, 3)
"""Lines by which a name may lie beside its point, tried in turn."""
LINE_BOXES = 40
"""In which a stretch of the line keeps names away."""
MARGIN = 0.06
"""Of the range of values, left free at both ends."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class Spot:
    """A model."""

    name: str
    cost: float
    """Above 0."""
    quality: float
    compared: bool = True
    """Drawn hollow, and no part of the line, where its numbers came about otherwise than the others'."""


def front(spots: Sequence[Spot], *, lower_is_better: bool) -> list[Spot]:
    """Those that no other one beats in cost or quality without losing in the other, by rising cost."""
    sign = -1.0 if lower_is_better else 1.0
    kept: list[Spot] = []
    compared = [spot for spot in spots if spot.compared]
    for spot in sorted(compared, key=lambda spot: (spot.cost, -sign * spot.quality)):
        if not kept or sign * spot.quality > sign * kept[-1].quality:
            kept.append(spot)
    return kept


def svg_scatter(spots: Sequence[Spot], *, label: str, x_label: str, y_label: str, lower_is_better: bool) -> str:
    """Cost to the right, quality upwards, or downwards where lower is better.

    Args:
        spots: at least one, values finite.
        label: says what is drawn to those who cannot see it.
    """
    x = _cost_axis([spot.cost for spot in spots])
    y = _quality_axis([spot.quality for spot in spots])
    best = front(spots, lower_is_better=lower_is_better)
    places = [(across(x, spot.cost), down(y, spot.quality)) for spot in best]
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
    """What a line takes."""
    shares = [i / LINE_BOXES for i in range(LINE_BOXES + 1)]
    return [
        _box(start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1]), 2, 2) for share in shares
    ]


def _box(x: float, y: float, width: float, height: float) -> Box:
    """About a centre."""
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
