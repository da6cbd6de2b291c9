"""Materials and light, drawn at random; no category has colours or patterns of its own."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from scenes.bodies import Floats
from scenes.catalogue import BOARD, SIGN, build
from scenes.scene import Instance, Light, Vector
from scenes.shapes import Surface
from scenes.textures import LETTERING, Colour, Material, linear

PALETTE: Mapping[str, tuple[int, int, int]] = {
    "red": (205, 35, 35),
    "orange": (240, 125, 20),
    "yellow": (240, 210, 40),
    "green": (50, 150, 60),
    "blue": (40, 85, 205),
    "purple": (125, 50, 165),
    "white": (235, 235, 232),
    "black": (36, 36, 38),
}
"""Colours that captions and questions name, far enough apart to be distinguished under any of the lights."""
COLOURS = tuple(PALETTE)

WORDS = ("stop", "exit", "open", "sale", "taxi", "cafe", "park", "zoo", "shop", "bus")
"""Words on signs."""

PATTERNS = ("plain", "plain", "plain", "grain", "wood", "stripes", "checks", "dots", "speckle", "mottled", "marble")
"""Patterns of things; a pattern that is repeated is drawn more often."""

LETTER_ROWS = 64
"""Height of a sign's lettering in texels."""


@dataclass(frozen=True)
class Ground:
    """A kind of floor, with its name in captions."""

    name: str
    pattern: str
    cells: tuple[float, float]
    tones: tuple[tuple[int, int, int], ...]


GROUNDS = (
    Ground("a wooden floor", "planks", (5.0, 9.0), ((176, 128, 84), (134, 92, 60), (205, 165, 120))),
    Ground("a tiled floor", "tiles", (2.0, 4.0), ((205, 198, 186), (150, 140, 132), (120, 132, 140))),
    Ground("a carpet", "mottled", (3.0, 8.0), ((130, 110, 120), (95, 110, 130), (150, 130, 110))),
    Ground("grass", "grain", (9.0, 14.0), ((96, 132, 56), (120, 140, 70), (80, 112, 60))),
    Ground("sand", "grain", (6.0, 10.0), ((214, 188, 144), (196, 170, 128))),
    Ground("concrete", "mottled", (0.8, 2.0), ((150, 150, 148), (120, 122, 124))),
)
OUTDOORS = ("grass", "sand", "concrete")
"""Names of the grounds of outdoor scenes."""


def draw_instance(rng: np.random.Generator, kind: str, *, colour: str | None = None, says: str = "") -> Instance:
    """Draw a thing with random proportions and materials.

    Args:
        colour: colour of its main material; random if not given.
        says: word on a sign.
    """
    shape = build(kind, rng)
    colour = colour or str(rng.choice(COLOURS))
    accent = str(rng.choice(COLOURS))
    grey = int(rng.integers(20, 60))
    pale = int(rng.integers(190, 245))
    surfaces: dict[Surface, Material] = {
        "main": _coloured(rng, PALETTE[colour], str(rng.choice(PATTERNS))),
        "accent": _coloured(rng, _muted(PALETTE[accent]), "plain" if rng.random() < 0.6 else "wood"),
        "dark": Material("plain", linear(grey, grey, grey + 4), linear(0, 0, 0), gloss=0.6),
        "light": Material("plain", linear(pale, pale, pale - 12), linear(0, 0, 0), gloss=0.2),
    }
    if kind == SIGN:
        surfaces["board"] = _board(rng, says)
    return Instance(kind, colour, shape, surfaces, says)


def _muted(levels: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return a colour half way to grey, so that it is not taken for the colour of the whole thing."""
    grey = sum(levels) // 3
    red, green, blue = ((level + grey) // 2 for level in levels)
    return red, green, blue


def _coloured(rng: np.random.Generator, levels: tuple[int, int, int], pattern: str) -> Material:
    """Return a material with a pattern of a colour and a shade of it."""
    first = _varied(rng, levels)
    brightness = max(first)
    factor = rng.uniform(2.2, 3.2) if brightness < 0.05 else rng.uniform(0.35, 0.62)
    second = (first[0] * factor, first[1] * factor, first[2] * factor)
    return Material(
        pattern,
        first,
        second,
        cells=float(rng.uniform(4, 10)),
        turn=_any_turn(rng),
        shift=_shift(rng),
        gloss=float(rng.choice([0.0, 0.15, 0.35])),
        seed=int(rng.integers(1 << 16)),
    )


def _varied(rng: np.random.Generator, levels: tuple[int, int, int]) -> Colour:
    """Return the colour with slightly different brightness and hue."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(level / 255 for level in levels))
    hue += rng.uniform(-0.015, 0.015)
    value = min(value * rng.uniform(0.86, 1.05), 1.0)
    red, green, blue = (round(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value))
    return linear(red, green, blue)


def _any_turn(rng: np.random.Generator) -> Floats:
    """Return random axes, one per row: a rotation, which may be mirrored."""
    q, r = np.linalg.qr(rng.standard_normal((3, 3)))
    return (q * np.sign(np.diag(r))).astype(np.float32)


def _shift(rng: np.random.Generator) -> tuple[float, float, float]:
    x, y, z = rng.uniform(0, 100, 3)
    return float(x), float(y), float(z)


def _board(rng: np.random.Generator, word: str) -> Material:
    """Return a sign's board: dark letters on a pale ground, or the reverse."""
    dark = tuple(int(level) for level in rng.integers(10, 90, 3))
    pale = tuple(int(level) for level in rng.integers(200, 250, 3))
    first, second = (pale, dark) if rng.random() < 0.5 else (dark, pale)
    return Material(LETTERING, linear(*first), linear(*second), picture=lettering(word))


def lettering(word: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return a word in capitals that fills a board: [LETTER_ROWS, as wide as the board], 255 where there is ink."""
    height = LETTER_ROWS
    width = round(height * BOARD[0] / BOARD[1])
    big = ImageFont.load_default(size=4 * height)
    text = word.upper()
    left, top, right, bottom = big.getbbox(text, stroke_width=6)
    ink = Image.new("L", (math.ceil(right - left), math.ceil(bottom - top)))
    ImageDraw.Draw(ink).text((-left, -top), text, fill=255, font=big, stroke_width=6)
    room = (0.86 * width, 0.7 * height)
    factor = min(room[0] / ink.width, room[1] / ink.height)
    ink = ink.resize((round(ink.width * factor), round(ink.height * factor)), Image.Resampling.LANCZOS)
    board = Image.new("L", (width, height))
    board.paste(ink, ((width - ink.width) // 2, (height - ink.height) // 2))
    return np.asarray(board)


def draw_ground(rng: np.random.Generator, *, outdoors: bool) -> tuple[str, Material]:
    """Draw a floor's name and material."""
    ground = GROUNDS[int(rng.choice([i for i, g in enumerate(GROUNDS) if (g.name in OUTDOORS) == outdoors]))]
    first = _varied(rng, ground.tones[int(rng.integers(len(ground.tones)))])
    factor = rng.uniform(0.4, 0.7)
    material = Material(
        ground.pattern,
        first,
        (first[0] * factor, first[1] * factor, first[2] * factor),
        cells=float(rng.uniform(*ground.cells)),
        turn=_flat_turn(rng.uniform(0, math.tau)),
        shift=_shift(rng),
        gloss=float(rng.choice([0.0, 0.1])) if not outdoors else 0.0,
        seed=int(rng.integers(1 << 16)),
    )
    return ground.name, material


def _flat_turn(angle: float) -> Floats:
    """Return axes, one per row, of which the first two lie in the floor, so that the pattern does."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, 0, s], [-s, 0, c], [0, 1, 0]], np.float32)


def draw_wall(rng: np.random.Generator, normal: Vector, *, outdoors: bool) -> Material:
    """Draw the material of a wall, whose pattern lies in the wall: plaster, paper, boards or bricks."""
    pattern = str(
        rng.choice(
            ["bricks", "bricks", "grain", "stripes"]
            if outdoors
            else ["plain", "plain", "stripes", "mottled", "bricks", "tiles"]
        )
    )
    hue, saturation, value = rng.uniform(0, 1), rng.uniform(0.03, 0.3), rng.uniform(0.5, 0.92)
    red, green, blue = (round(255 * c) for c in colorsys.hsv_to_rgb(hue, saturation, value))
    first = linear(red, green, blue)
    factor = rng.uniform(0.6, 0.85)
    along = (normal[2], 0, -normal[0])
    return Material(
        pattern,
        first,
        (first[0] * factor, first[1] * factor, first[2] * factor),
        cells=float({"bricks": rng.uniform(5, 9), "stripes": rng.uniform(1.5, 6)}.get(pattern, rng.uniform(1.5, 3))),
        turn=np.array([along, (0, 1, 0), normal], np.float32),
        shift=_shift(rng),
        seed=int(rng.integers(1 << 16)),
    )


def draw_light(rng: np.random.Generator, heading: float) -> Light:
    """Draw the light; the sun is anywhere but low in front of the camera, which looks along `heading`."""
    azimuth = heading + math.pi + rng.uniform(-2.1, 2.1)
    height = math.radians(rng.uniform(32, 68))
    level = math.cos(height)
    towards = np.array([level * math.sin(azimuth), math.sin(height), level * math.cos(azimuth)])
    warmth = rng.uniform(-0.08, 0.1)
    strength, fill = rng.uniform(0.75, 1.15), rng.uniform(0.34, 0.6)
    sun = (strength * (1 + warmth), strength, strength * (1 - warmth))
    return Light(towards, sun, (fill * (1 - warmth / 2), fill, fill * (1 + warmth / 2)))


def draw_sky(rng: np.random.Generator) -> tuple[Colour, Colour]:
    """Draw the sky's colours at the horizon and overhead, clear to overcast."""
    clear = rng.uniform(0, 1)
    grey = rng.uniform(150, 220)
    low = (grey + 20, grey + 22 + 6 * clear, grey + 24 + 10 * clear)
    high = (grey - 90 * clear, grey - 40 * clear, grey + 20 * clear)
    horizon, overhead = (linear(*(round(min(max(c, 0), 255)) for c in colour)) for colour in (low, high))
    return horizon, overhead
