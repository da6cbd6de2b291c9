"""Things of a household, with random proportions: mug, bottle, teapot, lamp, umbrella, chair, table."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from scenes.bodies import Body, Point, ball, block, box, frustum
from scenes.shapes import Keypoint, Part, Shape, Surface, along

SIDES = (("left", -1), ("right", 1))
ENDS = (("front", 1), ("back", -1))

STEEP, FLAT = 0.55, 1.1
"""Angles in radians by which the normals of an umbrella's panels rise above the horizon."""


def disc(y: float, height: float, radius: float, top_radius: float | None = None) -> Body:
    """Return a frustum about the upright axis."""
    return frustum((0, y, 0), (0, y + height, 0), radius, radius if top_radius is None else top_radius)


def handle(at: Point, outer: float, inner: float, half_width: float, normal: Point, from_: Point) -> Part:
    """Return a ring in the plane of x and y, cut off by the plane through `from_`."""
    x, y, z = at
    ring = frustum((x, y, z - half_width), (x, y, z + half_width), outer, outer).cut(normal, from_)
    hole = frustum((x, y, z - 2 * half_width), (x, y, z + 2 * half_width), inner, inner)
    return Part(ring, "main", hole)


def mug(rng: np.random.Generator) -> Shape:
    """Build a mug whose handle points to x."""
    u = rng.uniform
    height, foot = u(0.75, 1.0), u(0.3, 0.42)
    top, wall = foot * u(0.95, 1.2), 0.05
    y, ring = height * u(0.45, 0.56), height * u(0.28, 0.36)
    side = foot + (top - foot) * y / height
    x = side + ring * u(0.1, 0.35)
    cavity = frustum((0, 0.07, 0), (0, height + 0.1, 0), foot - wall, top - wall)
    parts = (
        Part(disc(0, height, foot, top), "main", cavity),
        handle((x, y, 0), ring, ring * u(0.6, 0.72), u(0.05, 0.08), (-1, 0, 0), (side - wall * 0.7, y, 0)),
    )
    points = (
        Keypoint("handle", (x + ring * 0.85, y, 0), 0.1),
        Keypoint("handle_top", (x, y + ring * 0.85, 0), 0.1),
        Keypoint("handle_bottom", (x, y - ring * 0.85, 0), 0.1),
        *(Keypoint(f"rim_{name}", (0, height, s * (top - wall / 2))) for name, s in SIDES),
        Keypoint("rim_near", (top - wall / 2, height, 0)),
        Keypoint("rim_far", (-top + wall / 2, height, 0)),
        *(Keypoint(f"foot_{name}", (0, 0.03, s * foot)) for name, s in SIDES),
        Keypoint("foot_far", (-foot, 0.03, 0)),
    )
    return Shape(parts, points)


def bottle(rng: np.random.Generator) -> Shape:
    """Build a bottle, round about its axis."""
    u = rng.uniform
    radius, body = u(0.13, 0.19), u(0.42, 0.58)
    shoulder = body + u(0.1, 0.2)
    neck = radius * u(0.27, 0.4)
    parts = (
        Part(disc(0, body, radius)),
        Part(disc(body, shoulder - body, radius, neck)),
        Part(disc(shoulder, 0.93 - shoulder, neck)),
        Part(disc(0.9, 0.1, neck * 1.25), "accent"),
        Part(disc(body * 0.25, body * 0.5, radius * 1.012), "light"),
    )
    points = (
        Keypoint("cap", (0, 0.97, 0), neck * 1.5),
        Keypoint("neck", (0, (shoulder + 0.9) / 2, 0), neck * 1.5),
        Keypoint("shoulder", (0, body, 0), radius * 1.3),
        Keypoint("label", (0, body / 2, 0), radius * 1.3),
        Keypoint("foot", (0, 0.03, 0), radius * 1.3),
    )
    return Shape(parts, points)


def teapot(rng: np.random.Generator) -> Shape:
    """Build a teapot whose spout points to x."""
    u = rng.uniform
    radius = u(0.32, 0.38)
    high = radius * u(0.72, 0.95)
    y, top = 0.03 + high, 0.03 + 2 * high
    ring = high * u(0.55, 0.7)
    grip = -radius * u(0.95, 1.05)
    tip = (radius * u(1.55, 1.75), y + high * u(0.6, 0.85), 0.0)
    bend = (radius * 1.22, y + high * 0.05, 0.0)
    root = (radius * 0.75, y - high * 0.25, 0.0)
    parts = (
        Part(ball((0, y, 0), (radius, high, radius))),
        Part(disc(0, 0.1, radius * 0.6, radius * 0.5)),
        Part(ball((0, top - 0.03, 0), (radius * 0.5, 0.07, radius * 0.5)), "accent"),
        Part(ball((0, top + 0.07, 0), 0.05), "accent"),
        *along((root, bend, tip), (0.11, 0.075, 0.04)),
        handle((grip, y, 0), ring, ring * u(0.66, 0.76), 0.04, (1, 0, 0), (-radius * 0.75, y, 0)),
    )
    points = (
        Keypoint("spout_tip", tip, 0.08),
        Keypoint("spout_bend", bend, 0.1),
        Keypoint("handle", (grip - ring * 0.86, y, 0), 0.08),
        Keypoint("knob", (0, top + 0.07, 0), 0.08),
        Keypoint("lid_front", (radius * 0.4, top - 0.02, 0), 0.06),
        *(Keypoint(f"belly_{name}", (0, y, s * radius * 0.98)) for name, s in SIDES),
    )
    return Shape(parts, points)


def lamp(rng: np.random.Generator) -> Shape:
    """Build a table lamp, round about its axis: a stem or a vase under a shade that is open at both ends."""
    u = rng.uniform
    low, wide, narrow = u(0.55, 0.64), u(0.3, 0.4), u(0.14, 0.22)
    shade = frustum((0, low, 0), (0, 0.98, 0), wide, narrow)
    slope = (wide - narrow) / (0.98 - low)
    inside = frustum((0, low - 0.1, 0), (0, 1.08, 0), wide + 0.1 * slope - 0.012, narrow - 0.1 * slope - 0.012)
    foot: tuple[Part, ...]
    if rng.random() < 0.5:
        foot = (
            Part(disc(0, 0.04, u(0.17, 0.23)), "accent"),
            Part(disc(0.04, 0.9, 0.022), "accent"),
        )
    else:
        belly = u(0.13, 0.18)
        foot = (
            Part(disc(0, 0.05, belly * 0.8), "accent"),
            Part(ball((0, 0.26, 0), (belly, 0.22, belly)), "accent"),
            Part(disc(0.4, 0.5, 0.03), "accent"),
        )
    parts = (
        Part(shade, "main", inside),
        *foot,
        Part(ball((0, (low + 0.98) / 2, 0), 0.07), "light"),
        Part(ball((0, 0.96, 0), 0.03), "accent"),
    )
    points = (
        Keypoint("foot", (0, 0.03, 0), 0.3),
        Keypoint("stem", (0, 0.35, 0), 0.2),
        Keypoint("shade", (0, (low + 0.98) / 2, 0), wide * 1.2),
        Keypoint("top", (0, 0.96, 0), narrow * 1.3),
    )
    return Shape(parts, points)


def umbrella(rng: np.random.Generator) -> Shape:
    """Build an open, upright umbrella: a canopy of eight panels, and a crook at the end of the shaft."""
    u = rng.uniform
    radius, high, low = u(0.42, 0.5), u(0.2, 0.26), u(0.66, 0.74)
    canopy = _panels(low, radius, high).cut((0, -1, 0), (0, low, 0))
    apex = low + math.hypot(high, radius / math.tan(FLAT))
    crook = 0.075
    ring = handle((crook, 0.1, 0), crook + 0.02, crook - 0.02, 0.02, (0, 1, 0), (0, 0.1, 0))
    parts = (
        Part(canopy, "main", _panels(low - 0.025, radius, high)),
        Part(disc(0.1, apex - 0.12, 0.016), "accent"),
        Part(disc(apex - 0.02, 0.1, 0.022, 0.012), "accent"),
        Part(ring.body, "accent", ring.minus),
    )
    points = (
        Keypoint("tip", (0, apex + 0.05, 0), 0.07),
        Keypoint("crown", (0, apex, 0), 0.05),
        Keypoint("shaft", (0, low * 0.6, 0), 0.05),
        Keypoint("crook", (crook, 0.025, 0), 0.05),
    )
    return Shape(parts, points)


def _panels(low: float, radius: float, high: float) -> Body:
    """Return a canopy of two tiers of eight planes that touch a dome, from `low` up."""
    rim = math.hypot(radius, high * math.tan(STEEP)) / math.cos(math.tau / 16)
    body = box((0, low, 0), (2 * radius, 2 * radius, 2 * radius))
    for steepness in (STEEP, FLAT):
        for k in range(8):
            angle = math.tau * (k + 0.5) / 8
            level = math.cos(steepness)
            normal = (level * math.cos(angle), math.sin(steepness), level * math.sin(angle))
            reach = math.hypot(radius * level, high * normal[1])
            body = body.cut(normal, (reach * normal[0], low + reach * normal[1], reach * normal[2]))
    return replace(body, radius=1.02 * math.hypot(rim, high / 2))  # above `low`; the box continues below


def chair(rng: np.random.Generator) -> Shape:
    """Build a chair that faces z."""
    u = rng.uniform
    x, z, seat = u(0.2, 0.27), u(0.2, 0.26), u(0.4, 0.48)
    leg, thick = u(0.018, 0.032), u(0.02, 0.04)
    wood: Surface = "main" if rng.random() < 0.5 else "accent"
    parts = [Part(box((0, seat - thick, 0), (x, thick, z)))]
    feet = {(sx, sz): (sx * (x - leg), 0.0, sz * (z - leg)) for _, sx in SIDES for _, sz in ENDS}
    for (sx, sz), foot in feet.items():
        parts.append(Part(frustum(foot, (sx * (x - leg), seat - thick, sz * (z - leg)), leg * 0.75, leg), wood))
    style = int(rng.integers(3))
    back, low = -z + leg, seat + u(0.08, 0.16)
    if style == 0:
        parts.append(Part(box((0, (low + 1) / 2, back), (x, (1 - low) / 2, leg * 0.8))))
    else:
        parts.append(Part(box((0, 0.96, back), (x, 0.045, leg * 0.9))))
        for k in range(3):
            across = (k - 1) * x * 0.5
            rail = low + k * (0.86 - low) / 2
            upright = box((across, (seat + 0.95) / 2, back), (x * 0.09, (0.95 - seat) / 2, leg * 0.5))
            level = box((0, rail, back), (x - leg, 0.028, leg * 0.5))
            parts.append(Part(upright if style == 1 else level))
    parts += [Part(disc_at((s * (x - leg), seat, back), 1.0 - seat, leg), wood) for _, s in SIDES]
    points = (
        *(Keypoint(f"leg_{e}_{n}", _above(feet[sx, sz], 0.03), 0.05) for n, sx in SIDES for e, sz in ENDS),
        *(Keypoint(f"seat_{e}_{n}", (sx * x * 0.95, seat, sz * z * 0.9), 0.08) for n, sx in SIDES for e, sz in ENDS),
        *(Keypoint(f"back_{n}", (s * (x - leg), 0.97, back), 0.08) for n, s in SIDES),
    )
    return Shape(tuple(parts), points)


def disc_at(foot: Point, height: float, radius: float) -> Body:
    """Return an upright cylinder that stands on any point."""
    return frustum(foot, _above(foot, height), radius, radius)


def _above(point: Point, rise: float) -> Point:
    return (point[0], point[1] + rise, point[2])


def table(rng: np.random.Generator) -> Shape:
    """Build a table that is long along x."""
    u = rng.uniform
    x, z, top = u(0.5, 0.62), u(0.28, 0.42), u(0.5, 0.66)
    leg, thick = u(0.025, 0.045), u(0.02, 0.035)
    inset = leg + u(0.0, 0.06)
    wood: Surface = "main" if rng.random() < 0.5 else "accent"
    square = rng.random() < 0.5
    parts = [Part(box((0, top - thick, 0), (x, thick, z)))]
    feet = {(sx, sz): (sx * (x - inset), 0.0, sz * (z - inset)) for _, sx in SIDES for _, sz in ENDS}
    for foot in feet.values():
        fx, _, fz = foot
        base = (fx - leg * 0.7, fx + leg * 0.7, fz - leg * 0.7, fz + leg * 0.7)
        end = (fx - leg, fx + leg, fz - leg, fz + leg)
        round_leg = frustum(foot, (fx, top - thick, fz), leg * 0.6, leg)
        parts.append(Part(block(0, base, top - thick, end) if square else round_leg, wood))
    if rng.random() < 0.6:
        apron = box((0, top - 2 * thick - 0.035, 0), (x - inset, 0.035, z - inset))
        parts.append(Part(apron, wood, box((0, top - 2 * thick - 0.035, 0), (x - inset - 0.02, 0.1, z - inset - 0.02))))
    points = (
        *(Keypoint(f"leg_{e}_{n}", _above(feet[sx, sz], 0.03), 0.06) for n, sx in SIDES for e, sz in ENDS),
        *(Keypoint(f"top_{e}_{n}", (sx * x * 0.95, top, sz * z * 0.93), 0.06) for n, sx in SIDES for e, sz in ENDS),
    )
    return Shape(tuple(parts), points)
