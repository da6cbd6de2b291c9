"""The truth about each pixel: against closed forms, a camera written anew, and what light does."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from staging import GREY, pixels_of, scene_of, thing_of, world_of

from scenes.bodies import ball, box
from scenes.catalogue import BOARD, BOARD_HEIGHT, CLASSES, SIGN
from scenes.compose import classification_scene, question_scene, room_scene
from scenes.materials import draw_instance, lettering
from scenes.render import Truth, look_up, render
from scenes.scene import Camera, Scene, Thing, Wall, looking, yawed
from scenes.trace import FLOOR, SKY, WALL

SIZE = 48


def pixel_rays(camera: Camera, size: int) -> NDArray[np.float64]:
    """[S, S, 3], by undoing the projection of the textbook camera; 1 along the optical axis."""
    grid = np.arange(size, dtype=float)
    x, y = np.meshgrid(grid, grid)
    middle, focal = (size - 1) / 2, camera.zoom * size
    flat = np.stack([(x - middle) / focal, -(y - middle) / focal, np.ones_like(x)], axis=-1)
    return flat @ camera.axes


def test_a_ball_above_a_floor_before_a_wall_has_the_depth_of_the_closed_form() -> None:
    centre, radius, wall_at = np.array([0.2, 0.9, 0.4]), 0.6, 3.0
    sphere = thing_of(ball((0, 0, 0), 0.3), centre.tolist(), scale=2.0)
    wall = Wall(np.array([0.0, 0, -1]), -wall_at, 2.0, GREY)
    scene = scene_of(sphere, walls=(wall,))
    truth = look_up(scene, SIZE)
    eye = scene.camera.eye

    for row, column in np.ndindex(SIZE, SIZE):
        ray = RAYS[row, column]
        options = {SKY: math.inf}
        if ray[1] < 0:
            options[FLOOR] = -eye[1] / ray[1]
        at_wall = (wall_at - eye[2]) / ray[2]
        if at_wall > 0 and 0 <= eye[1] + at_wall * ray[1] <= 2:
            options[WALL] = at_wall
        a, b, c = ray @ ray, ray @ (eye - centre), (eye - centre) @ (eye - centre) - radius**2
        if b * b - a * c > 0:
            options[0] = (-b - math.sqrt(b * b - a * c)) / a
        nearest = min(options, key=lambda k: options[k])
        assert truth.what[row, column] == nearest
        assert truth.depth[row, column] == pytest.approx(options[nearest], rel=2e-6)
    assert {int(w) for w in np.unique(truth.what)} == {SKY, WALL, FLOOR, 0}


RAYS = pixel_rays(scene_of().camera, SIZE)


def scenes_of_each_kind() -> list[Scene]:
    return [room_scene(11, 0), room_scene(11, 4), classification_scene(11, 3, "chair"), question_scene(11, 2)]


@pytest.fixture(scope="module")
def looked_at() -> list[tuple[Scene, Truth]]:
    return [(scene, look_up(scene, SIZE)) for scene in scenes_of_each_kind()]


def test_surface_points_of_things_project_to_their_own_pixels(looked_at: list[tuple[Scene, Truth]]) -> None:
    for scene, truth in looked_at:
        for i, thing in enumerate(scene.things):
            rows, columns = np.nonzero(truth.what == i)
            pixels, depth = pixels_of(world_of(thing, truth.canonical[rows, columns]), scene.camera, SIZE)
            np.testing.assert_allclose(pixels, np.stack([columns, rows], axis=1), atol=2e-3)
            np.testing.assert_allclose(depth, truth.depth[rows, columns], rtol=1e-5)


def test_floor_and_walls_lie_in_their_planes_and_behind_them_is_nothing(looked_at: list[tuple[Scene, Truth]]) -> None:
    for scene, truth in looked_at:
        points = (
            scene.camera.eye + pixel_rays(scene.camera, SIZE) * np.where(truth.depth < 1e3, truth.depth, 0)[..., None]
        )
        near = truth.depth < 1e3
        np.testing.assert_allclose(points[(truth.what == FLOOR) & near][:, 1], 0, atol=1e-3)
        walls = points[truth.what == WALL]
        if len(walls):
            gaps = np.array([walls @ wall.normal - wall.offset for wall in scene.walls])
            np.testing.assert_allclose(np.abs(gaps).min(axis=0), 0, atol=1e-4)
        for wall in scene.walls:
            if math.isinf(wall.height):
                assert (points[near] @ wall.normal - wall.offset).min() > -1e-3


def test_classes_say_what_each_pixel_is(looked_at: list[tuple[Scene, Truth]]) -> None:
    for scene, truth in looked_at:
        names = {FLOOR: "floor", WALL: "wall", SKY: "sky"} | {i: t.kind for i, t in enumerate(scene.things)}
        for what, name in names.items():
            expected = CLASSES.index(name) + 1 if name in CLASSES else 0
            assert (truth.classes[truth.what == what] == expected).all()
        assert np.isinf(truth.depth[truth.what == SKY]).all()
        assert np.isnan(truth.canonical[truth.what < 0]).all()


def test_what_stands_alone_is_hidden_only_by_what_is_nearer(looked_at: list[tuple[Scene, Truth]]) -> None:
    """Each thing rendered by itself: the whole picture holds, at each pixel, the nearest of these."""
    for scene, truth in looked_at:
        alone = [look_up(replace(scene, things=(thing,), walls=()), SIZE) for thing in scene.things]
        depths = np.stack([np.where(one.what == 0, one.depth, np.inf) for one in alone])
        nearest = depths.argmin(axis=0)
        shown = truth.what >= 0
        assert (truth.what[shown] == nearest[shown]).all()
        assert (depths.min(axis=0)[~shown] >= truth.depth[~shown]).all()


def test_the_shadow_of_a_ball_lies_where_the_sun_is_behind_it() -> None:
    towards = np.array([0.5, 1.0, -0.4])
    towards /= np.linalg.norm(towards)
    centre = np.array([0.0, 0.8, 0.5])
    scene = scene_of(thing_of(ball((0, 0, 0), 0.5), centre.tolist()), towards=towards)
    scene = replace(scene, light=replace(scene.light, ambient=(0.0, 0.0, 0.0)))
    picture = render(scene, 96)
    floor = picture.truth.what == FLOOR
    floor[1:-1] &= floor[:-2] & floor[2:]  # no pixels that are blended with the ball
    floor[:, 1:-1] &= floor[:, :-2] & floor[:, 2:]
    points = scene.camera.eye + pixel_rays(scene.camera, 96) * np.where(floor, picture.truth.depth, 0)[..., None]
    away = np.linalg.norm(np.cross(points - centre, towards), axis=-1)
    level = picture.rgb.mean(axis=-1)

    assert (floor & (away < 0.44)).sum() > 60
    assert level[floor & (away < 0.44)].max() < 15
    assert level[floor & (away > 0.6)].min() > 60


def test_edges_are_blended_and_the_truth_is_not() -> None:
    pale = replace(GREY, first=(0.9, 0.9, 0.9))
    thing = thing_of(box((0, 0.5, 0), (0.5, 0.5, 0.5)), yaw=0.2)
    thing = replace(thing, instance=replace(thing.instance, surfaces={"main": pale}))
    scene = replace(scene_of(thing), floor=replace(GREY, first=(0.02, 0.02, 0.02)))
    picture = render(scene, SIZE)
    inside = picture.truth.what == 0
    between = (picture.rgb[..., 0] > 70) & (picture.rgb[..., 0] < 115)
    edge = np.zeros_like(inside)
    edge[1:] |= inside[1:] != inside[:-1]
    edge[:-1] |= inside[1:] != inside[:-1]
    edge[:, 1:] |= inside[:, 1:] != inside[:, :-1]
    edge[:, :-1] |= inside[:, 1:] != inside[:, :-1]

    assert (between & edge).sum() > 10
    assert set(np.unique(picture.truth.classes)) <= {0, *(CLASSES.index(c) + 1 for c in ("mug", "floor", "sky"))}


def test_a_sign_shows_its_word_and_no_other() -> None:
    rng = np.random.default_rng(0)
    shown = {}
    for word in ("stop", "exit", "zoo"):
        sign = Thing(draw_instance(rng, SIGN, says=word), yawed(0.0), np.zeros(3), 1.0)
        camera = looking(np.array([0, BOARD_HEIGHT, 2.0]), np.array([0, BOARD_HEIGHT, 0.0]), 1.4)
        picture = render(scene_of(sign, camera=camera, towards=np.array([0.2, 0.5, 1.0])), 96)
        front = picture.truth.what == 0
        own = picture.truth.canonical
        on_board = front & (own[..., 2] > 0.014)
        rows, columns = np.nonzero(on_board)
        shown[word] = (own[rows, columns], picture.rgb[rows, columns].mean(axis=1))
    for word, (points, level) in shown.items():
        likeness = {other: abs(correlation(points, level, lettering(other))) for other in shown}
        assert max(likeness, key=lambda k: likeness[k]) == word
        assert likeness[word] > 0.8


def correlation(points: NDArray[np.float32], level: NDArray[np.float64], ink: NDArray[np.uint8]) -> float:
    """Return the correlation of brightness and ink at points of the board; `ink` runs left to right, top to bottom."""
    height, width = ink.shape
    left, top = -BOARD[0], BOARD_HEIGHT + BOARD[1]
    column = np.clip(((points[:, 0] - left) / (2 * BOARD[0]) * width).astype(int), 0, width - 1)
    row = np.clip(((top - points[:, 1]) / (2 * BOARD[1]) * height).astype(int), 0, height - 1)
    return float(np.corrcoef(level, ink[row, column])[0, 1])


def test_a_picture_is_the_same_each_time_and_another_with_another_seed() -> None:
    first, second = (render(classification_scene(5, 1, "car"), 40).rgb for _ in range(2))
    other = render(classification_scene(6, 1, "car"), 40).rgb
    assert first.tobytes() == second.tobytes()
    assert first.tobytes() != other.tobytes()


def test_the_size_of_a_picture_does_not_change_what_it_shows() -> None:
    scene = room_scene(11, 1)
    small, large = look_up(scene, 40), look_up(scene, 120)
    same = large.classes[1::3, 1::3] == small.classes  # the middle pixel of each three looks along the same ray
    assert same.mean() == 1
