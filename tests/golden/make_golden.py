"""Makes the fixtures of released formats, once. They are never made again: later versions must read these bytes.

PYTHONPATH=tests/store python tests/golden/make_golden.py
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors.numpy import save_file
from store_cases import make_case, make_spec

from eupe.common.storage import StoragePath
from eupe.corpus.index import SCHEMA, Corpus, index_bytes
from eupe.store.layout import StoreSpec, segment_name
from eupe.store.writer import StoreWriter, create_store, finish_store

HERE = Path(__file__).parent
PRECISIONS = {"fp16": "fp16", "bitround5": "bitround:5", "int8": "int8", "layers": "int8"}
LAYERS = {"layers": {"6": 5}}
"""Layers of the fixtures that have any, and their channels; these are of format 2."""


def golden_spec(name: str) -> StoreSpec:
    """Two segments, so that there are rows without a sample; two sizes; int8 keeps its pixels, too."""
    precision = dict.fromkeys(("summary", "dense"), PRECISIONS[name])
    spec = make_spec(
        segments=[3, 2],
        num_views=2,
        samples_per_part=2,
        precision=precision,
        grids={16: 2, 24: 3},
        layers=LAYERS.get(name),
    )
    return replace(spec, pixels=name == "int8")


def place(name: str) -> Path:
    return HERE / f"format{golden_spec(name).format}" / f"{name}.zarr"


def make(name: str) -> None:
    path = place(name)
    case = make_case(golden_spec(name), failed={1}, seed=1)
    corners = np.sort(np.random.default_rng(2).integers(0, 240, (5, 2, 2, 2)), axis=2) * 2 + np.array([[0], [1]])
    case.arrays["boxes"][case.ok] = corners.reshape(5, 2, 4)[case.ok]
    index = [{"key": row.key, "sha256": row.sha256, "label": row.label} for row in case.rows]
    pictures = Corpus(StoragePath("/pictures"), pa.Table.from_pylist(index, schema=SCHEMA))
    corpus = {**case.spec.corpus, "fingerprint": pictures.fingerprint}
    case = replace(case, spec=replace(case.spec, corpus=corpus))
    store = create_store(path, case.spec)
    for i, rows in enumerate((slice(0, 3), slice(3, 5))):
        segment = Corpus(pictures.root, pictures.samples[rows])
        store.path.write(segment_name(i), index_bytes(segment))
    writer = StoreWriter(path)
    rng = np.random.default_rng(1)
    sides = case.spec.sizes if case.spec.pixels else ()
    pixels = {side: rng.integers(0, 256, (5, 2, side, side, 3), dtype=np.uint8) for side in sides}
    for index in range(case.spec.num_parts):
        samples = case.spec.part_samples(index)
        writer.commit(replace(case.part(index), pixels={side: values[samples] for side, values in pixels.items()}))
    finish_store(path)
    expected = {name: np.ascontiguousarray(values) for name, values in case.kept.items()}
    expected |= {f"{side}/pixels": values for side, values in pixels.items()}
    expected["rows"] = np.array(case.places)
    save_file(expected, path.with_suffix(".safetensors"))


if __name__ == "__main__":
    lacking = [name for name in PRECISIONS if not place(name).exists()]
    if not lacking:
        sys.exit("every format has its fixtures already; a change of the format raises its number")
    for name in lacking:
        make(name)
