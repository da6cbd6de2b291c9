"""Reading a store: its spec, its samples, its statistics, and features in any order."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from numpy.typing import NDArray

from eupe.errors import PartCorruptError, StoreError
from eupe.store.handles import open_array, read_result
from eupe.store.layout import ATTRIBUTE, DENSE, SUMMARY, StoreSpec, feature_path, part_name

PART_STATS = b"eupe.part"
PART_CHECKSUM = b"eupe.crc32"
"""CRC-32 of `eupe.part`, which the page checksums of Parquet do not cover; eight hexadecimal digits."""
STATS = "stats"
ROW_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("sha256", pa.string()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("label", pa.string()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ]
)


@dataclass(frozen=True)
class Features:
    """What was stored for a batch of B views at one size."""

    boxes: NDArray[np.int32]
    """[B, 4], x0 y0 x1 y1 in pixels of the upright picture."""
    flips: NDArray[np.bool_]
    """[B]"""
    digests: NDArray[np.uint64]
    """[B], `eupe.corpus.views.view_digest` of each view rendered at the store's first size."""
    summary: NDArray[np.float16] | None = None
    """[B, Ds]"""
    dense: NDArray[np.float16] | None = None
    """[B, h, w, D]"""


@dataclass(frozen=True)
class ChannelStats:
    """Per-channel statistics over every valid view of a store, float64 [D]."""

    count: int
    mean: NDArray[np.float64]
    std: NDArray[np.float64]


class PendingFeatures:
    """Reads under way; `result()` waits for them."""

    def __init__(self, store: Path, futures: dict[str, Any]) -> None:
        self._store = store
        self._futures = futures

    def result(self) -> Features:
        """Raises: PartCorruptError if bytes are missing or fail their checksum."""
        return Features(**{name: read_result(future, self._store) for name, future in self._futures.items()})


class Store:
    """A store opened for reading."""

    def __init__(self, path: Path, spec: StoreSpec) -> None:
        self.path = path
        self.spec = spec
        self._handles: dict[str, Any] = {}

    @property
    def finished(self) -> bool:
        """Every part is committed and the statistics are written."""
        return (self.path / STATS).is_dir() and not self.missing_parts()

    def missing_parts(self) -> list[int]:
        return sorted(set(range(self.spec.num_parts)) - set(committed_parts(self.path)))

    @cached_property
    def samples(self) -> pa.Table:
        """One row per sample of every committed part: `row`, its place in the arrays, and `ROW_SCHEMA`'s columns."""
        parts = committed_parts(self.path)
        with ThreadPoolExecutor() as pool:
            tables = list(pool.map(self._part_rows, parts))
        return pa.concat_tables(tables) if tables else _with_rows(ROW_SCHEMA.empty_table(), 0)

    def _part_rows(self, part: int) -> pa.Table:
        rows = self.spec.part_rows(part)
        table = _read_part(self.path, part).replace_schema_metadata()
        if table.num_rows != rows.stop - rows.start:
            raise PartCorruptError(
                f"{self.path / 'parts' / part_name(part)} has {table.num_rows} rows, the store's layout asks for "
                f"{rows.stop - rows.start}; remove it and run the same `eupe extract` again"
            )
        return _with_rows(table, rows.start)

    def stats(self, size: int, kind: str) -> ChannelStats:
        """Mean and standard deviation of `summary` or `dense` at a size.

        Raises: StoreError if the store is not finished.
        """
        if not self.finished:
            raise StoreError(
                f"{self.path} is not finished: {len(self.missing_parts())} of {self.spec.num_parts} parts are missing; "
                "run its `eupe extract` again to go on"
            )
        group = zarr.open_group(self.path / STATS / feature_path(size, kind), mode="r")
        return ChannelStats(int(group["count"][()]), np.asarray(group["mean"]), np.asarray(group["std"]))

    def read(self, rows: Sequence[int], views: Sequence[int], *, size: int | None = None) -> Features:
        """Features of B views, in the order given.

        Args:
            rows, views: [B] each; places along the first two axes.
            size: one of `spec.sizes`; the first where not given.
        Raises: PartCorruptError; IndexError for a place that the store does not have.
        """
        return self.read_async(rows, views, size=size).result()

    def read_async(self, rows: Sequence[int], views: Sequence[int], *, size: int | None = None) -> PendingFeatures:
        """`read`, begun now and waited for later."""
        self._require_in_range(rows, views)
        size = self.spec.sizes[0] if size is None else size
        paths = {"boxes": "boxes", "flips": "flips", "digests": "digests"}
        paths |= {kind: feature_path(size, kind) for kind in (SUMMARY, DENSE) if kind in self.spec.tokens}
        futures = {name: self._handle(path).vindex[list(rows), list(views)].read() for name, path in paths.items()}
        return PendingFeatures(self.path, futures)

    def read_summaries(
        self, rows: Sequence[int], views: Sequence[int], *, size: int | None = None
    ) -> NDArray[np.float16]:
        """Only the summaries of B views, [B, Ds].

        Raises: PartCorruptError; IndexError for a place that the store does not have.
        """
        self._require_in_range(rows, views)
        path = feature_path(self.spec.sizes[0] if size is None else size, SUMMARY)
        future = self._handle(path).vindex[list(rows), list(views)].read()
        summaries: NDArray[np.float16] = read_result(future, self.path)
        return summaries

    def _require_in_range(self, rows: Sequence[int], views: Sequence[int]) -> None:
        """Raises: IndexError."""
        for name, places, count in (("row", rows, self.spec.num_samples), ("view", views, self.spec.num_views)):
            if len(places) and not 0 <= min(places) <= max(places) < count:
                raise IndexError(f"{self.path} has {name}s 0 to {count - 1}; got {min(places)} to {max(places)}")

    def _handle(self, path: str) -> Any:
        if path not in self._handles:
            self._handles[path] = open_array(self.path, path)
        return self._handles[path]


def open_store(path: str | Path) -> Store:
    """Open a store for reading.

    Raises: StoreError if there is none; FormatVersionError if it is newer than this code.
    """
    path = Path(path)
    if not (path / "zarr.json").is_file():
        what = "is not a feature store (no zarr.json)" if path.exists() else "does not exist"
        raise StoreError(f"store {path} {what}; make one with `eupe extract --out {path}`")
    try:
        attributes = json.loads((path / "zarr.json").read_bytes()).get("attributes", {}).get(ATTRIBUTE, {})
    except (OSError, ValueError) as error:
        raise StoreError(f"store {path} cannot be opened: its zarr.json is damaged ({error})") from error
    return Store(path, StoreSpec.from_json(attributes, where=str(path)))


def committed_parts(path: Path) -> list[int]:
    """Parts whose commit file exists, in order."""
    names = (file.name for file in (path / "parts").glob("[0-9]*.parquet"))
    return sorted(int(name.split(".")[0]) for name in names if re.fullmatch(r"\d{5,}\.parquet", name))


def read_part_metadata(path: Path, part: int) -> dict[str, Any]:
    """`moments` per array, `num_clipped` and library `versions` of a committed part."""
    metadata: dict[str, Any] = json.loads(_read_part(path, part).schema.metadata[PART_STATS])
    return metadata


def _read_part(path: Path, part: int) -> pa.Table:
    file = path / "parts" / part_name(part)
    try:
        table = pq.read_table(file, page_checksum_verification=True)
        if not table.schema.equals(ROW_SCHEMA):
            raise ValueError("its columns are not those of a part")
        if table.schema.metadata[PART_CHECKSUM] != checksum(table.schema.metadata[PART_STATS]):
            raise ValueError("its statistics fail their checksum")
        return table
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise PartCorruptError(
            f"{file} is damaged ({error}); remove it and run the same `eupe extract` again to redo the part"
        ) from error


def checksum(data: bytes) -> bytes:
    """CRC-32 in eight hexadecimal digits."""
    return b"%08x" % zlib.crc32(data)


def _with_rows(table: pa.Table, start: int) -> pa.Table:
    return table.add_column(0, "row", pa.array(np.arange(start, start + table.num_rows, dtype=np.int64)))
