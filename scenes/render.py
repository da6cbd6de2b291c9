"""A picture of a scene, and the ground truth for each of its pixels.

Shapes: S the picture's side, n rays or points, float32 [3, n].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scenes.bodies import Flags, Floats, dot, floats
from scenes.catalogue import CATEGORIES, CLASSES, SIGN
from scenes.scene import Light, Scene
from scenes.textures import GAMMA, Material, clouds, paint
from scenes.trace import FLOOR, SKY, WALL, Hits, Patch, normals, patches, shadowed, to_own, trace

SUBPIXELS = ((-0.375, -0.125), (0.125, -0.375), (0.375, 0.125), (-0.125, 0.375))
"""Offsets at which the colour of pixels on edges is sampled."""
SENSOR_NOISE = 0.008
SHININESS = 40


@dataclass(frozen=True)
class Truth:
    """The exact ground truth at each pixel's centre."""

    depth: Floats
    """[S, S], z-depth of the surface in metres, along the optical axis; infinite for the sky."""
    what: NDArray[np.int16]
    """[S, S], a thing's index in the scene, FLOOR, WALL or SKY."""
    canonical: Floats
    """[S, S, 3], the surface point in the thing's own coordinates; NaN where there is no thing."""
    classes: NDArray[np.uint8]
    """[S, S], an index in CLASSES plus one; 0 for everything else."""


@dataclass(frozen=True)
class Picture:
    """A rendered scene."""

    rgb: NDArray[np.uint8]
    """[S, S, 3]."""
    truth: Truth


def render(scene: Scene, size: int) -> Picture:
    """Render the picture, `size` pixels wide and high."""
    y, x = (axis.ravel().astype(np.float64) for axis in np.mgrid[:size, :size])
    hits, colour, dark = _look(scene, x, y, size)
    edge = np.flatnonzero(_edges(scene, hits, dark, size))
    within = np.array(SUBPIXELS).T[:, :, None]
    _, samples, _ = _look(scene, (x[edge] + within[0]).ravel(), (y[edge] + within[1]).ravel(), size)
    colour[:, edge] = samples.reshape(3, len(SUBPIXELS), len(edge)).mean(axis=1)
    return Picture(_developed(scene, colour, size), _truth(scene, hits, size))


def look_up(scene: Scene, size: int) -> Truth:
    """Return only the ground truth, which takes far less time than the picture."""
    y, x = (axis.ravel().astype(np.float64) for axis in np.mgrid[:size, :size])
    hits = trace(scene, _eye(scene), scene.camera.directions(x, y, size))
    return _truth(scene, hits, size)


def _eye(scene: Scene) -> Floats:
    return scene.camera.eye.astype(np.float32)[:, None]


def _look(scene: Scene, x: NDArray[np.float64], y: NDArray[np.float64], size: int) -> tuple[Hits, Floats, Flags]:
    """Return hits, colours [3, n] in linear light, and shadow [n] at places in the picture."""
    rays = scene.camera.directions(x, y, size)
    hits = trace(scene, _eye(scene), rays)
    colour = np.empty_like(rays)
    dark = np.zeros(rays.shape[1], np.bool_)
    above = np.flatnonzero(hits.what == SKY)
    colour[:, above] = _sky(scene, rays[:, above])
    points = _eye(scene) + rays * np.where(np.isfinite(hits.t), hits.t, 0)
    normal = np.zeros_like(points)
    surface = list(patches(hits))
    for patch in surface:
        normal[:, patch.rows] = normals(scene, patch, points[:, patch.rows])
    seen = np.flatnonzero(hits.what != SKY)
    dark[seen] = shadowed(scene, points[:, seen], normal[:, seen], scene.light.towards)
    pixel = np.sqrt(dot(rays, rays)) * hits.t / (scene.camera.zoom * size)
    for patch in surface:
        rows = patch.rows
        facing = np.maximum(-dot(normal[:, rows], rays[:, rows]) / np.sqrt(dot(rays[:, rows], rays[:, rows])), 0.1)
        material, own, scale = _material(scene, patch, points[:, rows])
        albedo = paint(material, own, floats(pixel[rows] / facing / scale))
        open_ = _openness(scene, patch, points[:, rows], normal[:, rows])
        colour[:, rows] = _lit(scene.light, material, albedo, normal[:, rows], rays[:, rows], dark[rows], open_)
    return hits, colour, dark


def _material(scene: Scene, patch: Patch, points: Floats) -> tuple[Material, Floats, float]:
    """Return a patch's material, its points in the material's coordinates, and the unit of those in metres."""
    if patch.what == FLOOR:
        return scene.floor, points, 1.0
    if patch.what == WALL:
        return scene.walls[patch.part].material, points, 1.0
    thing = scene.things[patch.what]
    part = thing.instance.shape.parts[patch.part]
    return thing.instance.surfaces[part.surface], to_own(thing, points), thing.scale


def _openness(scene: Scene, patch: Patch, points: Floats, normal: Floats) -> Floats:
    """Return how much of the sky is visible from points, [n]; each thing occludes as a ball of similar size would.

    Source: the closed form of a ball's ambient occlusion, cos(angle) (r / d)^2; walls and floor are left out.
    """
    open_ = np.ones(points.shape[1], np.float32)
    for i, thing in enumerate(scene.things):
        if i == patch.what:
            continue
        centre, radius = thing.sphere
        radius *= 0.7
        to_centre = centre.astype(np.float32)[:, None] - points
        away = dot(to_centre, to_centre)
        cover = np.maximum(dot(to_centre, normal), 0) / np.sqrt(away) * np.minimum(radius * radius / away, 1)
        open_ *= 1 - 0.8 * cover
    return open_


def _lit(
    light: Light, material: Material, albedo: Floats, normal: Floats, rays: Floats, dark: Flags, open_: Floats
) -> Floats:
    """Return lit colours: Lambert's law for the sun, a sky that is brighter overhead, and a highlight if glossy."""
    sun = light.towards.astype(np.float32)[:, None]
    facing = np.where(dark, 0, np.maximum(dot(normal, sun), 0)).astype(np.float32)
    ambient = (0.75 + 0.25 * normal[1]) * open_
    sun_colour, sky_colour = (np.array(c, np.float32)[:, None] for c in (light.sun, light.ambient))
    colour = albedo * (sun_colour * facing + sky_colour * ambient)
    if material.gloss:
        half = floats(sun - rays / np.sqrt(dot(rays, rays)))
        half = floats(half / np.sqrt(dot(half, half)))
        shine = np.maximum(dot(normal, half), 0) ** SHININESS
        colour = colour + np.where(dark, 0, material.gloss * shine) * sun_colour
    return floats(colour)


def _sky(scene: Scene, rays: Floats) -> Floats:
    """Return the sky's colours, blended from the horizon to overhead, with clouds."""
    low, high = (np.array(c, np.float32)[:, None] for c in scene.sky)
    up = np.maximum(rays[1] / np.sqrt(dot(rays, rays)), 0.02)
    share = np.minimum(up * 2, 1)
    flat = floats(np.stack([rays[0] / up, rays[2] / up, np.zeros_like(up)]) * 0.25)
    cloud = np.clip(clouds(flat, scene.grain_seed & 0xFFFF) * 3 - 1.3, 0, 1) * share
    return floats(low + (high - low) * share + (0.85 - high) * cloud)


def _edges(scene: Scene, hits: Hits, dark: Flags, size: int) -> Flags:
    """Return pixels that differ from a neighbour in surface or shadow, and all of a sign, whose letters are fine."""
    code = (hits.what.astype(np.int32) * 256 + hits.part) * 4 + hits.carved * 2 + dark
    code = code.reshape(size, size)
    edge = np.zeros((size, size), np.bool_)
    down, across = code[1:] != code[:-1], code[:, 1:] != code[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    signs = [i for i, thing in enumerate(scene.things) if thing.kind == SIGN]
    return edge.ravel() | np.isin(hits.what, signs)


def _developed(scene: Scene, colour: Floats, size: int) -> NDArray[np.uint8]:
    """Convert linear light to 8-bit levels, with a sensor's noise."""
    grain = np.random.default_rng(scene.grain_seed).standard_normal((size, size, 3), np.float32)
    shade = np.clip(colour, 0, None)
    shade = shade * (1 + shade * 0.15) / (1 + 0.3 * shade)  # highlights roll off
    levels = np.clip(shade, 0, 1) ** (1 / GAMMA)
    picture = np.moveaxis(levels.reshape(3, size, size), 0, -1) + grain * SENSOR_NOISE
    levels_u8: NDArray[np.uint8] = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
    return levels_u8


def _truth(scene: Scene, hits: Hits, size: int) -> Truth:
    rays_y, rays_x = (axis.ravel().astype(np.float64) for axis in np.mgrid[:size, :size])
    rays = scene.camera.directions(rays_x, rays_y, size)
    canonical = np.full(rays.shape, np.nan, np.float32)
    classes = np.zeros(rays.shape[1], np.uint8)
    for what, name in ((FLOOR, "floor"), (WALL, "wall"), (SKY, "sky")):
        classes[hits.what == what] = CLASSES.index(name) + 1
    for i, thing in enumerate(scene.things):
        rows = np.flatnonzero(hits.what == i)
        canonical[:, rows] = to_own(thing, _eye(scene) + rays[:, rows] * hits.t[rows])
        if thing.kind in CATEGORIES:
            classes[rows] = CLASSES.index(thing.kind) + 1
    return Truth(
        hits.t.reshape(size, size),
        hits.what.reshape(size, size),
        np.moveaxis(canonical.reshape(3, size, size), 0, -1),
        classes.reshape(size, size),
    )
