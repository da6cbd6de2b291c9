"""Writing of each layout: its pictures, one by one, and the files about all of them.

The layouts are those of public data sets, so that the same code reads both: ImageFolder, ADE20K's scene parsing, depth
in millimetres, SPair-71k, COCO captions. Questions have a list of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scenes.catalogue import CATEGORIES, CLASSES
from scenes.compose import (
    caption_scene,
    classification_scene,
    correspondence_scene,
    question_scene,
    rng_of,
    room_scene,
    spots_of,
)
from scenes.correspondence import VIEWS_PER_INSTANCE, sighting, write_pairs
from scenes.render import render
from scenes.words import captions, questions

JPEG_QUALITY = 92
TRAIN, VAL = "train", "val"
ADE_SPLIT = {TRAIN: "training", VAL: "validation"}
MILLIMETRES = 1000
DEEPEST_M = 65.535
"""Largest depth that 16 bits of millimetres can hold."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The settings that decide everything that is written."""

    pictures: int
    """Number of pictures of each layout."""
    size: int
    """Side of the pictures in pixels."""
    seed: int


@dataclass(frozen=True)
class Layout:
    """The writer of one folder, or of two folders with the same pictures."""

    draw: Callable[[Path, Request, int], Any]
    """Function that writes one picture below the root, and returns what `finish` has to know about it."""
    finish: Callable[[Path, Request, Sequence[Any]], Mapping[str, int]]
    """Function that writes the files about all pictures, and returns counts of what there is."""


def split_of(number: int) -> str:
    """Return the split of a picture: every third is for validation, the others are for training."""
    return VAL if number % 3 == 1 else TRAIN  # 1, so that two pictures already fill both splits


def _draw_classification(root: Path, request: Request, number: int) -> str:
    category, split = CATEGORIES[number % len(CATEGORIES)], split_of(number // len(CATEGORIES))
    picture = render(classification_scene(request.seed, number, category), request.size)
    _save_jpeg(root / "classification" / split / category / f"{category}_{number:05d}.jpg", picture.rgb)
    return split


def _finish_classification(root: Path, request: Request, splits: Sequence[str]) -> Mapping[str, int]:
    return {split: splits.count(split) for split in (TRAIN, VAL)}


def _draw_room(root: Path, request: Request, number: int) -> str:
    """Write the same picture for masks, as a JPEG, and for depth, as a PNG, as the public data sets do."""
    picture = render(room_scene(request.seed, number), request.size)
    split, name = split_of(number), f"room_{number:05d}"
    masks, depth = root / "segmentation", root / "depth"
    _save_jpeg(masks / "images" / ADE_SPLIT[split] / f"{name}.jpg", picture.rgb)
    _save_png(masks / "annotations" / ADE_SPLIT[split] / f"{name}.png", picture.truth.classes)
    _save_png(depth / "images" / split / f"{name}.png", picture.rgb)
    metres = picture.truth.depth
    known = np.where(metres <= DEEPEST_M, metres, 0)  # 0 stands for unknown
    _save_png(depth / "depth" / split / f"{name}.png", np.rint(known * MILLIMETRES).astype(np.uint16))
    return split


def _finish_rooms(root: Path, request: Request, splits: Sequence[str]) -> Mapping[str, int]:
    (root / "segmentation" / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    (root / "depth" / "depth-unit.txt").write_text("mm\n")
    return {split: splits.count(split) for split in (TRAIN, VAL)}


def _draw_correspondence(root: Path, request: Request, number: int) -> Any:
    category, nth = CATEGORIES[number % len(CATEGORIES)], number // len(CATEGORIES)
    instance, name = nth // VIEWS_PER_INSTANCE, f"{category}_{nth:04d}"
    scene = correspondence_scene(request.seed, number, category, instance)
    picture = render(scene, request.size)
    _save_jpeg(root / "correspondence" / "JPEGImages" / category / f"{name}.jpg", picture.rgb)
    covered = spots_of(scene)[0].shown < 1
    return sighting(scene, picture.truth, category=category, instance=instance, name=name, covered=covered)


def _finish_correspondence(root: Path, request: Request, sightings: Sequence[Any]) -> Mapping[str, int]:
    return {"pictures": len(sightings), "pairs": write_pairs(root / "correspondence", sightings)}


def _draw_caption(root: Path, request: Request, number: int) -> list[str]:
    scene = caption_scene(request.seed, number)
    _save_jpeg(root / "captions" / "val2017" / _coco_name(number), render(scene, request.size).rgb)
    return captions(scene, spots_of(scene), rng_of(request.seed, "caption words", number))


def _finish_captions(root: Path, request: Request, written: Sequence[list[str]]) -> Mapping[str, int]:
    images = [
        {"id": i + 1, "file_name": _coco_name(i), "width": request.size, "height": request.size}
        for i in range(len(written))
    ]
    texts = [(i + 1, caption) for i, five in enumerate(written) for caption in five]
    annotations = [{"id": n + 1, "image_id": image, "caption": caption} for n, (image, caption) in enumerate(texts)]
    about = {"description": "rendered scenes, captions from their descriptions", "version": "1.0"}
    _save_json(
        root / "captions" / "annotations" / "captions_val2017.json",
        {"info": about, "licenses": [], "images": images, "annotations": annotations},
    )
    return {"pictures": len(images), "captions": len(annotations)}


def _coco_name(number: int) -> str:
    return f"{number + 1:012d}.jpg"


def _draw_question(root: Path, request: Request, number: int) -> list[dict[str, str]]:
    scene = question_scene(request.seed, number)
    image = f"images/{number:05d}.jpg"
    _save_jpeg(root / "questions" / image, render(scene, request.size).rgb)
    asked = questions(scene, spots_of(scene), rng_of(request.seed, "question words", number))
    return [{"image": image, "split": split_of(number), **question._asdict()} for question in asked]


def _finish_questions(root: Path, request: Request, asked: Sequence[list[dict[str, str]]]) -> Mapping[str, int]:
    together = [question for each in asked for question in each]
    _save_json(root / "questions" / "questions.json", together)
    return {"pictures": len(asked), "questions": len(together)}


LAYOUTS: Mapping[str, Layout] = {
    "classification": Layout(_draw_classification, _finish_classification),
    "segmentation and depth": Layout(_draw_room, _finish_rooms),
    "correspondence": Layout(_draw_correspondence, _finish_correspondence),
    "captions": Layout(_draw_caption, _finish_captions),
    "questions": Layout(_draw_question, _finish_questions),
}


def _save_jpeg(path: Path, rgb: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb).save(path, quality=JPEG_QUALITY)


def _save_png(path: Path, levels: NDArray[np.uint8] | NDArray[np.uint16]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels).save(path)


def _save_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
