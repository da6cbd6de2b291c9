"""Bodies of every kind beside a second way to say which points lie in them, in float64 and without the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scenes.bodies import ball, block, box, frustum, prism
from scenes.shapes import Part

Inside = Callable[[NDArray[np.float64]], NDArray[np.bool_]]
"""Of points [n, 3]."""


@dataclass(frozen=True)
class Solid:
    part: Part
    inside: Inside


def tilt(angle: float) -> NDArray[np.float64]:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def in_ball(centre: tuple[float, ...], radii: tuple[float, ...], turn: NDArray[np.float64] | None = None) -> Inside:
    axes = np.eye(3) if turn is None else turn
    return lambda p: (((p - centre) @ axes / np.array(radii)) ** 2).sum(axis=1) <= 1


def in_box(centre: tuple[float, ...], half: tuple[float, ...], turn: NDArray[np.float64] | None = None) -> Inside:
    axes = np.eye(3) if turn is None else turn
    return lambda p: (np.abs((p - centre) @ axes) <= np.array(half)).all(axis=1)


def in_frustum(foot: tuple[float, ...], top: tuple[float, ...], foot_radius: float, top_radius: float) -> Inside:
    def inside(p: NDArray[np.float64]) -> NDArray[np.bool_]:
        axis = np.subtract(top, foot)
        share = (p - foot) @ axis / (axis @ axis)
        away = np.linalg.norm(p - foot - share[:, None] * axis, axis=1)
        return (share >= 0) & (share <= 1) & (away <= foot_radius + share * (top_radius - foot_radius))

    return inside


def in_polygon(corners: list[tuple[float, float]], p: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which points [n, 2] lie in a polygon: those whose ray to the right crosses an odd number of edges."""
    odd = np.zeros(len(p), bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        crosses = (ay > p[:, 1]) != (by > p[:, 1])
        with np.errstate(divide="ignore", invalid="ignore"):
            odd ^= crosses & (p[:, 0] < (bx - ax) * (p[:, 1] - ay) / (by - ay) + ax)
    return odd


ROOF = [(-0.4, 0.0), (0.5, 0.0), (0.1, 0.6)]
WING = [(0.3, 0.0), (-0.3, 0.0), (-0.4, 0.5), (-0.2, 0.5)]


def in_pyramid(p: NDArray[np.float64]) -> NDArray[np.bool_]:
    share = (p[:, 1] - 0.1) / 0.6
    low = np.array([-0.5, 0.4, -0.3, 0.3])
    x0, x1, z0, z1 = low[:, None] + share * (np.array([-0.2, 0.3, -0.2, 0.1]) - low)[:, None]
    level = (share >= 0) & (share <= 1)
    return level & (p[:, 0] >= x0) & (p[:, 0] <= x1) & (p[:, 2] >= z0) & (p[:, 2] <= z1)


TURN = tilt(0.7)
AWAY = (0.1, 0.2, -0.1)

SOLIDS = {
    "ball": Solid(Part(ball(AWAY, 0.5)), in_ball(AWAY, (0.5, 0.5, 0.5))),
    "ellipsoid": Solid(
        Part(ball(AWAY, (0.6, 0.2, 0.3), TURN)),  # type: ignore[arg-type]
        in_ball(AWAY, (0.6, 0.2, 0.3), TURN),
    ),
    "box": Solid(
        Part(box(AWAY, (0.5, 0.2, 0.3), TURN)),  # type: ignore[arg-type]
        in_box(AWAY, (0.5, 0.2, 0.3), TURN),
    ),
    "cylinder": Solid(
        Part(frustum((-0.3, -0.2, 0), (0.4, 0.5, 0.2), 0.25, 0.25)),
        in_frustum((-0.3, -0.2, 0), (0.4, 0.5, 0.2), 0.25, 0.25),
    ),
    "widening": Solid(
        Part(frustum((0, -0.4, 0), (0, 0.3, 0), 0.1, 0.6)), in_frustum((0, -0.4, 0), (0, 0.3, 0), 0.1, 0.6)
    ),
    "cone": Solid(
        Part(frustum((0, -0.2, 0), (0.2, 0.2, 0.1), 0.8, 0.0)), in_frustum((0, -0.2, 0), (0.2, 0.2, 0.1), 0.8, 0.0)
    ),
    "roof": Solid(
        Part(prism(ROOF, "z", -0.2, 0.5)),
        lambda p: in_polygon(ROOF, p[:, [0, 1]]) & (p[:, 2] >= -0.2) & (p[:, 2] <= 0.5),
    ),
    "gable": Solid(
        Part(prism(ROOF[::-1], "x", -0.2, 0.5)),
        lambda p: in_polygon(ROOF, p[:, [2, 1]]) & (p[:, 0] >= -0.2) & (p[:, 0] <= 0.5),
    ),
    "wing": Solid(
        Part(prism(WING, "y", 0.1, 0.3)),
        lambda p: in_polygon(WING, p[:, [0, 2]]) & (p[:, 1] >= 0.1) & (p[:, 1] <= 0.3),
    ),
    "pyramid": Solid(Part(block(0.1, (-0.5, 0.4, -0.3, 0.3), 0.7, (-0.2, 0.3, -0.2, 0.1))), in_pyramid),
    "dome": Solid(
        Part(ball(AWAY, (0.5, 0.3, 0.5)).cut((0, -1, 0), (0, 0.25, 0)).cut((1, 1, 0), (0.3, 0.3, 0))),
        lambda p: in_ball(AWAY, (0.5, 0.3, 0.5))(p) & (p[:, 1] >= 0.25) & (p[:, 0] + p[:, 1] <= 0.6),
    ),
    "cup": Solid(
        Part(frustum((0, -0.4, 0), (0, 0.4, 0), 0.3, 0.4), minus=frustum((0, -0.3, 0), (0, 0.6, 0), 0.25, 0.36)),
        lambda p: (
            in_frustum((0, -0.4, 0), (0, 0.4, 0), 0.3, 0.4)(p) & ~in_frustum((0, -0.3, 0), (0, 0.6, 0), 0.25, 0.36)(p)
        ),
    ),
    "pipe": Solid(
        Part(frustum((0, 0, -0.4), (0, 0, 0.4), 0.4, 0.4), minus=frustum((0, 0, -1), (0, 0, 1), 0.3, 0.3)),
        lambda p: in_frustum((0, 0, -0.4), (0, 0, 0.4), 0.4, 0.4)(p) & ~in_frustum((0, 0, -1), (0, 0, 1), 0.3, 0.3)(p),
    ),
    "bitten": Solid(
        Part(box((0, 0, 0), (0.4, 0.3, 0.4)), minus=ball((0.1, 0.2, 0.1), 0.35)),
        lambda p: in_box((0, 0, 0), (0.4, 0.3, 0.4))(p) & ~in_ball((0.1, 0.2, 0.1), (0.35, 0.35, 0.35))(p),
    ),
}
