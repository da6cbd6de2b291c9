"""Makes the golden vectors of the two real teachers, once: what they say of three pictures drawn from seeds.

python -m tests.golden.make_vectors
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from demo.assets import prepare_assets
from eupe.corpus.awkward import picture
from eupe.corpus.views import ViewSpec, draw_view, render_view
from eupe.teachers.registry import REGISTRY
from eupe.teachers.teacher import load_teacher

HERE = Path(__file__).parent
WEIGHTS = {"dinov2-s": "dinov2-small", "efficientnet-lite0": "efficientnet_lite0"}
SEEDS = (11, 12, 13)
CELLS = ((0, 0), (1, 4), (6, 6))
"""Rows and columns of the dense tokens that are kept."""


def views(size: int) -> NDArray[np.uint8]:
    images = [picture(seed, width=160, height=120) for seed in SEEDS]
    params = draw_view(ViewSpec(), "", 0, 160, 120)
    return np.stack([render_view(image, params, size) for image in images])


def vectors(name: str, assets: Path) -> dict[str, NDArray[np.float32]]:
    """`summary` [3, Ds] and `dense` [3, 3, D] of a teacher, in float32 on the CPU."""
    spec, weights = REGISTRY[name], assets / "weights" / WEIGHTS[name]
    size = spec.native_size
    teacher = load_teacher(spec, weights=weights, device=torch.device("cpu"), dtype=torch.float32, sizes=(size,))
    tokens = teacher(torch.from_numpy(views(size)))
    assert tokens.summary is not None
    rows, columns = zip(*CELLS, strict=True)
    kept = {"summary": tokens.summary, "dense": tokens.dense[:, rows, columns]}
    return {kind: np.ascontiguousarray(values.numpy()) for kind, values in kept.items()}


if __name__ == "__main__":
    assets = HERE.parents[1] / "assets"
    prepare_assets(assets)
    for name in WEIGHTS:
        path = HERE / "vectors" / f"{name}.safetensors"
        if path.exists():
            sys.exit(f"{path} is there already; golden vectors are not made again")
        path.parent.mkdir(exist_ok=True)
        save_file(vectors(name, assets), path)
