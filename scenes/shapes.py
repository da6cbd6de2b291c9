"""The shape of a thing: its parts, each a body from which another may be carved out, and its keypoints.

Shapes: n rays. Coordinates are the thing's own: it stands on y = 0, is about 1 long or high, and faces x or z.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from scenes.bodies import Body, Flags, Floats, Point, ball, crossing, frustum, outward

Surface = Literal["main", "accent", "dark", "light", "board"]
"""Name of the thing's material that a part has."""


@dataclass(frozen=True)
class Part:
    """A body of one material, minus another body."""

    body: Body
    surface: Surface = "main"
    minus: Body | None = None


@dataclass(frozen=True)
class Keypoint:
    """A place that every thing of a category has."""

    name: str
    at: Point
    slack: float = 0.05
    """Distance from the visible surface at which it still counts as seen: the radius of the part that it is inside."""


@dataclass(frozen=True)
class Shape:
    """A union of parts."""

    parts: tuple[Part, ...]
    keypoints: tuple[Keypoint, ...] = ()
    base: float | None = None
    """Radius of the circle that other things must stay out of; if not given, that of the whole shape."""

    @cached_property
    def sphere(self) -> tuple[NDArray[np.float64], float]:
        """Return centre [3] and radius of a sphere that contains all parts."""
        centres = np.array([part.body.centre for part in self.parts], np.float64)
        radii = np.array([part.body.radius for part in self.parts])[:, None]
        middle = ((centres - radii).min(axis=0) + (centres + radii).max(axis=0)) / 2
        return middle, float((np.linalg.norm(centres - middle, axis=1) + radii[:, 0]).max())

    @cached_property
    def footprint(self) -> float:
        """Return the radius about the upright axis through the origin that other things must stay out of."""
        if self.base is not None:
            return self.base
        reach = [float(np.hypot(part.body.centre[0], part.body.centre[2])) + part.body.radius for part in self.parts]
        return max(reach)


def strike(part: Part, origin: Floats, direction: Floats) -> tuple[Floats, Flags]:
    """Return where rays first meet a part ahead of their origin.

    Returns: `t` [n], infinite for a miss, and whether the surface that is met is the carved one [n].
    """
    enter, leave = crossing(part.body, origin, direction)
    if part.minus is None:
        return np.where((enter <= leave) & (enter > 0), enter, np.inf), np.zeros(enter.shape, np.bool_)
    carve_from, carve_to = crossing(part.minus, origin, direction)
    carved_at_entry = (carve_from <= enter) & (enter < carve_to)
    skin = np.where((enter <= leave) & (enter > 0) & ~carved_at_entry, enter, np.inf)
    # A ray that enters the body inside the hole meets the hole's far wall, unless the hole ends beyond the body.
    meets_wall = (carve_from < carve_to) & (enter < carve_to) & (carve_to < leave) & (carve_to > 0)
    wall = np.where(meets_wall, carve_to, np.inf)
    return np.minimum(skin, wall), wall < skin


def part_normals(part: Part, carved: bool, points: Floats) -> Floats:
    """Return outward normals [3, n], of any length, at points on a part's skin or on its carved wall."""
    if not carved:
        return outward(part.body, points)
    assert part.minus is not None
    return -outward(part.minus, points)


def along(points: Sequence[Point], radii: Sequence[float], surface: Surface = "main") -> list[Part]:
    """Return a bent limb of frusta with balls at its bends."""
    limbs = [
        Part(frustum(a, b, r, s), surface) for a, b, r, s in zip(points, points[1:], radii, radii[1:], strict=False)
    ]
    return limbs + [Part(ball(p, r), surface) for p, r in zip(points[1:-1], radii[1:-1], strict=True)]
