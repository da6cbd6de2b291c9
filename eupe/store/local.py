"""Reading of views from local shards: each is one chunk, read, checked and decompressed straight into the batch.

tensorstore is slower because it copies: bytes into a buffer, the buffer into a chunk, the chunk into the batch
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
from eupe.store.shard import ABSENT, CRC_BYTES, bytes_of_index, crc_holds, is_frame_of, most_bytes, object_key

OPEN_SHARDS = 64
"""Upper bound on the files that one array keeps open, with their indexes."""
VIEWS_PER_TASK = 16
"""Lower bound on the views of one task; smaller tasks would cost more to submit than to run."""


class LocalViews:
    """An array in a local folder, in which every chunk is one view."""

    def __init__(self, folder: Path, layout: ArrayLayout) -> None:
        self._folder = folder
        self._layout = layout
        # an evicted shard stays open for the threads that still read it: `_Shard.__del__` closes it
        self._shard = lru_cache(OPEN_SHARDS)(self._open)
        order = layout.order or range(len(layout.chunk))
        self._shape = tuple(layout.chunk[axis] for axis in order)[2:]
        self._dtype = np.dtype(layout.dtype).newbyteorder("<")

    def begin(self, rows: Sequence[int], views: Sequence[int]) -> LocalReading:
        """Start to read B views in the given order: [B, ...], with the axes in the order of a chunk's bytes."""
        values = np.empty((len(rows), *self._shape), self._dtype)
        out = values.reshape(len(rows), -1).view(np.uint8)
        tasks = max(1, min(_threads(), len(rows) // VIEWS_PER_TASK))
        shares = (slice(task, None, tasks) for task in range(tasks))
        return LocalReading(values, [_pool().submit(self._read, rows[s], views[s], out[s]) for s in shares])

    def _read(self, rows: Sequence[int], views: Sequence[int], out: NDArray[np.uint8]) -> None:
        """Read views into the rows of `out`.

        Raises: ValueError if bytes are damaged or were never written; OSError.
        """
        samples_per_shard, views_per_sample = self._layout.shard[:2]
        for row, view, values in zip(rows, views, out, strict=True):
            part, sample = divmod(row, samples_per_shard)
            data = self._shard(part).read(sample * views_per_sample + view)
            frame = memoryview(data)[:-CRC_BYTES]
            # Blosc reads and writes as far as the frame says, and an untrusted frame may have a valid checksum
            if not (crc_holds(data) and is_frame_of(frame, values.size)):
                raise ValueError(f"view {view} of row {row} of {self._layout.path} fails its checksum")
            try:
                blosc.decompress(frame, values)
            except RuntimeError as error:
                raise ValueError(f"view {view} of row {row} of {self._layout.path} is damaged: {error}") from error

    def _open(self, part: int) -> _Shard:
        return _Shard(self._folder / object_key(self._layout, part), self._layout)


@dataclass(frozen=True)
class LocalReading:
    """A read in progress."""

    values: NDArray[Any]
    tasks: Sequence[Future[None]]

    def result(self) -> NDArray[Any]:
        """Wait for the read and return its values.

        Raises: ValueError if bytes are damaged or were never written; OSError.
        """
        for task in self.tasks:
            task.result()
        return self.values


class _Shard:
    """An open shard file and its index; closed when nothing uses it any more."""

    def __init__(self, path: Path, layout: ArrayLayout) -> None:
        self._file = -1  # `__del__` runs even if `os.open` raises
        self._path = path
        self._file = os.open(path, os.O_RDONLY)
        size = bytes_of_index(layout)
        self._end = os.fstat(self._file).st_size - size
        self._longest = most_bytes(layout)
        data = b"" if self._end < 0 else os.pread(self._file, size, self._end)
        if len(data) < size or not crc_holds(data):
            raise ValueError(f"the index of {path} fails its checksum")
        self._index = np.frombuffer(data, "<u8", (size - CRC_BYTES) // 8).reshape(-1, 2)

    def read(self, place: int) -> bytes:
        """Return the bytes of a chunk, given its place in the grid.

        Raises: ValueError for a chunk that was never written, or does not lie in the file; OSError.
        """
        offset, length = self._index[place].tolist()
        if offset == ABSENT:
            raise ValueError(f"chunk {place} of {self._path} was never written")
        # before `pread` allocates: an untrusted index may have a valid checksum and any numbers
        if length > self._longest or offset + length > self._end:
            raise ValueError(f"chunk {place} of {self._path} does not lie in it, by its index")
        # not mmap: a disk that fails in mid-read would end the process by SIGBUS
        return os.pread(self._file, length, offset)

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)


def _threads() -> int:
    return min(32, os.cpu_count() or 1)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_threads(), "eupe-read")
