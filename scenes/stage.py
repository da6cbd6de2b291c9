"""Random placement of a camera and things, and their surroundings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from scenes.catalogue import CLUTTER, SIGN
from scenes.materials import OUTDOORS, draw_ground, draw_instance, draw_light, draw_sky, draw_wall
from scenes.scene import Camera, Instance, Scene, Thing, Vector, Wall, looking, yawed

GAP_M = 0.06
"""Least gap between the circles that things stand in."""


@dataclass(frozen=True)
class Stage:
    """The camera and the things in front of it, while a scene is being drawn."""

    camera: Camera
    heading: float
    """Direction in which the camera looks, along the ground, in radians."""
    things: tuple[Thing, ...]

    def with_thing(self, thing: Thing) -> Stage:
        return replace(self, things=(*self.things, thing))


def portrait(rng: np.random.Generator, main: Instance, *, yaw: float, fill: float, clutter: int) -> Scene:
    """Draw a scene of one thing, its first, that fills much of the picture.

    Args:
        yaw: turn of the thing; at 0 its z faces the camera.
        fill: diameter of the sphere about it, as a share of the picture's side.
        clutter: largest number of other things.
    """
    heading = rng.uniform(0, math.tau)
    thing = Thing(main, yawed(heading + math.pi + yaw), np.zeros(3), rng.uniform(0.8, 1.2))
    centre, radius = thing.sphere
    zoom, pitch = rng.uniform(0.9, 1.6), math.radians(rng.uniform(8, 32))
    distance = 2 * radius * zoom / fill
    back = -math.cos(pitch) * _ahead(heading) + np.array([0, math.sin(pitch), 0])
    target = centre + rng.uniform(-0.16, 0.16, 3) * radius
    camera = looking(target + distance * back, target, zoom, roll=math.radians(rng.uniform(-5, 5)))
    stage = Stage(camera, heading, (thing,))
    for _ in range(int(rng.integers(clutter + 1))):
        other = draw_instance(rng, CLUTTER)
        placed = _placed(rng, stage, other, near=0.5 * distance, far=distance + 3, scale=rng.uniform(0.7, 1.4))
        stage = stage.with_thing(placed) if placed else stage
    return _surrounded(rng, stage, outdoors=rng.random() < 0.45)


def group(
    rng: np.random.Generator, instances: Sequence[Instance], *, outdoors: bool, sign: Instance | None = None
) -> Scene | None:
    """Draw a scene of things in front of the camera, and perhaps a sign that faces it; None if there is no room."""
    heading, zoom = rng.uniform(0, math.tau), rng.uniform(0.8, 1.1)
    eye = np.array([0, rng.uniform(0.9, 1.6), 0])
    fall = math.tan(math.radians(rng.uniform(10, 24)))
    camera = looking(eye, eye + _ahead(heading) - np.array([0, fall, 0]), zoom, math.radians(rng.uniform(-4, 4)))
    stage = Stage(camera, heading, ())
    slots = rng.permutation(len(instances))
    for slot, instance in zip(slots, instances, strict=True):
        across = (slot / len(slots), (slot + 1) / len(slots)) if sign else (0.0, 1.0)
        size = rng.uniform(0.6, 0.9) if sign else rng.uniform(0.8, 1.15)
        placed = _placed(rng, stage, instance, near=1.9, far=4.4, across=across, scale=size)
        if placed is None:
            return None
        stage = stage.with_thing(placed)
    if sign:
        placed = _placed(rng, stage, sign, near=2.2, far=3.0, across=(0.35, 0.65), scale=rng.uniform(0.95, 1.1))
        if placed is None:
            return None
        stage = stage.with_thing(placed)
    return _surrounded(rng, stage, outdoors=outdoors)


def _ahead(heading: float) -> Vector:
    return np.array([math.sin(heading), 0.0, math.cos(heading)])


def _placed(
    rng: np.random.Generator,
    stage: Stage,
    instance: Instance,
    *,
    near: float,
    far: float,
    scale: float,
    across: tuple[float, float] = (0.0, 1.0),
) -> Thing | None:
    """Return a thing at a free place in view; None if none was found.

    Args:
        near, far: least and largest distance from the camera in metres.
        across: part of the picture's width that it stands in.
    """
    ahead = _ahead(stage.heading)
    right = np.array([-ahead[2], 0.0, ahead[0]])
    ground = stage.camera.eye * np.array([1, 0, 1])
    facing = rng.uniform(-0.35, 0.35) if instance.kind == SIGN else rng.uniform(0, math.tau)
    for _ in range(30):
        away = rng.uniform(near, far)
        place = ground + away * (ahead + (0.9 * (rng.uniform(*across) - 0.5)) / stage.camera.zoom * right)
        thing = Thing(instance, yawed(stage.heading + math.pi + facing), place, scale)
        gaps = [np.linalg.norm(place - t.place) - thing.footprint - t.footprint for t in stage.things]
        if all(gap > GAP_M for gap in gaps):
            return thing
    return None


def _surrounded(rng: np.random.Generator, stage: Stage, *, outdoors: bool) -> Scene:
    """Return the scene of a stage, with a floor, walls, light and sky."""
    floor_name, floor = draw_ground(rng, outdoors=outdoors)
    assert (floor_name in OUTDOORS) == outdoors
    turn = rng.uniform(-0.6, 0.6)
    back = -_ahead(stage.heading + turn)
    side = np.array([back[2], 0.0, -back[0]]) * (1 if turn > 0 else -1)
    normals = [back] if outdoors or rng.random() < 0.3 else [back, side]
    walls = []
    for normal in normals if not outdoors or rng.random() < 0.6 else []:
        inside = [(thing.place, thing.footprint) for thing in stage.things] + [(stage.camera.eye, 0.4)]
        offset = min(float(normal @ place) - radius for place, radius in inside) - rng.uniform(0.2, 2.0)
        height = rng.uniform(0.4, 1.5) if outdoors else math.inf
        walls.append(Wall(normal, offset, height, draw_wall(rng, normal, outdoors=outdoors)))
    return Scene(
        camera=stage.camera,
        things=stage.things,
        floor=floor,
        floor_name=floor_name,
        walls=tuple(walls),
        light=draw_light(rng, stage.heading),
        sky=draw_sky(rng),
        grain_seed=int(rng.integers(1 << 31)),
    )
