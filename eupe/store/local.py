"""Views out of local shards: each is one chunk, read, checked and decompressed straight into its place in the batch.

Faster than tensorstore by what that copies: bytes into a buffer, a buffer into a chunk, a chunk into the batch
(docs/decisions/0004-local-reads-and-writes.md).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from eupe.store.layout import ArrayLayout
from eupe.store.shard import ABSENT, CRC_BYTES, bytes_of_index, crc_holds, object_key

OPEN_SHARDS = 64
"""Files that one array keeps open, with their indexes."""
VIEWS_PER_TASK = 4
"""At least; fewer would cost more to hand out than to read."""


class LocalViews:
    """An array of which every chunk is one view, in a folder on this machine."""

    def __init__(self, folder: Path, layout: ArrayLayout) -> None:
        self._folder = folder
        self._layout = layout
        self._shard = lru_cache(OPEN_SHARDS)(self._open)
        order = layout.order or range(len(layout.chunk))
        self._shape = tuple(layout.chunk[axis] for axis in order)[2:]
        self._dtype = np.dtype(layout.dtype).newbyteorder("<")

    def begin(self, rows: Sequence[int], views: Sequence[int]) -> LocalReading:
        """Read B views in the order given: [B, ...], the axes as they lie in a chunk."""
        values = np.empty((len(rows), *self._shape), self._dtype)
        places = list(zip(rows, views, values.reshape(len(rows), -1).view(np.uint8), strict=True))
        tasks = max(1, min(2 * _threads(), len(rows) // VIEWS_PER_TASK))
        return LocalReading(values, [_pool().submit(self._read, places[task::tasks]) for task in range(tasks)])

    def _read(self, places: Sequence[tuple[int, int, NDArray[np.uint8]]]) -> None:
        """Raises: ValueError where bytes are damaged or were never written; OSError."""
        samples, views = self._layout.shard[0], self._layout.shard[1]
        for row, view, out in places:
            part, sample = divmod(row, samples)
            data = self._shard(part).read(sample * views + view)
            if not crc_holds(data) or int.from_bytes(data[4:8], "little") != out.size:
                raise ValueError(f"view {view} of row {row} of {self._layout.path} fails its checksum")
            blosc.decompress(memoryview(data)[:-CRC_BYTES], out)

    def _open(self, part: int) -> _Shard:
        return _Shard(self._folder / object_key(self._layout, part), self._layout)


@dataclass(frozen=True)
class LocalReading:
    """A read under way."""

    values: NDArray[Any]
    tasks: Sequence[Future[None]]

    def result(self) -> NDArray[Any]:
        """Raises: ValueError, OSError."""
        for task in self.tasks:
            task.result()
        return self.values


class _Shard:
    """An open file and its index; closed with the last who uses it."""

    def __init__(self, path: Path, layout: ArrayLayout) -> None:
        self._file = -1
        self._path = path
        self._file = os.open(path, os.O_RDONLY)
        size = bytes_of_index(layout)
        data = os.pread(self._file, size, max(0, os.fstat(self._file).st_size - size))
        if len(data) < size or not crc_holds(data):
            raise ValueError(f"the index of {path} fails its checksum")
        self._index = np.frombuffer(data, "<u8", (size - CRC_BYTES) // 8).reshape(-1, 2)

    def read(self, place: int) -> bytes:
        """Raises: ValueError for a chunk that was never written; OSError."""
        offset, length = self._index[place].tolist()
        if offset == ABSENT:
            raise ValueError(f"chunk {place} of {self._path} was never written")
        return os.pread(self._file, length, offset)

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)


def _threads() -> int:
    return min(32, os.cpu_count() or 1)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_threads(), "eupe-read")
