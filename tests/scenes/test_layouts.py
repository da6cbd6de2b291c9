"""Every layout: each file is opened, counted, and held against the scene that it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from staging import pixels_of

from scenes.catalogue import CATEGORIES, CLASSES
from scenes.compose import classification_scene, correspondence_scene, room_scene
from scenes.make import ScenesConfig, make_scenes
from scenes.render import look_up, render

PICTURES, SIZE, SEED = 24, 40, 3


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All layouts, tiny. Not to be changed."""
    out = tmp_path_factory.mktemp("scenes") / "out"
    make_scenes(ScenesConfig(out=out, pictures=PICTURES, size=SIZE, seed=SEED))
    return out


def opened(path: Path) -> Any:
    with Image.open(path) as picture:
        return np.asarray(picture)


def names(folder: Path, ending: str) -> list[str]:
    assert all(path.suffix == ending for path in folder.iterdir())
    return sorted(path.stem for path in folder.iterdir())


def test_every_file_is_of_a_layout_and_the_card_counts_them(scenes: Path) -> None:
    spec = json.loads((scenes / "scenes.json").read_text())
    assert spec["request"] == {"version": 1, "pictures": PICTURES, "size": SIZE, "seed": SEED}
    assert spec["categories"] == list(CATEGORIES)
    assert {p.name for p in scenes.iterdir()} == {
        "classification",
        "segmentation",
        "depth",
        "correspondence",
        "captions",
        "questions",
        "scenes.json",
    }
    files = [path for path in scenes.rglob("*") if path.is_file()]
    pairs = spec["counts"]["correspondence"]["pairs"]
    pictures = [path for path in files if path.suffix in (".jpg", ".png")]
    assert len(pictures) == PICTURES * (1 + 2 + 2 + 1 + 1 + 1)
    others = ["classes.txt", "depth-unit.txt", "test.txt", "captions", "questions", "scenes.json"]
    assert len(files) - len(pictures) == pairs + len(others)
    for path in pictures:
        assert opened(path).shape[:2] == (SIZE, SIZE), path


def test_classification_has_a_folder_for_each_category_in_both_splits(scenes: Path) -> None:
    folder = scenes / "classification"
    keys = []
    for split in ("train", "val"):
        assert sorted(p.name for p in (folder / split).iterdir()) == list(CATEGORIES)
        keys += [path.read_bytes() for path in (folder / split).rglob("*.jpg")]
    assert len(set(keys)) == PICTURES
    for number in (0, 13):
        category = CATEGORIES[number % len(CATEGORIES)]
        split = "train" if number < len(CATEGORIES) else "val"
        stored = opened(folder / split / category / f"{category}_{number:05d}.jpg").astype(int)
        assert np.abs(stored - render(classification_scene(SEED, number, category), SIZE).rgb).mean() < 8


def test_masks_and_depths_are_those_of_the_same_scenes(scenes: Path) -> None:
    masks, depths = scenes / "segmentation", scenes / "depth"
    assert (masks / "classes.txt").read_text().splitlines() == list(CLASSES)
    for split, other in (("training", "train"), ("validation", "val")):
        stems = names(masks / "images" / split, ".jpg")
        assert stems == names(masks / "annotations" / split, ".png")
        assert stems == names(depths / "images" / other, ".png") == names(depths / "depth" / other, ".png")
        for stem in stems:
            truth = look_up(room_scene(SEED, int(stem.removeprefix("room_"))), SIZE)
            mask = opened(masks / "annotations" / split / f"{stem}.png")
            millimetres = opened(depths / "depth" / other / f"{stem}.png")
            assert mask.dtype == np.uint8
            assert millimetres.dtype == np.uint16
            assert (mask == truth.classes).all()
            known = truth.depth <= 65.535
            assert (millimetres[~known] == 0).all()
            np.testing.assert_allclose(millimetres[known] / 1000, truth.depth[known], atol=5.1e-4)
            assert (millimetres[mask == CLASSES.index("sky") + 1] == 0).all()
            picture = opened(depths / "images" / other / f"{stem}.png").astype(int)
            assert np.abs(picture - opened(masks / "images" / split / f"{stem}.jpg")).mean() < 8
    assert len(names(masks / "images" / "validation", ".jpg")) == PICTURES // 3


def test_pairs_are_annotated_as_spair_is(scenes: Path) -> None:
    folder = scenes / "correspondence"
    lines = (folder / "Layout/large/test.txt").read_text().splitlines()
    assert sorted(f"{line}.json" for line in lines) == sorted(
        p.name for p in (folder / "PairAnnotation/test").iterdir()
    )
    assert len(lines) >= 8
    for number, line in enumerate(lines):
        pair = json.loads((folder / "PairAnnotation/test" / f"{line}.json").read_text())
        # as the loaders of SPair-71k take a line apart
        category = line.split(":")[1]
        source, target = (f"{name}.jpg" for name in line.split(":")[0].split("-")[1:])
        assert (pair["filename"], pair["category"], pair["pair_id"]) == (line, category, number)
        assert (pair["src_imname"], pair["trg_imname"]) == (source, target)
        assert len(pair["src_kps"]) == len(pair["trg_kps"]) == len(pair["kps_ids"]) >= 2
        for side in ("src", "trg"):
            image = opened(folder / "JPEGImages" / category / pair[f"{side}_imname"])
            assert list(image.shape) == [pair[f"{side}_imsize"][1], pair[f"{side}_imsize"][0], 3]
            x0, y0, x1, y1 = pair[f"{side}_bndbox"]
            assert 0 <= x0 < x1 <= SIZE
            assert 0 <= y0 < y1 <= SIZE
            nth = int(pair[f"{side}_imname"].split("_")[1].removesuffix(".jpg"))
            scene = correspondence_scene(SEED, nth * len(CATEGORIES) + CATEGORIES.index(category), category, nth // 2)
            thing, truth = scene.things[0], look_up(scene, SIZE)
            rows, columns = np.nonzero(truth.what == 0)
            assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [x0, y0, x1, y1]
            places = [thing.instance.shape.keypoints[int(i)].at for i in pair["kps_ids"]]
            world = np.array([thing.turn @ (thing.scale * np.array(at)) + thing.place for at in places])
            pixels, _ = pixels_of(world, scene.camera, SIZE)
            np.testing.assert_allclose(pair[f"{side}_kps"], pixels, atol=0.006)
            for x, y in pair[f"{side}_kps"]:
                assert truth.what[round(y), round(x)] == 0
        assert pair["same_instance"]  # with two pictures of each category


def test_captions_are_laid_out_as_cocos_are(scenes: Path) -> None:
    coco = json.loads((scenes / "captions/annotations/captions_val2017.json").read_text())
    images = {image["id"]: image for image in coco["images"]}
    assert sorted(image["file_name"] for image in images.values()) == sorted(
        path.name for path in (scenes / "captions/val2017").iterdir()
    )
    assert all((image["width"], image["height"]) == (SIZE, SIZE) for image in images.values())
    assert len({a["id"] for a in coco["annotations"]}) == len(coco["annotations"]) == 5 * PICTURES
    assert {a["image_id"] for a in coco["annotations"]} == set(images)
    assert all(a["caption"].endswith(".") for a in coco["annotations"])


def test_questions_name_pictures_that_are_there_in_one_split_each(scenes: Path) -> None:
    asked = json.loads((scenes / "questions/questions.json").read_text())
    splits: dict[str, set[str]] = {}
    for question in asked:
        splits.setdefault(question["image"], set()).add(question["split"])
        assert question.keys() == {"image", "split", "kind", "question", "answer"}
    assert {f"images/{p.name}" for p in (scenes / "questions/images").iterdir()} == set(splits)
    assert all(len(found) == 1 for found in splits.values())
    assert {q["kind"] for q in asked} == {"colour", "count", "position", "text"}
    assert {split for found in splits.values() for split in found} == {"train", "val"}
