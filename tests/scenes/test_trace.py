"""Rays through whole scenes: what is left out because it is far from a ray makes no difference."""

from __future__ import annotations

import numpy as np
import pytest
from staging import scene_of, thing_of

from scenes.bodies import Floats, ball, box
from scenes.catalogue import CATEGORIES
from scenes.compose import classification_scene, question_scene
from scenes.scene import Scene
from scenes.shapes import strike
from scenes.trace import SKY, normals, patches, shadowed, trace


def nearest_thing(scene: Scene, origin: Floats, direction: Floats) -> Floats:
    """`t` [n] of the first thing, by asking every part about every ray."""
    first = np.full(direction.shape[1], np.inf)
    for thing in scene.things:
        turn = thing.turn.T / thing.scale
        own_origin = (turn @ (origin - thing.place[:, None])).astype(np.float32)
        own_direction = (turn @ direction).astype(np.float32)
        for part in thing.instance.shape.parts:
            first = np.minimum(first, strike(part, own_origin, own_direction)[0])
    return first


@pytest.mark.parametrize("category", CATEGORIES)
def test_no_thing_is_missed_for_being_thought_far_away(category: str) -> None:
    scene = classification_scene(21, CATEGORIES.index(category), category)
    rng = np.random.default_rng(1)
    x, y = rng.uniform(0, 63, (2, 4000))
    rays = scene.camera.directions(x, y, 64)
    hits = trace(scene, scene.camera.eye.astype(np.float32)[:, None], rays)
    expected = nearest_thing(scene, scene.camera.eye[:, None], rays)
    things = hits.what >= 0
    assert things.sum() > 200
    np.testing.assert_allclose(hits.t[things], expected[things], rtol=2e-5)
    assert (expected[~things] >= hits.t[~things] * (1 - 1e-5)).all()


def test_shadows_are_where_a_thing_lies_between_a_point_and_the_sun() -> None:
    scene = question_scene(21, 0)
    rng = np.random.default_rng(2)
    x, y = rng.uniform(0, 63, (2, 3000))
    rays = scene.camera.directions(x, y, 64)
    eye = scene.camera.eye.astype(np.float32)[:, None]
    hits = trace(scene, eye, rays)
    seen = hits.what != SKY
    points = eye + rays * np.where(seen, hits.t, 0)
    normal = np.zeros_like(points)
    for patch in patches(hits):
        normal[:, patch.rows] = normals(scene, patch, points[:, patch.rows])
    points, normal = points[:, seen], normal[:, seen]
    dark = shadowed(scene, points, normal, scene.light.towards)

    towards = np.broadcast_to(scene.light.towards[:, None], points.shape)
    faces = (normal * towards).sum(axis=0) > 0
    blocked = np.isfinite(nearest_thing(scene, points + 1e-3 * normal, towards))
    assert (dark == (~faces | blocked)).mean() > 0.999
    assert 0.02 < (faces & blocked).mean() < 0.6


def test_normals_have_length_one_and_face_the_ray() -> None:
    scene = scene_of(thing_of(box((0, 0.4, 0), (0.5, 0.4, 0.2)), yaw=1.0, scale=1.7), thing_of(ball((1, 0.5, 1), 0.4)))
    x, y = np.random.default_rng(3).uniform(0, 63, (2, 2000))
    rays = scene.camera.directions(x, y, 64)
    eye = scene.camera.eye.astype(np.float32)[:, None]
    hits = trace(scene, eye, rays)
    for patch in patches(hits):
        ray = rays[:, patch.rows]
        normal = normals(scene, patch, eye + ray * hits.t[patch.rows])
        np.testing.assert_allclose(np.linalg.norm(normal, axis=0), 1, atol=1e-5)
        assert ((normal * ray).sum(axis=0) < 1e-3).all()
