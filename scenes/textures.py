"""Colours of surfaces: patterns in space, computed only from coordinates.

Shapes: n points, float32 [3, n]. A pattern returns [n] numbers from 0 (a material's first colour) to 1 (its second).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scenes.bodies import Floats, floats, turned
from scenes.catalogue import BOARD, BOARD_HEIGHT

Pattern = Callable[[Floats, int], Floats]
Colour = tuple[float, float, float]
"""Red, green and blue in linear light, 0 to 1."""

GAMMA = 2.2
LETTERING = "lettering"
FARTHEST = 1e8
"""Largest cell coordinate, so that it fits an integer; a floor is visible as far as the horizon."""


@dataclass(frozen=True)
class Material:
    """The appearance of a surface."""

    pattern: str
    first: Colour
    second: Colour
    cells: float = 4.0
    """Cells of the pattern per unit of length."""
    turn: Floats | None = None
    """[3, 3], the pattern's axes in the surface's coordinates, one per row; orthonormal."""
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    gloss: float = 0.0
    seed: int = 0
    picture: NDArray[np.uint8] | None = None
    """[h, w], the picture of `lettering`: 255 is the second colour."""


def linear(red: int, green: int, blue: int) -> Colour:
    """Return the linear colour of a picture's levels, 0 to 255."""
    return (red / 255) ** GAMMA, (green / 255) ** GAMMA, (blue / 255) ** GAMMA


def paint(material: Material, points: Floats, footprint: Floats) -> Floats:
    """Return the colours [3, n] of points.

    Args:
        footprint: [n], size of a pixel at each point, in the same unit as `points`; finer patterns fade out.
    """
    first, second = (np.array(c, np.float32)[:, None] for c in (material.first, material.second))
    if material.pattern == LETTERING:
        assert material.picture is not None
        share = _letters(points, material.picture)
    else:
        placed = points if material.turn is None else turned(material.turn, points)
        cells = placed * material.cells + np.array(material.shift, np.float32)[:, None]
        cells = np.clip(cells, -FARTHEST, FARTHEST)
        share = PATTERNS[material.pattern](cells, material.seed)
        # A pattern fades out as its cells shrink to the size of a pixel, where it would alias.
        clear = np.clip((0.7 - footprint * material.cells) / 0.4, 0, 1)
        share = 0.4 + (share - 0.4) * clear if material.pattern != "plain" else share
    return first + (second - first) * share


def noise(points: Floats, seed: int) -> Floats:
    """Return smooth random numbers: one at each whole coordinate, blended in between."""
    whole = np.floor(points)
    part = points - whole
    blend = part * part * (3 - 2 * part)
    corner = whole.astype(np.int32).view(np.uint32)
    ends = [[c * np.uint32(k) for c in (axis, axis + np.uint32(1))] for axis, k in zip(corner, LATTICE, strict=True)]
    total = np.zeros(points.shape[1], np.float32)
    for i, x in enumerate(ends[0]):
        share_x = blend[0] if i else 1 - blend[0]
        for j, y in enumerate(ends[1]):
            share_xy = share_x * (blend[1] if j else 1 - blend[1])
            for k, z in enumerate(ends[2]):
                total += share_xy * (blend[2] if k else 1 - blend[2]) * _scrambled(x ^ y ^ z, seed)
    return total


LATTICE = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
"""Odd numbers, so that steps along the three axes differ in all bits."""


def _scrambled(bits: NDArray[np.uint32], seed: int) -> Floats:
    mixed = bits ^ np.uint32((seed * 0x27D4EB2F) & 0xFFFFFFFF)
    mixed = (mixed ^ (mixed >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
    mixed = (mixed ^ (mixed >> np.uint32(12))) * np.uint32(0x297A2D39)
    return (mixed >> np.uint32(8)).astype(np.float32) * 2**-24


def clouds(points: Floats, seed: int) -> Floats:
    """Return a sum of noise at three scales."""
    coarse, middle, fine = (noise(points * k, seed + i) for i, k in enumerate((1.0, 2.1, 4.3)))
    return floats(coarse * 0.55 + middle * 0.3 + fine * 0.15)


def _plain(points: Floats, seed: int) -> Floats:
    return np.zeros(points.shape[1], np.float32)


def _checks(points: Floats, seed: int) -> Floats:
    return floats(np.floor(points).sum(axis=0, dtype=np.float32) % 2)


def _stripes(points: Floats, seed: int) -> Floats:
    return floats(points[0] % 1 < 0.5)


def _dots(points: Floats, seed: int) -> Floats:
    away = points % 1 - 0.5
    return floats(np.square(away).sum(axis=0) < 0.12)


def _wood(points: Floats, seed: int) -> Floats:
    wobble = noise(points * 0.7, seed)
    rings = np.sqrt(points[0] ** 2 + points[2] ** 2) * 1.3 + wobble * 2 + points[1] * 0.15
    return floats(0.5 + 0.5 * np.sin(rings * 6.28))


def _speckle(points: Floats, seed: int) -> Floats:
    return floats(np.clip((noise(points * 3, seed) - 0.6) * 8, 0, 1))


def _mottled(points: Floats, seed: int) -> Floats:
    return floats(np.clip(clouds(points, seed) * 2.2 - 0.6, 0, 1))


def _marble(points: Floats, seed: int) -> Floats:
    return floats(np.abs(np.sin(points[0] * 1.5 + clouds(points, seed) * 7)))


def _grain(points: Floats, seed: int) -> Floats:
    return floats(0.65 * noise(points * 2, seed) + 0.35 * noise(points * 7, seed + 1))


def _laid(points: Floats, seed: int, width: float, joint: float, offset: float) -> Floats:
    """Return rows of slabs, `width` wide and 1 high, each with a tone of its own, and joints between them."""
    row = np.floor(points[1])
    across = points[0] / width + row * offset
    column = np.floor(across)
    ids = column.astype(np.int32).view(np.uint32) * np.uint32(LATTICE[0])
    tone = _scrambled(ids ^ (row.astype(np.int32).view(np.uint32) * np.uint32(LATTICE[1])), seed)
    edge = np.minimum(_to_edge(across - column) * width, _to_edge(points[1] - row))
    return np.where(edge < joint, 1, 0.45 * tone)


def _to_edge(part: Floats) -> Floats:
    return floats(np.minimum(part, 1 - part))


def _planks(points: Floats, seed: int) -> Floats:
    stretched = points * np.array([[1.2], [6.0], [1.0]], np.float32)
    return floats(np.clip(_laid(points, seed, 6.0, 0.03, 0.37) + 0.4 * noise(stretched, seed) - 0.1, 0, 1))


def _tiles(points: Floats, seed: int) -> Floats:
    return _laid(points, seed, 1.0, 0.04, 0.0)


def _bricks(points: Floats, seed: int) -> Floats:
    return _laid(points, seed, 2.4, 0.09, 0.5)


PATTERNS: Mapping[str, Pattern] = {
    "plain": _plain,
    "checks": _checks,
    "stripes": _stripes,
    "dots": _dots,
    "wood": _wood,
    "speckle": _speckle,
    "mottled": _mottled,
    "marble": _marble,
    "grain": _grain,
    "planks": _planks,
    "tiles": _tiles,
    "bricks": _bricks,
}


def _letters(points: Floats, picture: NDArray[np.uint8]) -> Floats:
    """Return the values of a picture that fills the front of the sign's board; 0 elsewhere."""
    height, width = picture.shape
    x = (points[0] / (2 * BOARD[0]) + 0.5) * width - 0.5
    y = (0.5 - (points[1] - BOARD_HEIGHT) / (2 * BOARD[1])) * height - 0.5
    x, y = np.clip(x, 0, width - 1.001), np.clip(y, 0, height - 1.001)
    column, row = x.astype(np.intp), y.astype(np.intp)
    across, down = x - column, y - row
    levels = picture.astype(np.float32) / 255
    upper = levels[row, column] * (1 - across) + levels[row, column + 1] * across
    lower = levels[row + 1, column] * (1 - across) + levels[row + 1, column + 1] * across
    return np.where(points[2] > 0, upper * (1 - down) + lower * down, 0).astype(np.float32)
