"""Things: they stand on the floor, their keypoints are on them, and their colours say nothing of what they are."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray
from staging import pixels_of, scene_of

from scenes.catalogue import BUILDERS, CATEGORIES, CLUTTER, build
from scenes.correspondence import seen_keypoints
from scenes.materials import COLOURS, draw_instance
from scenes.render import look_up
from scenes.scene import Scene, Thing, looking, yawed

VIEWS = 6


def views_of(kind: str, seed: int) -> list[Scene]:
    """A thing alone, from around it and from two heights."""
    instance = draw_instance(np.random.default_rng(seed), kind)
    thing = Thing(instance, yawed(0.4), np.array([1.0, 0, 2.0]), 1.5)
    middle = thing.sphere[0]
    angles = np.linspace(0, 2 * np.pi, VIEWS, endpoint=False)
    eyes = [middle + 4.2 * np.array([np.sin(a), 0.35 + 0.5 * (i % 2), np.cos(a)]) for i, a in enumerate(angles)]
    return [scene_of(thing, camera=looking(eye, middle, 1.2)) for eye in eyes]


def surface_of(scenes: list[Scene]) -> NDArray[np.float32]:
    """Points [n, 3] that some view shows, in the thing's own coordinates."""
    truths = [look_up(scene, 80) for scene in scenes]
    return np.concatenate([truth.canonical[truth.what == 0] for truth in truths])


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("seed", [1, 2])
def test_things_stand_on_the_floor_and_are_about_as_large_as_each_other(category: str, seed: int) -> None:
    points = surface_of(views_of(category, seed))
    extent = points.max(axis=0) - points.min(axis=0)
    assert -1e-3 <= points[:, 1].min() <= 0.03
    assert 0.8 <= extent.max() <= 1.35


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("seed", [1, 2])
def test_keypoints_lie_on_the_thing_and_some_view_sees_each(category: str, seed: int) -> None:
    scenes = views_of(category, seed)
    points = surface_of(scenes)
    keypoints = scenes[0].things[0].instance.shape.keypoints
    for keypoint in keypoints:
        gap = np.linalg.norm(points - np.array(keypoint.at), axis=1).min()
        assert gap < keypoint.slack, keypoint.name
    seen: set[int] = set()
    for scene in scenes:
        seen |= seen_keypoints(scene.camera, scene.things[0], 0, look_up(scene, 80)).keys()
    assert {keypoints[i].name for i in seen} == {keypoint.name for keypoint in keypoints}


def test_keypoints_seen_are_where_another_camera_puts_them_and_others_are_behind_something() -> None:
    for category in CATEGORIES:
        for scene in views_of(category, 3)[:3]:
            thing, truth = scene.things[0], look_up(scene, 80)
            seen = seen_keypoints(scene.camera, thing, 0, truth)
            keypoints = thing.instance.shape.keypoints
            world = np.array([thing.turn @ (thing.scale * np.array(k.at)) + thing.place for k in keypoints])
            pixels, depth = pixels_of(world, scene.camera, 80)
            for i, keypoint in enumerate(keypoints):
                column, row = np.rint(pixels[i]).astype(int)
                on_it = truth.what[row, column] == 0
                in_front = depth[i] - truth.depth[row, column]
                if i in seen:
                    assert on_it
                    assert abs(in_front) <= keypoint.slack * thing.scale
                    assert seen[i] == pytest.approx(pixels[i], abs=0.006)
                else:
                    assert not on_it or abs(in_front) > keypoint.slack * thing.scale


def test_every_category_has_the_same_keypoints_each_time() -> None:
    for category, builder in BUILDERS.items():
        names = {tuple(k.name for k in builder(np.random.default_rng(seed)).keypoints) for seed in range(20)}
        assert len(names) == 1
        assert len(set(next(iter(names)))) == len(next(iter(names))) >= 4, category


def test_proportions_differ_between_things_of_a_category() -> None:
    for kind in (*CATEGORIES, CLUTTER):
        shapes = [build(kind, np.random.default_rng(seed)) for seed in range(8)]
        assert len({tuple(p.body.centre.tobytes() + p.body.to_local.tobytes() for p in s.parts) for s in shapes}) == 8


def test_colours_are_drawn_alike_for_all_categories() -> None:
    rng = np.random.default_rng(0)
    for category in CATEGORIES:
        drawn = Counter(draw_instance(rng, category).colour for _ in range(160))
        assert set(drawn) == set(COLOURS)
        assert max(drawn.values()) < 45  # 20 expected; some 5 standard deviations
