"""Convex bodies, where rays enter and leave them, and their surface normals: exact, without ray marching.

A body is a ball, a frustum or all of space, cut by planes. A ray is inside it along a single interval, so a union of
bodies, and one body carved out of another, need only comparisons.

Shapes: n rays, k planes. Vectors are float32 [3, n], one coordinate per row. A ray is `origin + t * direction`, and
directions have any length, so that `t` is the same number in all coordinate systems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]
Point = tuple[float, float, float]

TINY = 1e-9
"""Least rate at which a ray approaches a plane; it avoids a division by 0 and puts the crossing very far away."""


@dataclass(frozen=True)
class Body:
    """The points that `to_local`, after subtraction of `centre`, maps into the round shape and behind all planes."""

    round: Literal["ball", "frustum", "all"]
    """`ball`: |p| <= 1. `frustum`: |y| <= 1, and within `ends[0]` of the y axis at y = -1 and `ends[1]` at y = 1."""
    centre: Floats
    """[3], in the object's coordinates."""
    to_local: Floats
    """[3, 3]."""
    radius: float
    """Radius of a sphere about `centre` that contains the body."""
    ends: tuple[float, float] = (1.0, 1.0)
    planes: Floats | None = None
    """[k, 4] in local coordinates: a, b, c, d with a x + b y + c z <= d inside."""

    def cut(self, normal: Point, at: Point) -> Body:
        """Return the body without what lies beyond a plane through `at`, in the direction of its normal.

        Args:
            normal, at: in the object's coordinates.
        """
        to_object = np.linalg.inv(self.to_local.astype(np.float64))
        local = to_object.T @ np.asarray(normal, np.float64)
        row = np.append(local, np.dot(normal, np.asarray(at) - self.centre)).astype(np.float32)[None]
        return replace(self, planes=row if self.planes is None else np.concatenate([self.planes, row]))


def ball(centre: Point, radii: Point | float, turn: Floats | None = None) -> Body:
    """Return an ellipsoid; the columns of `turn` are its axes."""
    sides = np.broadcast_to(np.asarray(radii, np.float64), 3)
    return Body("ball", np.array(centre, np.float32), _to_local(sides, turn), float(sides.max()))


def box(centre: Point, half: Point, turn: Floats | None = None) -> Body:
    """Return a box with the given half sides."""
    planes = np.array([(s * x, s * y, s * z, 1) for x, y, z in np.eye(3) for s in (1, -1)], np.float32)
    radius = float(np.linalg.norm(half))
    return Body("all", np.array(centre, np.float32), _to_local(np.asarray(half), turn), radius, planes=planes)


def frustum(foot: Point, top: Point, foot_radius: float, top_radius: float) -> Body:
    """Return a cylinder, cone or frustum with flat ends."""
    a, b = np.asarray(foot, np.float64), np.asarray(top, np.float64)
    half = float(np.linalg.norm(b - a)) / 2
    widest = max(foot_radius, top_radius)
    to_local = _to_local(np.array([widest, half, widest]), _upright((b - a) / (2 * half)))
    ends = (foot_radius / widest, top_radius / widest)
    return Body("frustum", ((a + b) / 2).astype(np.float32), to_local, math.hypot(half, widest), ends)


def prism(outline: Sequence[tuple[float, float]], along: Literal["x", "y", "z"], low: float, high: float) -> Body:
    """Return the prism of a convex outline between two planes across an axis.

    Args:
        outline: corners, clockwise or counterclockwise; for `x` they are (z, y), for `y` (x, z), for `z` (x, y).
    """
    flat = np.array(outline, np.float64)
    if _area(flat) < 0:
        flat = flat[::-1]
    u, v, w = {"x": (2, 1, 0), "y": (0, 2, 1), "z": (0, 1, 2)}[along]
    centre = np.zeros(3)
    centre[[u, v]], centre[w] = flat.mean(axis=0), (low + high) / 2
    planes = np.zeros((len(flat) + 2, 4))
    for row, here, there in zip(planes, flat, np.roll(flat, -1, axis=0), strict=False):
        across = np.array([there[1] - here[1], here[0] - there[0]])
        row[[u, v]] = across / np.linalg.norm(across)
        row[3] = row[[u, v]] @ (here - flat.mean(axis=0))
    planes[-2, w], planes[-1, w] = 1, -1
    planes[-2:, 3] = (high - low) / 2
    reach = np.linalg.norm(flat - flat.mean(axis=0), axis=1).max()
    radius = math.hypot(float(reach), (high - low) / 2)
    return Body("all", centre.astype(np.float32), np.eye(3, dtype=np.float32), radius, planes=planes.astype(np.float32))


def block(low: float, base: Sequence[float], high: float, top: Sequence[float]) -> Body:
    """Return the body between two level rectangles: a frustum of a pyramid if they differ.

    Args:
        base, top: x0, x1, z0, z1 of the rectangles at y = `low` and y = `high`.
    """
    rise = high - low
    middle = np.array([sum(base[:2]) + sum(top[:2]), 2 * (low + high), sum(base[2:]) + sum(top[2:])]) / 4
    rows = [(0.0, 1.0, 0.0, rise / 2), (0.0, -1.0, 0.0, rise / 2)]
    for side in range(4):
        axis, sign = 2 * (side // 2), 1 if side % 2 else -1
        normal = np.zeros(3)
        normal[axis], normal[1] = sign * rise, -sign * (top[side] - base[side])
        normal /= np.linalg.norm(normal)
        on_it = np.array([0.0, low, 0.0])
        on_it[axis] = base[side]
        rows.append((*normal, float(normal @ (on_it - middle))))
    corners = [(x, y, z) for y, r in ((low, base), (high, top)) for x in r[:2] for z in r[2:]]
    radius = float(np.linalg.norm(np.array(corners) - middle, axis=1).max())
    planes = np.array(rows, np.float32)
    return Body("all", middle.astype(np.float32), np.eye(3, dtype=np.float32), radius, planes=planes)


def _area(flat: NDArray[np.float64]) -> float:
    x, y = flat.T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)) / 2


def _to_local(sides: NDArray[np.float64], turn: Floats | NDArray[np.float64] | None) -> Floats:
    axes = np.eye(3) if turn is None else turn
    return (axes.T / sides[:, None]).astype(np.float32)


def _upright(axis: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a right-handed frame, in columns, whose second axis is the given one."""
    helper = np.array([0.0, 0.0, 1.0]) if abs(axis[2]) < 0.9 else np.array([1.0, 0.0, 0.0])
    x = _cross(axis, helper)
    x /= np.linalg.norm(x)
    return np.stack([x, axis, _cross(x, axis)], axis=1)


def _cross(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the cross product of two vectors [3], many times as fast as `np.cross`."""
    (ax, ay, az), (bx, by, bz) = a.tolist(), b.tolist()
    return np.array([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx])


def crossing(body: Body, origin: Floats, direction: Floats) -> tuple[Floats, Floats]:
    """Return `t` [n] at which rays enter and leave a body; those that miss it leave before they enter.

    Args:
        origin: [3, n] or [3, 1].
    """
    start = turned(body.to_local, origin - body.centre[:, None])
    along = turned(body.to_local, direction)
    length = dot(along, along)
    nearest = -dot(start, along) / length
    start = start + nearest * along  # beside the body, where float32 is more precise than at the camera
    enter = np.full(length.shape, -np.inf, np.float32)
    leave = np.full(length.shape, np.inf, np.float32)
    if body.round == "ball":
        inside = 1 - dot(start, start)
        half = np.sqrt(np.maximum(inside, 0) / length)
        enter, leave = np.where(inside > 0, -half, np.inf), np.where(inside > 0, half, -np.inf)
    elif body.round == "frustum":
        enter, leave = _through_frustum(body.ends, start, along)
    if body.planes is not None:
        approach = np.einsum("kc,cn->kn", body.planes[:, :3], along)
        distance = body.planes[:, 3:] - np.einsum("kc,cn->kn", body.planes[:, :3], start)
        approach = np.where(np.abs(approach) < TINY, TINY, approach)
        t = distance / approach
        enter = np.maximum(enter, np.where(approach < 0, t, -np.inf).max(axis=0))
        leave = np.minimum(leave, np.where(approach > 0, t, np.inf).min(axis=0))
    return enter + nearest, leave + nearest


def _through_frustum(ends: tuple[float, float], start: Floats, along: Floats) -> tuple[Floats, Floats]:
    """Solve x^2 + z^2 = (middle + slope y)^2 along each ray, and keep what lies between the ends."""
    middle, slope = sum(ends) / 2, (ends[1] - ends[0]) / 2
    (x, y, z), (dx, dy, dz) = start, along
    wide, growth = middle + slope * y, slope * dy
    a = dx * dx + dz * dz - growth * growth
    a = np.where(np.abs(a) < TINY, TINY, a)
    half_b = x * dx + z * dz - wide * growth
    under_root = half_b * half_b - a * (x * x + z * z - wide * wide)
    root = np.sqrt(np.maximum(under_root, 0))
    first, second = (-half_b - root) / a, (-half_b + root) / a
    first, second = np.minimum(first, second), np.maximum(first, second)
    # A ray steeper than the cone leaves the mirror cone at `first` and enters this one at `second`, or the reverse.
    steep, opens = a < 0, growth > 0
    enter = np.where(steep, np.where(opens, second, -np.inf), np.where(under_root > 0, first, np.inf))
    leave = np.where(steep, np.where(opens, np.inf, first), np.where(under_root > 0, second, -np.inf))
    dy = np.where(np.abs(dy) < TINY, TINY, dy)
    low, high = (-1 - y) / dy, (1 - y) / dy
    return np.maximum(enter, np.minimum(low, high)), np.minimum(leave, np.maximum(low, high))


def outward(body: Body, points: Floats) -> Floats:
    """Return outward normals [3, n], of any length, at points on a body's skin, in the object's coordinates."""
    local = turned(body.to_local, points - body.centre[:, None])
    normal = np.zeros_like(local)
    most = np.full(local.shape[1], -np.inf, np.float32)
    for excess, candidate in _skins(body, local):
        here = excess > most  # a point's excess is about 0 over its own surface and negative over the others
        most = np.where(here, excess, most)
        normal = np.where(here, candidate, normal)
    # Normals go back by the transpose of `to_local`, points by its inverse.
    return turned(np.ascontiguousarray(body.to_local.T), normal)


def _skins(body: Body, local: Floats) -> list[tuple[Floats, Floats]]:
    """Return for each surface that bounds a body how far points lie outside it, and its normals [3, n] or [3, 1]."""
    skins: list[tuple[Floats, Floats]] = []
    x, y, z = local
    if body.round == "ball":
        skins.append((np.sqrt(dot(local, local)) - 1, local))
    elif body.round == "frustum":
        middle, slope = sum(body.ends) / 2, (body.ends[1] - body.ends[0]) / 2
        away = np.sqrt(x * x + z * z)
        safe = np.maximum(away, TINY)
        skins.append((away - (middle + slope * y), np.stack([x / safe, np.full_like(y, -slope), z / safe])))
        skins.append((np.abs(y) - 1, np.stack([np.zeros_like(y), np.sign(y), np.zeros_like(y)])))
    for plane in () if body.planes is None else body.planes:
        length = np.linalg.norm(plane[:3])
        skins.append(((dot(plane[:3, None], local) - plane[3]) / length, plane[:3, None] / length))
    return skins


def turned(matrix: Floats, vectors: Floats) -> Floats:
    """Multiply a matrix [3, 3] with vectors [3, n], in the same order of operations on every machine and at every n."""
    x, y, z = vectors
    return floats(matrix[:, :1] * x + matrix[:, 1:2] * y + matrix[:, 2:] * z)


def dot(a: Floats, b: Floats) -> Floats:
    """Return the dot product of each pair of columns."""
    return floats(a[0] * b[0] + a[1] * b[1] + a[2] * b[2])


def floats(values: Any) -> Floats:
    """Return numbers as float32, without a copy if they already are."""
    return np.asarray(values, np.float32)
