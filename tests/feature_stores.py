"""Finished stores of features that a test has made up, without pictures or teachers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eupe.store import Store
from eupe.store.layout import StoreSpec, feature_path
from eupe.store.writer import Part, Row, StoreWriter, create_store, finish_store

SIZE = 32
SAMPLES_PER_PART = 16


def plant_store(
    path: Path,
    keys: Sequence[str],
    features: dict[str, NDArray[Any]],
    *,
    teacher: str = "toy",
    backend: str = "timm",
    licence: str = "none",
    views_seed: int = 0,
    box_of_first: int = 0,
    finish: bool = True,
) -> Store:
    """A store of `summary` [N, K, Ds] and `dense` [N, K, g, g, D], or of one of them.

    Args:
        views_seed: noted as that of the views.
        box_of_first: left edge of the first view's box; all others begin at 0.
        finish: commit the parts and write the statistics.
    """
    first = next(iter(features.values()))
    shape, dims = first.shape[:2], {kind: values.shape[-1] for kind, values in features.items()}
    grid = features["dense"].shape[2] if "dense" in features else 1
    spec = StoreSpec(
        teacher={
            "name": teacher,
            "backend": backend,
            "model": f"{teacher}.none",
            "patch": SIZE // grid,
            "dense_dim": dims.get("dense", 1),
            "summary_dim": dims.get("summary", 1),
            "licence": licence,
            "weights_sha256": "ab" * 32,
            "dtype": "fp32",
        },
        corpus={"fingerprint": "cd" * 32, "segments": [len(keys)], "root": "/pictures"},
        views={"policy": "rrc", "num_views": shape[1], "seed": views_seed},
        sizes=(SIZE,),
        grids=(grid,),
        tokens=tuple(features),
        samples_per_part=SAMPLES_PER_PART,
        precision=dict.fromkeys(features, "fp16"),
        versions={"eupe": "0"},
    )
    store = create_store(path, spec)
    if not finish:
        return store
    writer = StoreWriter(path)
    boxes = np.tile(np.array([0, 0, SIZE, SIZE], np.int32), (*shape, 1))
    boxes[0, 0, 0] = box_of_first
    for index in range(spec.num_parts):
        own = spec.part_samples(index)
        count = (own.stop - own.start, shape[1])
        rows = [Row(key, hashlib.sha256(key.encode()).hexdigest(), None, SIZE, SIZE) for key in keys[own]]
        held = {feature_path(SIZE, kind): values[own].astype(np.float16) for kind, values in features.items()}
        writer.commit(Part(index, rows, boxes[own], np.zeros(count, np.bool_), np.zeros(count, np.uint64), held))
    return finish_store(path)
