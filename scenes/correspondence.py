"""Pairs of pictures with the keypoints that both show, in the layout of SPair-71k.

Source of the layout: SPair-71k (Min et al., arXiv 1908.10543). A line of `Layout/large/test.txt` is the name of a file
in `PairAnnotation/test` without its ending, `NUMBER-SOURCE-TARGET:CATEGORY`. Deviations: coordinates have fractions,
and the first pixel's centre is at 0; `same_instance` states whether both pictures show the same thing.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scenes.catalogue import CATEGORIES
from scenes.render import Truth
from scenes.scene import Camera, Scene, Thing, Vector

VIEWS_PER_INSTANCE = 2


@dataclass(frozen=True)
class Sighting:
    """One picture of a thing."""

    category: str
    instance: int
    name: str
    size: int
    box: tuple[int, int, int, int]
    """x0, y0, x1, y1 of its visible pixels; column x1 and row y1 are outside."""
    keypoints: dict[int, tuple[float, float]]
    """x and y of visible keypoints, by their index among the category's keypoints."""
    gaze: tuple[float, float, float]
    """Unit vector from the thing to the camera, in the thing's own axes."""
    hidden: bool
    """True if another thing covers some of it."""


def sighting(scene: Scene, truth: Truth, *, category: str, instance: int, name: str, covered: bool) -> Sighting:
    """Describe what a picture shows of the first thing of its scene."""
    thing, size = scene.things[0], truth.what.shape[0]
    rows, columns = np.nonzero(truth.what == 0)
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    gaze = thing.turn.T @ (scene.camera.eye - thing.sphere[0])
    x, y, z = gaze / np.linalg.norm(gaze)
    return Sighting(
        category, instance, name, size, box, seen_keypoints(scene.camera, thing, 0, truth), (x, y, z), covered
    )


def seen_keypoints(camera: Camera, thing: Thing, index: int, truth: Truth) -> dict[int, tuple[float, float]]:
    """Return x and y of a thing's visible keypoints, by index.

    A keypoint is visible if its pixel shows the thing and the depth there agrees.

    Args:
        index: index of the thing in the scene.
    """
    size = truth.what.shape[0]
    found = {}
    places: Vector = thing.to_world(np.array([point.at for point in thing.instance.shape.keypoints]))
    pixels, depths = camera.project(places, size)
    for i, (point, (x, y), depth) in enumerate(zip(thing.instance.shape.keypoints, pixels, depths, strict=True)):
        column, row = round(float(x)), round(float(y))
        if depth <= 0 or not (0 <= column < size and 0 <= row < size) or truth.what[row, column] != index:
            continue
        if abs(depth - float(truth.depth[row, column])) <= point.slack * thing.scale:
            found[i] = (round(float(x), 2), round(float(y), 2))
    return found


def write_pairs(folder: Path, sightings: Sequence[Sighting]) -> int:
    """Annotate pairs of neighbours in each category that share two keypoints; return the number of pairs."""
    lines: list[str] = []
    annotations, layout = folder / "PairAnnotation" / "test", folder / "Layout" / "large"
    annotations.mkdir(parents=True)
    layout.mkdir(parents=True)
    for category in CATEGORIES:
        for source, target in itertools.pairwise(s for s in sightings if s.category == category):
            shared = sorted(source.keypoints.keys() & target.keypoints.keys())
            if len(shared) < 2:
                continue
            line = f"{len(lines):06d}-{source.name}-{target.name}:{category}"
            pair = _pair(len(lines), line, source, target, shared)
            (annotations / f"{line}.json").write_text(json.dumps(pair))
            lines.append(line)
    (layout / "test.txt").write_text("".join(f"{line}\n" for line in lines))
    return len(lines)


def _pair(number: int, line: str, source: Sighting, target: Sighting, shared: Sequence[int]) -> dict[str, Any]:
    sides = [max(s.box[2] - s.box[0], s.box[3] - s.box[1]) for s in (source, target)]
    turn = math.degrees(math.acos(min(max(float(np.dot(source.gaze, target.gaze)), -1.0), 1.0)))
    return {
        "pair_id": number,
        "filename": line,
        "src_imname": f"{source.name}.jpg",
        "trg_imname": f"{target.name}.jpg",
        "src_imsize": [source.size, source.size, 3],
        "trg_imsize": [target.size, target.size, 3],
        "src_bndbox": list(source.box),
        "trg_bndbox": list(target.box),
        "category": source.category,
        "src_kps": [list(source.keypoints[i]) for i in shared],
        "trg_kps": [list(target.keypoints[i]) for i in shared],
        "kps_ids": [str(i) for i in shared],
        "mirror": 0,
        "viewpoint_variation": sum(turn > limit for limit in (25, 60)),
        "scale_variation": sum(max(sides) > limit * min(sides) for limit in (1.3, 1.8)),
        "truncation": _either(_cut_off(source), _cut_off(target)),
        "occlusion": _either(source.hidden, target.hidden),
        "same_instance": source.instance == target.instance,
    }


def _cut_off(s: Sighting) -> bool:
    return min(s.box) == 0 or max(s.box) == s.size


def _either(source: bool, target: bool) -> int:
    """Return 0 for neither, 1 for the source, 2 for the target, 3 for both."""
    return int(source) + 2 * int(target)
