"""Corpora of any size, stores of given features written without a teacher, and the rate of their codec alone."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numcodecs import blosc
from numpy.typing import NDArray

from eupe.common.storage import StoragePath
from eupe.corpus.index import SCHEMA, Corpus, index_folder
from eupe.store import Store
from eupe.store.layout import StoreSpec, arrays
from eupe.store.precision import INT8, Calibration, encode
from eupe.store.shard import CRC_BYTES, chunks_of, encode_chunk
from eupe.store.writer import Part, Row, StoreWriter, create_store, finish_store

PART_VIEWS = 512
PATH = "224/dense"
Measured = TypeVar("Measured")


def repeated_corpus(pictures: Path, folder: Path, count: int) -> Corpus:
    """Make a corpus of `count` pictures: those of a folder, repeated under other keys through links in a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    once = index_folder(pictures).samples
    copies = []
    for i in range(-(-count // len(once))):
        (folder / f"{i:05d}").symlink_to(pictures.resolve(), target_is_directory=True)
        keys = pc.binary_join_element_wise(f"{i:05d}", once["key"], "/")
        copies.append(once.set_column(0, SCHEMA.field("key"), keys))
    return Corpus(StoragePath.of(folder), pa.concat_tables(copies).slice(0, count).combine_chunks())


def dense_spec(features: NDArray[np.float16], precision: str) -> StoreSpec:
    """Return the spec of a store for dense maps [V, h, w, D], with one view per sample."""
    count, grid, _, dim = features.shape
    spec = StoreSpec(
        teacher={"name": "benchmark", "licence": "", "dense_dim": dim, "summary_dim": 0, "patch": 224 // grid},
        corpus={"fingerprint": "", "segments": [count], "root": ""},
        views={"policy": "center", "num_views": 1},
        sizes=(224,),
        grids=(grid,),
        tokens=("dense",),
        samples_per_part=PART_VIEWS,
        precision={"dense": precision},
    )
    return replace(spec, calibration={PATH: calibrated(features).to_json()}) if precision == INT8 else spec


def calibrated(features: NDArray[np.float16]) -> Calibration:
    """Return a calibration from about 128 views, as `eupe extract` makes it."""
    return Calibration.of(features[:: max(1, len(features) // 128)])


def part_of(features: NDArray[np.float16], index: int) -> Part:
    """Return the content of one part, with made-up keys and boxes."""
    values = features[index * PART_VIEWS : (index + 1) * PART_VIEWS][:, None]
    n = len(values)
    rows = [Row(f"{index * PART_VIEWS + i:08d}.jpg", "0" * 64, None, 640, 480) for i in range(n)]
    boxes = np.tile(np.array([0, 0, 224, 224], np.int32), (n, 1, 1))
    return Part(index, rows, boxes, np.zeros((n, 1), np.bool_), np.ones((n, 1), np.uint64), {PATH: values})


def write_store(path: Path, features: NDArray[np.float16], precision: str = "fp16") -> Store:
    """Write a finished store of the features."""
    shutil.rmtree(path, ignore_errors=True)
    spec = dense_spec(features, precision)
    create_store(path, spec)
    writer = StoreWriter(path)
    for part in range(spec.num_parts):
        writer.commit(part_of(features, part))
    return finish_store(path)


def encoded_chunks(features: NDArray[np.float16], precision: str) -> list[bytes]:
    """Return the chunks as a store holds them, with their checksums."""
    spec = dense_spec(features, precision)
    layout = next(layout for layout in arrays(spec) if layout.path == PATH)
    stored = encode(features, precision, spec.array_calibration(PATH))
    return [encode_chunk(chunk, layout) for chunk in chunks_of(stored[:, None], layout)]


def decode_rate(chunks: list[bytes], pool: ThreadPoolExecutor, threads: int) -> float:
    """Return the codec's limit: chunks per second that all threads decompress from memory into batches of 64."""
    bare = [memoryview(chunk)[:-CRC_BYTES] for chunk in chunks]
    size = len(blosc.decompress(bare[0]))

    def job(thread: int) -> None:
        for first in range(thread * 64, len(bare), threads * 64):
            batch = np.empty((64, size), np.uint8)
            for chunk, place in zip(bare[first : first + 64], batch, strict=False):
                blosc.decompress(chunk, place)

    return len(bare) / seconds(lambda: list(pool.map(job, range(threads))))


def peak_mb(process: int | str = "self") -> float:
    """Return the peak memory of a process in MB; `getrusage` would include that of its parent."""
    return int(Path(f"/proc/{process}/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def seconds(work: Callable[[], Any]) -> float:
    """Return the wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def interleaved(measures: Mapping[str, Callable[[], Measured]], repeats: int) -> dict[str, list[Measured]]:
    """Run each measure once per round, so that the machine's noise affects all of them equally."""
    results: dict[str, list[Measured]] = {name: [] for name in measures}
    for _ in range(repeats):
        for name, measure in measures.items():
            results[name].append(measure())
    return results


def spread(values: list[float]) -> str:
    """Return the median and the range of the values as text."""
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f})"
