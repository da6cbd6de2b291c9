"""Scenes by hand, and a camera written anew: what the truth of renderings is held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scenes.bodies import Body
from scenes.scene import Camera, Instance, Light, Scene, Thing, Wall, looking, yawed
from scenes.shapes import Part, Shape
from scenes.textures import Material

GREY = Material("plain", (0.4, 0.4, 0.4), (0.1, 0.1, 0.1))
NOON = np.array([0.0, 1.0, 0.0])


def thing_of(
    body: Body, place: Sequence[float] = (0, 0, 0), *, yaw: float = 0.3, scale: float = 1.0, kind: str = "mug"
) -> Thing:
    instance = Instance(kind, "red", Shape((Part(body),)), {"main": GREY})
    return Thing(instance, yawed(yaw), np.array(place, float), scale)


def scene_of(
    *things: Thing, camera: Camera | None = None, walls: tuple[Wall, ...] = (), towards: NDArray[np.float64] = NOON
) -> Scene:
    light = Light(towards / np.linalg.norm(towards), (1, 1, 1), (0.4, 0.4, 0.4))
    camera = camera or looking(np.array([0.3, 1.5, -4.0]), np.array([0.0, 0.5, 0.0]), 1.1, roll=0.1)
    return Scene(camera, things, GREY, "concrete", walls, light, ((0.5, 0.6, 0.7), (0.2, 0.3, 0.6)), 7)


def intrinsics(camera: Camera, size: int) -> NDArray[np.float64]:
    """The [3, 4] matrix from the world to homogeneous pixels, from its textbook definition: K [R | -R c], y down."""
    focal, middle = camera.zoom * size, (size - 1) / 2
    k = np.array([[focal, 0, middle], [0, focal, middle], [0, 0, 1]])
    r = np.diag([1.0, -1.0, 1.0]) @ camera.axes
    return k @ np.hstack([r, (-r @ camera.eye)[:, None]])


def pixels_of(points: Any, camera: Camera, size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the pixels [n, 2] of points [n, 3] of the world, and their distances [n] before the camera's plane."""
    seen = intrinsics(camera, size) @ np.c_[points, np.ones(len(points))].T
    return (seen[:2] / seen[2]).T, seen[2]


def world_of(thing: Thing, own: NDArray[Any]) -> NDArray[np.float64]:
    """A thing's own points [n, 3] in the world."""
    return np.array([thing.turn @ (thing.scale * p) + thing.place for p in own.astype(np.float64)]).reshape(-1, 3)
