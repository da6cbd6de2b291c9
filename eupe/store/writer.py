"""Making a store and committing its parts: features first, the commit file last."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, TransposeCodec, ZstdCodec

from eupe.errors import SpecMismatchError, StoreError
from eupe.store.handles import open_array, storage_error
from eupe.store.layout import ATTRIBUTE, ArrayLayout, StoreSpec, arrays, differences, part_name
from eupe.store.reader import (
    PART_CHECKSUM,
    PART_STATS,
    ROW_SCHEMA,
    STATS,
    Store,
    checksum,
    committed_parts,
    open_store,
    read_part_metadata,
)
from eupe.store.stats import Moments, merge_all

FP16_MAX = 65504.0


@dataclass(frozen=True)
class Row:
    """One sample of a part."""

    key: str
    sha256: str | None
    label: str | None
    width: int | None = None
    height: int | None = None
    error: str | None = None
    """Why it has no features; None where it has."""


@dataclass(frozen=True)
class Part:
    """What one worker commits at once. Samples with an error hold NaN features and zero boxes."""

    index: int
    rows: Sequence[Row]
    boxes: NDArray[np.int32]
    flips: NDArray[np.bool_]
    digests: NDArray[np.uint64]
    features: Mapping[str, NDArray[np.float16]]
    """Array path (`224/dense`) to [samples, views, ...]."""
    num_clipped: int = 0
    """Values beyond fp16's range, stored as its largest."""
    versions: Mapping[str, str] = field(default_factory=dict)


def create_store(path: Path, spec: StoreSpec) -> Store:
    """Make an empty store, or open the one that is there if its spec is the same.

    Raises: SpecMismatchError listing the differences; StoreError if something else is at `path`; StorageError.
    """
    if path.exists() and any(path.iterdir() if path.is_dir() else [path]):
        return _open_same(path, spec)
    temporary = path.with_name(f".{path.name}.{_unique()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        group = zarr.open_group(temporary, mode="w", zarr_format=3, attributes={ATTRIBUTE: spec.to_json()})
        for layout in arrays(spec):
            _create_array(group, layout)
        (temporary / "parts").mkdir()
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if (path / "zarr.json").is_file():  # another writer was quicker
            return _open_same(path, spec)
        raise storage_error(error, path) from error
    return open_store(path)


def _open_same(path: Path, spec: StoreSpec) -> Store:
    store = open_store(path)
    if different := differences(store.spec, spec):
        raise SpecMismatchError(
            f"{path} holds features made to another specification ({'; '.join(different)}); "
            "give another --out, or the options it was made with"
        )
    return store


def _create_array(group: zarr.Group, layout: ArrayLayout) -> None:
    item_bytes = np.dtype(layout.dtype).itemsize
    is_float = layout.dtype == "float16"
    blosc = BloscCodec(typesize=item_bytes, cname="zstd", clevel=3, shuffle="bitshuffle" if is_float else "shuffle")
    group.create_array(
        layout.path,
        shape=layout.shape,
        dtype=layout.dtype,
        chunks=layout.chunk,
        shards=layout.shard if is_float else None,
        fill_value=float("nan") if is_float else 0,
        filters=None if layout.order is None else [TransposeCodec(order=layout.order)],
        compressors=[blosc, Crc32cCodec()],
        dimension_names=layout.dimensions,
    )


class StoreWriter:
    """Commits parts to a store that exists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec = open_store(path).spec
        self._arrays = {a.path: open_array(path, a.path, writable=True) for a in arrays(self.spec)}

    def commit(self, part: Part) -> None:
        """Write every array of the part, then, atomically, the file that makes it exist.

        Raises: StorageError; nothing of the part is visible then.
        """
        rows = self.spec.part_rows(part.index)
        values = {"boxes": part.boxes, "flips": part.flips, "digests": part.digests, **part.features}
        try:
            writes = [self._arrays[name][rows].write(value) for name, value in values.items()]
            moments = part_moments(part)
            for write in writes:
                write.result()
            self._commit_rows(part, moments)
        except (ValueError, OSError) as error:
            raise storage_error(error, self.path) from error

    def _commit_rows(self, part: Part, moments: Mapping[str, Moments]) -> None:
        table = pa.Table.from_pylist(
            [{**row.__dict__, "status": "ok" if row.error is None else "failed"} for row in part.rows],
            schema=ROW_SCHEMA,
        )
        stats = {
            "moments": {name: m.to_json() for name, m in moments.items()},
            "num_clipped": part.num_clipped,
            "versions": dict(part.versions),
        }
        encoded = json.dumps(stats, sort_keys=True).encode()
        table = table.replace_schema_metadata({PART_STATS: encoded, PART_CHECKSUM: checksum(encoded)})
        final = self.path / "parts" / part_name(part.index)
        temporary = final.with_name(f".{final.name}.{_unique()}.tmp")
        try:
            with temporary.open("wb") as file:
                pq.write_table(table, file, write_page_checksum=True)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(final)
        finally:
            temporary.unlink(missing_ok=True)
        _fsync_folder(final.parent)


def part_moments(part: Part) -> dict[str, Moments]:
    """Moments of each feature array's stored values, over the samples that have features."""
    ok = np.array([row.error is None for row in part.rows])
    return {name: Moments.of(values[ok].reshape(-1, values.shape[-1])) for name, values in part.features.items()}


def finish_store(path: Path) -> Store:
    """Merge the parts' statistics into `stats/`, which marks the store as finished. Harmless to repeat.

    Raises: StoreError while parts are missing, or if no sample has features.
    """
    store = open_store(path)
    if missing := store.missing_parts():
        raise StoreError(f"{path} lacks {len(missing)} of {store.spec.num_parts} parts and cannot be finished")
    metadata = [read_part_metadata(path, part) for part in committed_parts(path)]
    temporary = path / f".{STATS}.{_unique()}.tmp"
    try:
        group = zarr.open_group(temporary, mode="w", zarr_format=3)
        for name in metadata[0]["moments"]:
            total = merge_all(Moments.from_json(part["moments"][name]) for part in metadata)
            if total.count == 0:
                raise StoreError(f"{path}: no picture of the corpus could be read; see `eupe store info {path}`")
            statistics = {"mean": total.mean, "std": total.std, "count": np.array(total.count)}
            for statistic, values in statistics.items():
                group.create_array(f"{name}/{statistic}", data=values, compressors=[ZstdCodec(), Crc32cCodec()])
        shutil.rmtree(path / STATS, ignore_errors=True)
        temporary.rename(path / STATS)
    except OSError as error:
        raise storage_error(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _remove_leftovers(path)
    return open_store(path)


def _remove_leftovers(path: Path) -> None:
    """Temporary files of writers that were killed; called when every part is committed."""
    for leftover in [*path.glob("parts/.*.tmp"), *path.glob(f".{STATS}.*.tmp"), *path.rglob("*.__lock")]:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unique() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"
