"""Small data sets in the standard layouts, whose truth is in the colours of the pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 48
COLOURS = np.array([[220, 40, 40], [40, 200, 60], [50, 60, 220]], dtype=np.uint8)


def blocks(seed: int, width: int = SIDE, height: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """A picture [H, W, 3] of coloured blocks of 16 pixels, and each pixel's colour number [H, W]."""
    classes = np.random.default_rng(seed).integers(0, len(COLOURS), (-(-height // 16), -(-width // 16)))
    labels = np.kron(classes, np.ones((16, 16), dtype=np.int64))[:height, :width]
    return COLOURS[labels], labels


def save(array: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def ade20k(folder: Path, *, train: int = 6, val: int = 3, width: int = SIDE, height: int = SIDE) -> Path:
    """images/ and annotations/, in which 0 is nothing (the first row of blocks) and classes begin at 1."""
    for split, numbers in (("training", range(train)), ("validation", range(100, 100 + val))):
        for number in numbers:
            pixels, labels = blocks(number, width, height)
            values = (labels + 1).astype(np.uint8)
            values[:16] = 0
            save(pixels, folder / "images" / split / f"{number}.png")
            save(values, folder / "annotations" / split / f"{number}.png")
    return folder


def masks(folder: Path, *, train: int = 6, val: int = 3) -> Path:
    """images/ and masks/, in which 255 is nothing and classes begin at 0."""
    for split, numbers in (("train", range(train)), ("val", range(100, 100 + val))):
        for number in numbers:
            pixels, labels = blocks(number)
            values = labels.astype(np.uint8)
            values[:16] = 255
            save(pixels, folder / "images" / split / f"{number}.png")
            save(values, folder / "masks" / split / f"{number}.png")
    return folder


METRES = np.array([1.0, 2.5, 6.0])


def depth_pairs(folder: Path, *, train: int = 8, val: int = 3) -> Path:
    """images/ and depth/: 16-bit millimetres, the colour tells how far."""
    for split, numbers in (("train", range(train)), ("val", range(100, 100 + val))):
        for number in numbers:
            pixels, labels = blocks(number)
            millimetres = (METRES[labels] * 1000).astype(np.uint16)
            millimetres[:4] = 0
            save(pixels, folder / "images" / split / f"{number}.png")
            save(millimetres, folder / "depth" / split / f"{number}.png")
    (folder / "depth-unit.txt").write_text("mm\n")
    return folder


def nyu(folder: Path, *, width: int = SIDE, height: int = SIDE) -> Path:
    """nyu_train.txt and nyu_test.txt, whose lines begin with slashes."""
    for name, numbers in (("nyu_train.txt", range(6)), ("nyu_test.txt", range(100, 102))):
        lines = []
        for number in numbers:
            pixels, labels = blocks(number, width, height)
            save(pixels, folder / "scene" / f"rgb_{number}.png")
            save((METRES[labels] * 1000).astype(np.uint16), folder / "scene" / f"sync_depth_{number}.png")
            lines.append(f"/scene/rgb_{number}.png /scene/sync_depth_{number}.png 518.8579")
        lines.append("/scene/rgb_unknown.png None 518.8579")
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def spair(folder: Path, *, side: int = 64) -> Path:
    """Two pairs: a picture and itself shifted by 16 pixels, whose points move along."""
    layout = folder / "Layout" / "large"
    layout.mkdir(parents=True)
    names = []
    for number, category in enumerate(("cat", "dog")):
        generator = np.random.default_rng(number)
        cells = generator.integers(0, 256, (side // 16, side // 16 + 1, 3))
        wide = np.kron(cells, np.ones((16, 16, 1))).astype(np.uint8)
        save(wide[:, :side], folder / "JPEGImages" / category / "a.png")
        save(wide[:, 16:], folder / "JPEGImages" / category / "b.png")
        points = [[40.0, 24.0], [56.0, 24.0], [40.0, 40.0]]  # of patches that do not touch the edge
        annotation = {
            "category": category,
            "src_imname": "a.png",
            "trg_imname": "b.png",
            "src_kps": points,
            "trg_kps": [[x - 16, y] for x, y in points],
            "trg_bndbox": [0, 0, side, side],
        }
        name = f"{number:06d}-a-b:{category}"
        path = folder / "PairAnnotation" / "test" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(annotation))
        names.append(name)
    (layout / "test.txt").write_text("\n".join(names) + "\n")
    return folder
