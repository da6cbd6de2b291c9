"""Where rays meet bodies: held against marching in tiny steps through points that something else calls inside."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from solids import SOLIDS, Inside

from scenes.bodies import crossing, frustum
from scenes.shapes import part_normals, strike

STEP = 2e-3
REACH = 5.0


def rays(count: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return origins on a sphere of radius 2 and directions to points near the middle, of many lengths: both [n, 3]."""
    rng = np.random.default_rng(seed)
    origin = rng.standard_normal((count, 3))
    origin *= 2 / np.linalg.norm(origin, axis=1, keepdims=True)
    return origin, (rng.uniform(-0.6, 0.6, (count, 3)) - origin) * rng.uniform(0.3, 3, (count, 1))


def march(inside: Inside, origin: NDArray[np.float64], direction: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[n, steps]: whether each point of each ray is inside."""
    length = np.linalg.norm(direction, axis=1, keepdims=True)
    far = np.arange(0, REACH, STEP)
    points = origin[:, None] + far[None, :, None] * (direction / length)[:, None]
    return inside(points.reshape(-1, 3)).reshape(len(origin), -1)


@pytest.mark.parametrize("name", SOLIDS)
def test_rays_meet_a_solid_where_marching_does(name: str) -> None:
    solid = SOLIDS[name]
    origin, direction = rays(400, seed=1)
    within = march(solid.inside, origin, direction)
    t, _ = strike(solid.part, origin.T.astype(np.float32), direction.T.astype(np.float32))
    metres = t * np.linalg.norm(direction, axis=1)
    first = np.argmax(within, axis=1) * STEP
    marched = within.any(axis=1)

    assert marched.sum() > 40
    both = marched & np.isfinite(t)
    late = first[both] - metres[both]
    assert np.quantile(late, 0.9) <= STEP * 1.1
    assert late.min() > -1e-4
    for row in np.flatnonzero(marched != np.isfinite(t)):  # corners thinner than a step are all that may differ
        assert within[row].sum() <= 2
    for row in np.flatnonzero(both)[late > STEP * 1.1]:
        at = origin[row] + (metres[row] + 1e-4) * direction[row] / np.linalg.norm(direction[row])
        assert solid.inside(at[None])[0]


@pytest.mark.parametrize("name", ["cup", "pipe", "bitten"])
def test_rays_that_begin_in_a_hollow_meet_its_wall(name: str) -> None:
    solid = SOLIDS[name]
    _, direction = rays(300, seed=2)
    hollow = np.array([0.1, 0.15, 0.1]) if name == "bitten" else np.zeros(3)
    origin = np.broadcast_to(hollow, direction.shape)
    assert not solid.inside(origin).any()
    within = march(solid.inside, origin, direction)
    t, carved = strike(solid.part, origin.T.astype(np.float32), direction.T.astype(np.float32))
    marched = within.any(axis=1)

    assert (marched == np.isfinite(t)).mean() > 0.985
    both = marched & np.isfinite(t)
    assert carved[both].all()
    metres = t[both] * np.linalg.norm(direction[both], axis=1)
    np.testing.assert_allclose(metres, np.argmax(within[both], axis=1) * STEP, atol=STEP * 1.1)


@pytest.mark.parametrize("name", SOLIDS)
def test_normals_point_out_and_stand_upright_on_the_surface(name: str) -> None:
    """The plane through three hits of rays side by side is the surface's own."""
    solid = SOLIDS[name]
    origin, direction = rays(400, seed=3)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    sideways = np.cross(direction, [0.3, 0.5, 0.8])
    sideways /= np.linalg.norm(sideways, axis=1, keepdims=True)
    nudges = [np.zeros_like(direction), sideways, np.cross(direction, sideways)]
    hits = []
    for nudge in nudges:
        start = origin + 2e-3 * nudge
        t, carved = strike(solid.part, start.T.astype(np.float32), direction.T.astype(np.float32))
        with np.errstate(invalid="ignore"):
            hits.append((start + t[:, None] * direction, carved))
    (here, carved), (aside, aside_carved), (above, above_carved) = hits
    one_face = np.isfinite(here + aside + above).all(axis=1) & (carved == aside_carved) & (carved == above_carved)
    with np.errstate(invalid="ignore"):
        plane = np.cross(aside - here, above - here)

    agree, total = 0, 0
    for wall in (False, True):
        rows = np.flatnonzero(one_face & (carved == wall))
        if not len(rows):
            continue
        normal = part_normals(solid.part, wall, here[rows].T.astype(np.float32)).T
        normal /= np.linalg.norm(normal, axis=1, keepdims=True)
        assert not solid.inside(here[rows] + 1e-3 * normal).mean() > 0.02
        assert solid.inside(here[rows] - 1e-3 * normal).mean() > 0.97
        across = plane[rows] / np.linalg.norm(plane[rows], axis=1, keepdims=True)
        agree += int((np.abs((across * normal).sum(axis=1)) > 0.995).sum())
        total += len(rows)
    assert agree / total > 0.93  # but for triples that straddle an edge


@pytest.mark.parametrize("name", SOLIDS)
def test_the_sphere_about_a_body_holds_it(name: str) -> None:
    body, inside = SOLIDS[name].part.body, SOLIDS[name].inside
    points = np.random.default_rng(4).uniform(-1.2, 1.2, (90_000, 3))
    away = np.linalg.norm(points[inside(points)] - body.centre, axis=1)
    assert len(away) > 200
    assert away.max() <= body.radius + 1e-6


def test_a_thin_body_far_away_is_met_as_exactly_as_a_near_one() -> None:
    """A needle of 2 mm seen from 20 m: the first solution of the quadratic is all digits lost in float32."""
    needle = frustum((0, 0, 0), (0, 1, 0), 0.001, 0.001)
    offset = np.linspace(-9e-4, 9e-4, 19)
    origin = np.stack([offset, np.full(19, 0.4), np.full(19, -20.0)]).astype(np.float32)
    enter, leave = crossing(needle, origin, np.array([[0], [0], [1]], np.float32))
    half = np.sqrt(1e-6 - offset**2)
    np.testing.assert_allclose(enter, 20 - half, atol=3e-6)
    np.testing.assert_allclose(leave, 20 + half, atol=3e-6)
