"""Things seen outdoors, with random proportions: car, airplane, house, tree, dog."""

from __future__ import annotations

import math

import numpy as np

from scenes.bodies import Body, ball, block, box, frustum, prism
from scenes.household import ENDS, SIDES, disc, disc_at
from scenes.shapes import Keypoint, Part, Shape, along


def car(rng: np.random.Generator) -> Shape:
    """Build a car that drives towards x: a saloon, or a hatchback with a steep back."""
    u = rng.uniform
    half, wheel = u(0.18, 0.21), u(0.075, 0.09)
    low, waist, roof = 0.055, u(0.185, 0.215), u(0.32, 0.37)
    hatchback = rng.random() < 0.5
    rear, front = (-0.47 if hatchback else u(-0.36, -0.28)), u(0.16, 0.26)
    rear_top, front_top = rear + (0.05 if hatchback else 0.12), front - u(0.13, 0.18)
    tight = half * 0.8
    glass = block(waist, (rear, front, -half * 0.95, half * 0.95), roof, (rear_top, front_top, -tight, tight))
    axle = u(0.29, 0.33)
    pillar = (rear_top + front_top) / 2 + u(-0.04, 0.04)
    parts = [
        Part(block(low, (-0.49, 0.5, -half, half), waist * 0.75, (-0.5, 0.5, -half, half))),
        Part(block(waist * 0.75, (-0.5, 0.5, -half, half), waist, (-0.47, 0.44, -half * 0.95, half * 0.95))),
        Part(glass, "dark"),
        Part(
            block(
                roof,
                (rear_top, front_top, -tight, tight),
                roof + 0.02,
                (rear_top + 0.03, front_top - 0.03, -tight * 0.9, tight * 0.9),
            )
        ),
        Part(
            block(
                waist,
                (pillar - 0.02, pillar + 0.02, -half * 0.96, half * 0.96),
                roof,
                (pillar - 0.02, pillar + 0.02, -tight * 1.01, tight * 1.01),
            )
        ),
        Part(box((0.0, low + 0.02, 0), (0.51, 0.025, half * 0.96)), "dark"),
        Part(box((0.497, waist * 0.55, 0), (0.008, 0.025, half * 0.45)), "dark"),
    ]
    for _, end in ENDS:
        for _, side in SIDES:
            x = end * axle
            rim = side * (half + 0.008)
            parts += [
                Part(
                    frustum(
                        (x, wheel, side * (half - 0.08)), (x, wheel, side * (half + 0.003)), wheel * 1.16, wheel * 1.16
                    ),
                    "dark",
                ),
                Part(frustum((x, wheel, side * (half - 0.07)), (x, wheel, rim), wheel, wheel), "dark"),
                Part(
                    frustum((x, wheel, side * half), (x, wheel, rim + side * 0.006), wheel * 0.58, wheel * 0.5), "light"
                ),
            ]
    parts += [Part(ball((0.485, waist * 0.72, s * half * 0.72), (0.03, 0.026, 0.04)), "light") for _, s in SIDES]
    parts += [Part(box((-0.49, waist * 0.75, s * half * 0.74), (0.018, 0.03, 0.035)), "accent") for _, s in SIDES]
    points = (
        *(Keypoint(f"wheel_{e}_{n}", (ex * axle, wheel, s * (half + 0.01))) for e, ex in ENDS for n, s in SIDES),
        *(Keypoint(f"headlight_{n}", (0.5, waist * 0.72, s * half * 0.72), 0.06) for n, s in SIDES),
        *(Keypoint(f"taillight_{n}", (-0.5, waist * 0.75, s * half * 0.74), 0.06) for n, s in SIDES),
        Keypoint("windscreen", ((front + front_top) / 2, (waist + roof) / 2, 0)),
        Keypoint("rear_window", ((rear + rear_top) / 2, (waist + roof) / 2, 0)),
        *(Keypoint(f"roof_{n}", ((rear_top + front_top) / 2, roof + 0.01, s * tight * 0.85)) for n, s in SIDES),
    )
    return Shape(tuple(parts), points)


def airplane(rng: np.random.Generator) -> Shape:
    """Build an airplane that points to x and stands on three wheels."""
    u = rng.uniform
    radius, y = u(0.055, 0.07), u(0.17, 0.2)
    sweep, span, chord = u(0.1, 0.22), u(0.42, 0.52), u(0.16, 0.22)
    tail_span, fin = u(0.16, 0.2), u(0.16, 0.2)
    tip = chord * u(0.35, 0.5)
    parts = [
        Part(frustum((-0.24, y, 0), (0.3, y, 0), radius, radius)),
        Part(ball((0.3, y, 0), (0.18, radius, radius))),
        Part(frustum((-0.5, y + 0.025, 0), (-0.24, y, 0), radius * 0.25, radius)),
        Part(ball((0.385, y + radius * 0.42, 0), (0.05, radius * 0.42, radius * 0.6)), "dark"),
        Part(box((0.03, y + radius * 0.3, 0), (0.25, radius * 0.14, radius * 1.0)), "dark"),
        Part(
            prism([(-0.37, y + 0.03), (-0.49, y + 0.03), (-0.53, y + fin), (-0.47, y + fin)], "z", -0.008, 0.008),
            "accent",
        ),
    ]
    root = 0.06 + chord / 2
    for _, s in SIDES:
        wing = [(root, 0.0), (root - chord, 0.0), (root - sweep - tip, s * span), (root - sweep, s * span)]
        stabiliser = [(-0.38, 0.0), (-0.47, 0.0), (-0.52, s * tail_span), (-0.47, s * tail_span)]
        parts += [
            Part(prism(wing, "y", y - radius * 0.5 - 0.009, y - radius * 0.5 + 0.009)),
            Part(prism(stabiliser, "y", y + 0.02, y + 0.034)),
        ]
    engine = u(0.34, 0.42) * span
    jets = rng.random() < 0.6
    nacelle = root - sweep * engine / span
    if jets:
        for _, s in SIDES:
            pod = frustum(
                (nacelle - 0.1, y - radius - 0.012, s * engine),
                (nacelle + 0.06, y - radius - 0.012, s * engine),
                0.022,
                0.036,
            )
            parts.append(Part(pod, "accent"))
    for x, z in ((0.33, 0.0), (-0.03, 0.09), (-0.03, -0.09)):
        parts.append(Part(disc_at((x, 0.02, z), y - radius * 0.6 - 0.02, 0.01), "dark"))
        parts.append(Part(frustum((x, 0.03, z - 0.014), (x, 0.03, z + 0.014), 0.03, 0.03), "dark"))
    points = (
        Keypoint("nose", (0.47, y, 0), 0.05),
        Keypoint("tail", (-0.49, y + 0.025, 0), 0.05),
        Keypoint("fin_top", (-0.5, y + fin * 0.97, 0), 0.04),
        Keypoint("cockpit", (0.4, y + radius * 0.7, 0), 0.05),
        *(Keypoint(f"wing_{n}", (root - sweep - tip / 2, y - radius * 0.5, s * span * 0.97), 0.04) for n, s in SIDES),
        *(Keypoint(f"stabiliser_{n}", (-0.49, y + 0.027, s * tail_span * 0.95), 0.04) for n, s in SIDES),
    )
    return Shape(tuple(parts), points)


def house(rng: np.random.Generator) -> Shape:
    """Build a house whose door faces z; the ridge runs along x."""
    u = rng.uniform
    x, z, wall = u(0.36, 0.46), u(0.26, 0.36), u(0.38, 0.5)
    rise, over = u(0.24, 0.36), u(0.04, 0.07)
    slope = rise / z
    eaves, ridge = wall - over * slope, wall + rise
    roof = prism([(-z - over, eaves), (z + over, eaves), (0, ridge + 0.05)], "x", -x - over, x + over)
    below = prism([(-z - over, eaves - 0.05), (z + over, eaves - 0.05), (0, ridge)], "x", -x - 1, x + 1)
    chimney = u(0.3, 0.7) * x * (1 if rng.random() < 0.5 else -1)
    parts = [
        Part(block(0, (-x, x, -z, z), wall, (-x, x, -z, z))),
        Part(prism([(-z, wall), (z, wall), (0, ridge)], "x", -x, x)),
        Part(roof, "accent", below),
        Part(box((chimney, wall + rise * 0.8, -z * 0.4), (0.045, rise * 0.45, 0.045)), "accent"),
        Part(box((0, 0.14, z), (0.062, 0.14, 0.012)), "light"),
        Part(box((0, 0.135, z), (0.05, 0.13, 0.02)), "dark"),
    ]
    for across in (-0.62 * x, 0.62 * x):
        for end in (1, -1):
            parts += _window((across, wall * 0.58, end * z), (0.075, 0.08, 0.012))
    for end in (1, -1):
        parts += _window((end * x, wall * 0.58, 0), (0.012, 0.08, 0.075))
    points = (
        *(Keypoint(f"corner_{e}_{n}", (sx * x * 0.98, 0.03, sz * z), 0.06) for n, sx in SIDES for e, sz in ENDS),
        *(Keypoint(f"eaves_{e}_{n}", (sx * (x + over * 0.8), wall, sz * z), 0.12) for n, sx in SIDES for e, sz in ENDS),
        *(Keypoint(f"ridge_{n}", (s * (x + over * 0.8), ridge + 0.03, 0), 0.06) for n, s in SIDES),
        Keypoint("door", (0, 0.14, z + 0.02)),
        Keypoint("chimney", (chimney, wall + rise * 1.22, -z * 0.4), 0.08),
    )
    return Shape(tuple(parts), points)


def _window(at: tuple[float, float, float], half: tuple[float, float, float]) -> list[Part]:
    """Return a pane in a frame; the thinnest side goes through the wall."""
    pane = tuple(h * 1.6 if h == min(half) else h * 0.78 for h in half)
    return [Part(box(at, half), "light"), Part(box(at, (pane[0], pane[1], pane[2])), "dark")]


def tree(rng: np.random.Generator) -> Shape:
    """Build a tree: a conifer, or a broad crown of balls."""
    u = rng.uniform
    trunk = u(0.045, 0.07)
    low = u(0.25, 0.38)
    crown: list[Body]
    if rng.random() < 0.4:
        tiers, wide = int(rng.integers(3, 5)), u(0.27, 0.36)
        step = (1 - low) / (tiers + 0.8)
        crown = [
            disc(low + k * step, step * 1.8, wide * (1 - 0.72 * k / tiers), wide * (1 - k / tiers) * 0.12)
            for k in range(tiers)
        ]
    else:
        top, turn = u(0.15, 0.19), u(0, math.tau)
        middle, wide, high = (low + 1) / 2 + 0.03, u(0.28, 0.36), (1 - low) / 2 - 0.1
        crown = [ball((0, 1 - top, 0), top), ball((0, middle, 0), (wide * 0.85, high * 0.95, wide * 0.85))]
        lumps = int(rng.integers(16, 24))
        for k in range(lumps):  # spread over an ellipsoid by the golden angle
            level = 0.92 - 1.75 * (k + 0.5) / lumps
            out, angle = wide * math.sqrt(1 - level * level), turn + 2.39996 * k
            crown.append(ball((out * math.cos(angle), middle + high * level, out * math.sin(angle)), u(0.09, 0.13)))
    parts = (Part(disc(0, low + 0.25, trunk, trunk * 0.6), "accent"), *(Part(body) for body in crown))
    points = (
        Keypoint("root", (0, 0.03, 0), 0.12),
        Keypoint("trunk", (0, low * 0.6, 0), 0.12),
        Keypoint("crown", (0, (low + 1) / 2, 0), 0.45),
        Keypoint("top", (0, 0.97, 0), 0.2),
    )
    return Shape(parts, points)


def dog(rng: np.random.Generator) -> Shape:
    """Build a dog that looks towards x, in mid-step."""
    u = rng.uniform
    back, fat = u(0.42, 0.5), u(0.115, 0.145)
    head, muzzle = (u(0.36, 0.4), back + u(0.15, 0.22)), u(0.11, 0.16)
    hx, hy = head
    nose = (hx + 0.08 + muzzle, hy - 0.045, 0.0)
    parts = [
        Part(frustum((-0.24, back, 0), (0.22, back + 0.02, 0), fat * 0.85, fat)),
        Part(ball((0.22, back + 0.01, 0), (fat * 1.02, fat * 1.12, fat))),
        Part(ball((-0.24, back, 0), (fat * 0.9, fat * 0.95, fat * 0.9))),
        *along(((0.24, back + 0.04, 0), (hx - 0.02, hy - 0.02, 0), (hx, hy, 0)), (fat * 0.8, 0.075, 0.07)),
        Part(ball((hx, hy, 0), (0.115, 0.1, 0.095))),
        Part(frustum((hx + 0.05, hy - 0.025, 0), (nose[0] - 0.02, nose[1], 0), 0.068, 0.042)),
        Part(ball((nose[0] - 0.02, nose[1], 0), 0.042)),
        Part(ball((nose[0] + 0.005, nose[1] + 0.02, 0), (0.028, 0.022, 0.026)), "dark"),
    ]
    floppy = rng.random() < 0.5
    ears, paws = {}, {}
    for name, s in SIDES:
        if floppy:
            ears[name] = (hx - 0.02, hy - 0.03, s * 0.105)
            parts.append(Part(ball((hx - 0.03, hy + 0.0, s * 0.1), (0.05, 0.1, 0.025)), "accent"))
        else:
            ears[name] = (hx - 0.05, hy + 0.17, s * 0.075)
            parts.append(
                Part(frustum((hx - 0.03, hy + 0.05, s * 0.06), (hx - 0.055, hy + 0.2, s * 0.08), 0.05, 0.006), "accent")
            )
        parts.append(Part(ball((hx + 0.085, hy + 0.035, s * 0.052), 0.018), "dark"))
        for end, ex in ENDS:
            hip = ex * 0.22
            stride = u(-0.07, 0.07)
            z = s * fat * 0.62
            knee = (hip + stride * 0.4 - 0.02 * ex, back * 0.45, z)
            foot = (hip + stride, 0.035, z)
            paws[end, name] = (foot[0] + 0.015, 0.03, z)
            parts += along(((hip, back - 0.02, z), knee, foot), (0.07, 0.042, 0.03))
            parts.append(Part(ball((foot[0] + 0.018, 0.03, z), (0.05, 0.03, 0.036))))
    lift = u(0.05, 0.28)
    tail = ((-0.3, back + 0.04, 0.0), (-0.4, back + 0.04 + lift * 0.5, 0.0), (-0.47, back + 0.04 + lift, 0.0))
    parts += along(tail, (0.035, 0.026, 0.014))
    points = (
        Keypoint("nose", (nose[0] + 0.02, nose[1] + 0.02, 0), 0.06),
        *(Keypoint(f"eye_{n}", (hx + 0.09, hy + 0.035, s * 0.06)) for n, s in SIDES),
        *(Keypoint(f"ear_{n}", at, 0.06) for n, at in ears.items()),
        *(Keypoint(f"paw_{end}_{n}", at, 0.06) for (end, n), at in paws.items()),
        Keypoint("tail_tip", tail[-1], 0.05),
        Keypoint("tail_root", tail[0], 0.08),
    )
    return Shape(tuple(parts), points)
