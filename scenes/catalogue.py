"""All kinds of things: the categories, clutter and signs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from scenes import household, outdoors
from scenes.bodies import ball, box, frustum
from scenes.household import disc, disc_at
from scenes.shapes import Part, Shape

Builder = Callable[[np.random.Generator], Shape]

BUILDERS: Mapping[str, Builder] = {
    "airplane": outdoors.airplane,
    "bottle": household.bottle,
    "car": outdoors.car,
    "chair": household.chair,
    "dog": outdoors.dog,
    "house": outdoors.house,
    "lamp": household.lamp,
    "mug": household.mug,
    "table": household.table,
    "teapot": household.teapot,
    "tree": outdoors.tree,
    "umbrella": household.umbrella,
}
CATEGORIES = tuple(BUILDERS)
CLASSES = (*CATEGORIES, "floor", "wall", "sky")
"""Classes of masks: a pixel holds the index of its class here plus one, and 0 for everything else."""

CLUTTER, SIGN = "clutter", "sign"
"""Kinds of things that belong to no category."""

BOARD = (0.75, 0.28)
"""Half sides of the sign's board."""
BOARD_HEIGHT = 1.35
"""Height of the board's middle, above things that stand in front of it."""


def build(kind: str, rng: np.random.Generator) -> Shape:
    """Build a thing of a kind with random proportions."""
    if kind == SIGN:
        return sign()
    return clutter(rng) if kind == CLUTTER else BUILDERS[kind](rng)


def clutter(rng: np.random.Generator) -> Shape:
    """Build a simple solid that is nothing in particular."""
    u = rng.uniform
    style = int(rng.integers(5))
    if style == 0:
        x, y, z = u(0.12, 0.32), u(0.1, 0.35), u(0.12, 0.32)
        return Shape((Part(box((0, y, 0), (x, y, z))),))
    if style == 1:
        radius = u(0.15, 0.33)
        return Shape((Part(ball((0, radius, 0), radius)),))
    if style == 2:
        return Shape((Part(disc(0, u(0.15, 0.7), u(0.12, 0.3))),))
    if style == 3:
        return Shape((Part(disc(0, u(0.3, 0.8), u(0.18, 0.35), u(0.01, 0.1))),))
    radius, half = u(0.2, 0.34), u(0.05, 0.14)
    ring = frustum((0, radius, -half), (0, radius, half), radius, radius)
    hole = frustum((0, radius, -1), (0, radius, 1), radius * 0.6, radius * 0.6)
    return Shape((Part(ring, "main", hole),))


def sign() -> Shape:
    """Build a board on a post that faces z; other things may stand under it."""
    x, y = BOARD
    board = Part(box((0, BOARD_HEIGHT, 0), (x, y, 0.015)), "board")
    post = Part(disc_at((0, 0, -0.05), BOARD_HEIGHT + 0.7 * y, 0.03), "accent")
    return Shape((board, post), base=0.08)
