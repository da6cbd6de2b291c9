"""The description of a scene: a camera, things on a floor between walls, and a light. Lengths are metres, y is up.

A picture's pixel centres are whole numbers: x = 0 is the first column, y = 0 the top row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from scenes.bodies import Floats, floats
from scenes.shapes import Shape, Surface
from scenes.textures import Colour, Material

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Camera:
    """A pinhole camera with square pictures."""

    eye: Vector
    """[3]."""
    axes: Vector
    """[3, 3]: right, up and forward, one per row; orthonormal."""
    zoom: float
    """Focal length divided by the picture's side."""

    def directions(self, x: NDArray[np.floating], y: NDArray[np.floating], size: int) -> Floats:
        """Return rays [3, n] through places in a picture of `size` pixels, one metre long along the optical axis.

        The point at `t` times such a ray has a z-depth of `t` metres.
        """
        right = (x - (size - 1) / 2) / (self.zoom * size)
        up = ((size - 1) / 2 - y) / (self.zoom * size)
        rays = self.axes[2][:, None] + self.axes[0][:, None] * right + self.axes[1][:, None] * up
        return floats(rays)

    def project(self, points: Vector, size: int) -> tuple[Vector, Vector]:
        """Return the places of points [n, 3] in a picture, x and y as [n, 2], and their z-depths [n]."""
        right, up, depth = self.axes @ (points - self.eye).T
        middle, focal = (size - 1) / 2, self.zoom * size
        return np.stack([middle + focal * right / depth, middle - focal * up / depth], axis=1), depth


@dataclass(frozen=True)
class Instance:
    """The looks of one thing, independent of where it stands."""

    kind: str
    """A category, `clutter` or `sign`."""
    colour: str
    """The name of its main material's colour."""
    shape: Shape
    surfaces: Mapping[Surface, Material]
    says: str = ""
    """Word on a sign."""


@dataclass(frozen=True)
class Thing:
    """An instance at its place."""

    instance: Instance
    turn: Vector
    """[3, 3], rotation from its own axes to the world's."""
    place: Vector
    """[3], position of its own origin."""
    scale: float
    """Metres per unit of its own coordinates."""

    @property
    def kind(self) -> str:
        return self.instance.kind

    @cached_property
    def sphere(self) -> tuple[Vector, float]:
        """Return centre and radius of a sphere that contains it."""
        centre, radius = self.instance.shape.sphere
        return self.to_world(centre[None])[0], radius * self.scale

    @property
    def footprint(self) -> float:
        """Return the radius of the circle about its place that it stands in."""
        return self.instance.shape.footprint * self.scale

    def to_world(self, points: Vector) -> Vector:
        """Return its own points [n, 3] in the world's coordinates."""
        return points @ self.turn.T * self.scale + self.place


@dataclass(frozen=True)
class Wall:
    """An upright plane, seen from the side that its normal points to."""

    normal: Vector
    """[3], horizontal, of length 1."""
    offset: float
    """`normal . p` of its points."""
    height: float
    material: Material


@dataclass(frozen=True)
class Light:
    """The sun, and the sky's ambient light."""

    towards: Vector
    """[3], of length 1."""
    sun: Colour
    ambient: Colour


@dataclass(frozen=True)
class Scene:
    """The data that decide a picture, apart from its size."""

    camera: Camera
    things: tuple[Thing, ...]
    floor: Material
    floor_name: str
    walls: tuple[Wall, ...]
    light: Light
    sky: tuple[Colour, Colour]
    """Colours at the horizon and overhead."""
    grain_seed: int
    """Seed of the sensor's noise."""


def yawed(angle: float) -> Vector:
    """Return a rotation about the upright axis that turns z towards x."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def looking(eye: Vector, target: Vector, zoom: float, roll: float = 0.0) -> Camera:
    """Return a camera that looks from one place at another, tilted by `roll`."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0.0, 1.0, 0.0])
    right /= np.linalg.norm(right)
    up = np.cross(right, forward)
    c, s = math.cos(roll), math.sin(roll)
    return Camera(eye, np.stack([c * right + s * up, c * up - s * right, forward]), zoom)
