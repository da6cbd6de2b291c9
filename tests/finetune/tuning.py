"""Small fine-tunings of runs without any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from exporting import finished_run
from PIL import Image

from eupe.finetune.config import FinetuneConfig
from eupe.finetune.job import FinetuneReport, finetune
from eupe.finetune.tasks import open_task

SIDE = 48
SHADES = {"dull": (90, 90, 90), "red": (200, 40, 40), "blue": (40, 60, 190)}


def shades(folder: Path, *, train: int = 8, val: int = 4, classes: tuple[str, ...] = tuple(SHADES)) -> Path:
    """train/CLASS and val/CLASS: pictures whose colour, with noise, tells the class."""
    for seed, split, count in ((1, "train", train), (2, "val", val)):
        random = np.random.default_rng(seed)
        for name in classes:
            for number in range(count):
                pixels = np.array(SHADES[name]) + random.normal(0, 25, (SIDE, SIDE + 8, 3))
                place = folder / split / name / f"{number}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place)
    return folder


def run_of(folder: Path, arch: str = "test_vit") -> Path:
    """A finished run whose weights are random, and its only tokens those of 64 px."""
    return folder if folder.exists() else finished_run(folder, arch)


def tuned(subject: Path | str, data: Path, out: Path, **options: Any) -> FinetuneReport:
    """Fine-tune for two steps, unless options say otherwise."""
    given = {"epochs": 2 * 8 / 24, "batch_size": 8, "true_colours": True, **options}
    config = FinetuneConfig(subject=str(subject), data=str(data), out=out, **given)
    return finetune(config, open_task(config))
