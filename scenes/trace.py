"""Exact ray tracing: the surface that each ray meets first, and the points that the sun does not reach.

Shapes: n rays, float32 [3, n]; the unit of `t` is the length of a ray's direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scenes.bodies import Flags, Floats, dot, floats, turned
from scenes.scene import Scene, Thing, Vector
from scenes.shapes import Part, part_normals, strike

Rows = NDArray[np.intp]

FLOOR, WALL, SKY = -1, -2, -3
"""Codes for what a ray meets if it is not a thing."""
SKIN = 1e-3
"""Metres above a surface at which rays towards the light begin, so that they do not hit the surface itself."""


@dataclass(frozen=True)
class Hits:
    """The surfaces that rays meet first."""

    t: Floats
    """[n]; infinite for the sky."""
    what: NDArray[np.int16]
    """[n]: a thing's index in the scene, FLOOR, WALL or SKY."""
    part: NDArray[np.int16]
    """[n]: index of a thing's part or of the wall; 0 for everything else."""
    carved: Flags
    """[n]: true if the surface was carved out of the part."""


class Patch(NamedTuple):
    """The rows of hits on one surface."""

    what: int
    part: int
    carved: bool
    rows: Rows


def trace(scene: Scene, origin: Floats, direction: Floats) -> Hits:
    """Return what rays meet first.

    Args:
        origin: [3, 1] or [3, n].
        direction: [3, n].
    """
    n = direction.shape[1]
    hits = Hits(np.full(n, np.inf, np.float32), np.full(n, SKY, np.int16), np.zeros(n, np.int16), np.zeros(n, np.bool_))
    everything = np.arange(n)
    with np.errstate(divide="ignore"):
        below = np.where(direction[1] < 0, -origin[1] / direction[1], np.inf)
    _keep_nearer(hits, everything, below, FLOOR, 0, None)
    for i, wall in enumerate(scene.walls):
        normal = wall.normal.astype(np.float32)[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            t = (wall.offset - dot(normal, origin)) / dot(normal, direction)
            height = origin[1] + t * direction[1]
        met = (dot(normal, direction) < 0) & (t > 0) & (height >= 0) & (height <= wall.height)
        _keep_nearer(hits, everything, np.where(met, t, np.inf), WALL, i, None)
    for i, thing in enumerate(scene.things):
        for j, part, rows, own_origin, own_direction in candidates(thing, everything, origin, direction):
            t, carved = strike(part, own_origin, own_direction)
            _keep_nearer(hits, rows, t, i, j, carved)
    return hits


def _keep_nearer(hits: Hits, rows: Rows, t: Floats, what: int, part: int, carved: Flags | None) -> None:
    nearer = t < hits.t[rows]
    chosen = rows[nearer]
    hits.t[chosen], hits.what[chosen], hits.part[chosen] = t[nearer], what, part
    hits.carved[chosen] = False if carved is None else carved[nearer]


def candidates(
    thing: Thing, rows: Rows, origin: Floats, direction: Floats
) -> Iterator[tuple[int, Part, Rows, Floats, Floats]]:
    """Yield each part of a thing with the rays among `rows` that come near it, in the thing's own coordinates."""
    centre, radius = thing.sphere
    rows = rows[near(centre.astype(np.float32), radius, picked(origin, rows), picked(direction, rows))]
    if not len(rows):
        return
    to_own = (thing.turn.T / thing.scale).astype(np.float32)
    own_origin = turned(to_own, picked(origin, rows) - thing.place.astype(np.float32)[:, None])
    own_direction = turned(to_own, picked(direction, rows))
    for j, part in enumerate(thing.instance.shape.parts):
        some = near(part.body.centre, part.body.radius, own_origin, own_direction)
        if some.any():
            some_rows = np.flatnonzero(some)
            yield j, part, rows[some_rows], picked(own_origin, some_rows), picked(own_direction, some_rows)


def near(centre: Floats, radius: float, origin: Floats, direction: Floats) -> Flags:
    """Return whether rays [n] come within `radius` of a point [3] ahead of their origin, or begin there."""
    to_centre = centre[:, None] - origin
    forward = dot(to_centre, direction)
    away = dot(to_centre, to_centre)
    reach = radius * radius + 1e-5 * away  # a margin for float32: too many candidates are harmless, too few are not
    return (away - forward * forward / dot(direction, direction) <= reach) & ((forward > 0) | (away <= reach))


def picked(vectors: Floats, rows: Rows) -> Floats:
    """Return some columns; a single column stands for all."""
    return vectors if vectors.shape[1] == 1 else vectors[:, rows]


def patches(hits: Hits) -> Iterator[Patch]:
    """Yield the hits by surface, without the sky."""
    if not hits.what.size:
        return
    code = (hits.what.astype(np.int64) * 256 + hits.part) * 2 + hits.carved
    order = np.argsort(code, kind="stable")
    starts = np.flatnonzero(np.diff(code[order], prepend=code[order[0]] - 1))
    for rows in np.split(order, starts[1:]):
        first = rows[0]
        if hits.what[first] != SKY:
            yield Patch(int(hits.what[first]), int(hits.part[first]), bool(hits.carved[first]), rows)


def normals(scene: Scene, patch: Patch, points: Floats) -> Floats:
    """Return unit normals [3, n] of a patch at points of the world."""
    if patch.what == FLOOR:
        return np.broadcast_to(np.array([[0], [1], [0]], np.float32), points.shape)
    if patch.what == WALL:
        return np.broadcast_to(scene.walls[patch.part].normal.astype(np.float32)[:, None], points.shape)
    thing = scene.things[patch.what]
    own = part_normals(thing.instance.shape.parts[patch.part], patch.carved, to_own(thing, points))
    normal = turned(thing.turn.astype(np.float32), own)
    return floats(normal / np.sqrt(dot(normal, normal)))


def to_own(thing: Thing, points: Floats) -> Floats:
    """Return points [3, n] of the world in a thing's own coordinates."""
    return turned((thing.turn.T / thing.scale).astype(np.float32), points - thing.place.astype(np.float32)[:, None])


def shadowed(scene: Scene, points: Floats, normal: Floats, towards: Vector) -> Flags:
    """Return which points [3, n] see no sun, because they face away from it or a thing is in between."""
    sun = towards.astype(np.float32)[:, None]
    dark = dot(normal, sun) <= 0
    start = points + normal * SKIN
    for thing in scene.things:
        for _, part, rows, own_origin, own_direction in candidates(thing, np.flatnonzero(~dark), start, sun):
            t, _ = strike(part, own_origin, own_direction)
            dark[rows[np.isfinite(t)]] = True
    return dark
