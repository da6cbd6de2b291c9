"""What pages presuppose: pictures, small data sets, stores and runs, all made once by commands of eupe itself."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import hub
from hub import NARROW
from pages import ROOT
from planting import planted_environment
from walking import Walk

SIDE = 64
DATA_SETS = {
    "imagenet": "classification",
    "labelled": "classification",
    "ADEChallengeData2016": "segmentation",
    "nyu": "depth",
    "SPair-71k": "correspondence",
    "coco": "captions",
}
"""Where the pages have a data set of the world, to the rendered scenes that stand in, in its layout."""

TRAIN = f"eupe train --batch-size 8 --steps 2 --head-width 16 --holdout 0.3 --size {SIDE} --dtype fp32"
EXTRACT = "eupe extract --corpus photos --views rrc:2 --batch-size 8"
COMMANDS = (
    f"python -m scenes --out rendered --pictures 24 --size {SIDE}",
    "mkdir photos && cp -r rendered/classification/train/. rendered/classification/val/. photos",
    *(f"cp -r rendered/{layout} {name}" for name, layout in DATA_SETS.items()),
    "ls imagenet/train > classes.txt",
    f"{EXTRACT} --teacher dinov2 --size 112 --out store/dinov2.zarr",
    f"{EXTRACT} --teacher clip-b16-proj --out store/clip.zarr",
    f"{EXTRACT} --teacher timm:test_vit --size {SIDE} --out store/test_vit.zarr",
    f"{TRAIN} --targets store/dinov2.zarr --targets store/clip.zarr --student test_vit --out runs/proxy",
    f"{EXTRACT} --teacher runs/proxy --size {SIDE} --out store/proxy.zarr",
    f"{TRAIN} --targets store/proxy.zarr --student vit_tiny_patch16_dinov3_qkvb --out runs/tiny",
    f"{TRAIN} --targets store/proxy.zarr --student test_vit --out runs/small",
    "eupe eval agreement runs/small",
    "eupe eval knn dinov2 pixels --data imagenet --results teachers.jsonl",
)


def reader_environment(folder: Path) -> dict[str, str]:
    """Variables under which teachers come from a hub's cache that lies in the folder."""
    return {**planted_environment(narrow=NARROW), "HF_HOME": str(folder / "hub")}


def make_presupposed(folder: Path, assets: Path, programs: Path, ray: Mapping[str, str]) -> None:
    """Make all of it in a folder, with the `eupe` of another and a Ray that runs."""
    folder.mkdir()
    walk = Walk(folder, {**reader_environment(folder), **ray}, programs=programs)
    words = ["python", hub.__file__, walk.environment["HF_HOME"], assets / "weights" / "dinov2-small"]
    walk.run(f"PYTHONPATH=$PYTHONPATH:{ROOT}/tests {shlex.join(map(str, words))}")
    for command in COMMANDS:
        walk.run(command)


def take(base: Path, folder: Path, names: Iterable[str]) -> None:
    """Copy what a page presupposes; `store/clip.zarr=store/pe-core.zarr` gives it another name."""
    for name in names:
        source, _, named = name.partition("=")
        target = folder / (named or source)
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (base / source).is_dir() else shutil.copy)(base / source, target)
