"""Scenes for each purpose, drawn at random until everything that they have to show is visible.

A scene is a pure function of (seed, purpose, number). It is accepted or rejected by a small rendering of fixed size, so
that the size of the picture changes nothing.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from scenes.catalogue import BOARD, BOARD_HEIGHT, CATEGORIES, CLUTTER, SIGN
from scenes.materials import COLOURS, WORDS, draw_instance
from scenes.render import look_up
from scenes.scene import Scene
from scenes.stage import group, portrait

PROBE_PX = 56
ATTEMPTS = 400
Draw = Callable[[np.random.Generator], Scene | None]


class Spot(NamedTuple):
    """The place of a thing in the picture; x and y, from 0 to 1, are the mean of its visible pixels."""

    x: float
    y: float
    depth: float
    """Median depth in metres."""
    area: float
    """Share of the picture that its visible pixels cover."""
    shown: float
    """Visible pixels divided by those that it would have if it were alone."""


def rng_of(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """Return the random generator for one purpose."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *numbers])


def classification_scene(seed: int, number: int, category: str) -> Scene:
    """Draw a scene of one thing amid clutter, seen from any side."""

    def draw(rng: np.random.Generator) -> Scene | None:
        main = draw_instance(rng, category)
        scene = portrait(rng, main, yaw=rng.uniform(0, math.tau), fill=rng.uniform(0.7, 1.05), clutter=2)
        return scene if _main_seen(scene) else None

    return _drawn(draw, seed, "classification", number)


def room_scene(seed: int, number: int) -> Scene:
    """Draw a scene of several things and some clutter, indoors or outdoors."""

    def draw(rng: np.random.Generator) -> Scene | None:
        kinds = [str(kind) for kind in rng.choice(CATEGORIES, int(rng.integers(3, 7)))]
        kinds += [CLUTTER] * int(rng.integers(1, 4))
        scene = group(rng, [draw_instance(rng, kind) for kind in kinds], outdoors=rng.random() < 0.35)
        return scene if scene and _all_seen(scene, area=0.008, shown=0.35) else None

    return _drawn(draw, seed, "room", number)


def correspondence_scene(seed: int, number: int, category: str, instance: int) -> Scene:
    """Draw a scene of an instance of a category, its first thing, seen from the front half."""
    main = draw_instance(rng_of(seed, "instance", CATEGORIES.index(category), instance), category)

    def draw(rng: np.random.Generator) -> Scene | None:
        yaw = rng.uniform(-0.8, 0.8) - math.pi / 4
        scene = portrait(rng, main, yaw=yaw, fill=rng.uniform(0.85, 1.15), clutter=2)
        return scene if _main_seen(scene) else None

    return _drawn(draw, seed, "correspondence", number)


def caption_scene(seed: int, number: int) -> Scene:
    """Draw a scene of two or three things of different categories beside each other."""

    def draw(rng: np.random.Generator) -> Scene | None:
        kinds = rng.permutation(CATEGORIES)[: int(rng.integers(2, 4))]
        things = [draw_instance(rng, str(kind)) for kind in kinds]
        scene = group(rng, things, outdoors=rng.random() < 0.5)
        return scene if scene and _all_seen(scene, area=0.02, shown=0.6) and _apart(scene) else None

    return _drawn(draw, seed, "caption", number)


@dataclass(frozen=True)
class Plan:
    """The answers to a scene's questions, drawn before the scene, so that hard cases are as frequent as easy ones."""

    count: int
    colours: tuple[str, ...]
    word: str


def question_plan(seed: int, number: int) -> Plan:
    """Draw the plan of one picture."""
    rng = rng_of(seed, "question plan", number)
    count, word = int(rng.integers(1, 6)), WORDS[int(rng.integers(len(WORDS)))]
    return Plan(count, tuple(str(colour) for colour in rng.choice(COLOURS, count)), word)


def question_scene(seed: int, number: int) -> Scene:
    """Draw a scene of one to five things of different categories and a sign, which comes last."""
    plan = question_plan(seed, number)

    def draw(rng: np.random.Generator) -> Scene | None:
        kinds = rng.permutation(CATEGORIES)[: plan.count]
        coloured = zip(kinds, plan.colours, strict=True)
        things = [draw_instance(rng, str(kind), colour=colour) for kind, colour in coloured]
        sign = draw_instance(rng, SIGN, says=plan.word)
        scene = group(rng, things, outdoors=rng.random() < 0.5, sign=sign)
        if not scene or not _all_seen(scene, area=0.006, shown=0.5):
            return None
        spots = spots_of(scene)
        readable = spots[-1].shown > 0.97 and spots[-1].area > 0.08 and _whole_board(scene)
        return scene if readable and (plan.count == 1 or beside(spots[:-1])) else None

    return _drawn(draw, seed, "question", number)


def _drawn(draw: Draw, seed: int, purpose: str, number: int) -> Scene:
    for attempt in range(ATTEMPTS):
        if scene := draw(rng_of(seed, purpose, number, attempt)):
            return scene
    raise AssertionError(f"no scene for {purpose} {number} of seed {seed} after {ATTEMPTS} attempts")


def spots_of(scene: Scene) -> list[Spot]:
    """Return the place of each thing in the picture; NaN for one that is not visible."""
    what = look_up(scene, PROBE_PX)
    spots = []
    for i, thing in enumerate(scene.things):
        rows, columns = np.nonzero(what.what == i)
        alone = look_up(replace(scene, things=(thing,), walls=()), PROBE_PX).what == 0
        x, y = (float(axis.mean()) / PROBE_PX if len(axis) else math.nan for axis in (columns, rows))
        depth = float(np.median(what.depth[rows, columns])) if len(rows) else math.nan
        spots.append(Spot(x, y, depth, len(rows) / PROBE_PX**2, len(rows) / max(int(alone.sum()), 1)))
    return spots


def beside(spots: Sequence[Spot]) -> list[tuple[int, int]]:
    """Return the pairs of things of which the first is clearly to the left of the second."""
    return [(i, j) for i, a in enumerate(spots) for j, b in enumerate(spots) if b.x - a.x > 0.15]


def _main_seen(scene: Scene) -> bool:
    spot = spots_of(scene)[0]
    return spot.shown > 0.85 and spot.area > 0.06


def _all_seen(scene: Scene, *, area: float, shown: float) -> bool:
    named = [spot for spot, thing in zip(spots_of(scene), scene.things, strict=True) if thing.kind != CLUTTER]
    return all(spot.area > area and spot.shown > shown for spot in named)


def _whole_board(scene: Scene) -> bool:
    """Return whether the last thing, a sign, has all corners of its board in the picture."""
    x, y = BOARD
    corners = np.array([(sx * x, BOARD_HEIGHT + sy * y, 0.0) for sx in (-1, 1) for sy in (-1, 1)])
    pixels, _ = scene.camera.project(scene.things[-1].to_world(corners), PROBE_PX)
    return bool(((pixels > 0) & (pixels < PROBE_PX - 1)).all())


def _apart(scene: Scene) -> bool:
    xs = sorted(spot.x for spot in spots_of(scene))
    return all(b - a > 0.15 for a, b in itertools.pairwise(xs))
