"""The two ways in which views are read: tensorstore for object stores, and a faster reader for local shards.

A chunk of dense tokens is one view. The local reader reads, checks and decompresses it straight into the batch;
tensorstore copies bytes into a buffer, the buffer into a chunk, and the chunk into the batch
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
import tensorstore as ts
from numcodecs import blosc
from numpy.typing import NDArray

from eupe.common.storage import StoragePath, is_outage, storage_error
from eupe.errors import PartCorruptError
from eupe.store.layout import ArrayLayout
from eupe.store.shard import ABSENT, CRC_BYTES, bytes_of_index, crc_holds, is_frame_of, most_bytes, object_key

CACHE_BYTES = 64 * 2**20
"""Size of the cache for the parts' boxes and for shard indexes, so that a random read is one ranged request."""
_context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})


def open_array(store: StoragePath, path: str, shape: Sequence[int]) -> Any:
    """Open an array for reading; reading what was never written raises instead of giving the fill value.

    Args:
        shape: shape that follows from the store's specification.
    Raises: PartCorruptError if the array's metadata is missing or damaged; StorageError.
    """
    spec = {
        "driver": "zarr3",
        "kvstore": (store / path).spec(),
        "fill_missing_data_reads": False,  # a missing chunk is damage
        "recheck_cached_metadata": "open",
        "recheck_cached_data": "open",  # not at each read, which would ask for the shard's index again
    }
    handle = read_result(ts.open(spec, open=True, read=True, context=_context), store)
    found = tuple(handle.shape)
    # an extension enlarges the arrays before the specification, and this store may have been opened before it
    if len(found) == len(shape) > 1 and found[0] > shape[0]:
        found = (shape[0], *found[1:])
    if found != tuple(shape):
        raise _damaged(store, f"{path} has shape {list(handle.shape)}, the specification says {list(shape)}")
    return handle


@dataclass(frozen=True)
class Array:
    """An array whose views can be read in any order."""

    handle: Any

    @classmethod
    def open(cls, store: StoragePath, layout: ArrayLayout) -> Array:
        """Open an array of a store.

        Raises: PartCorruptError if the array's metadata is missing or damaged; StorageError.
        """
        handle = open_array(store, layout.path, layout.shape)
        if handle.dtype.name != layout.dtype or handle.chunk_layout.read_chunk.shape != layout.chunk:
            raise _damaged(store, f"{layout.path} is not an array of {layout.dtype} in chunks of {list(layout.chunk)}")
        return cls(handle if layout.order is None else handle.transpose(layout.order))

    def begin(self, rows: Sequence[int], views: Sequence[int]) -> Reading:
        """Start to read B views in the given order: [B, ...], with the axes in the order of a chunk's bytes."""
        view = self.handle.vindex[list(rows), list(views)]
        # NumPy's memory, which the system backs with large pages
        values = np.empty(view.shape, view.dtype.numpy_dtype)
        return Reading(values, ts.array(values).write(view))


@dataclass(frozen=True)
class Reading:
    """A read in progress."""

    values: Any
    written: Any

    def result(self) -> Any:
        self.written.result()
        return self.values


def read_result(future: Any, store: StoragePath) -> Any:
    """Wait for a read and return its values.

    Raises: PartCorruptError naming the store if bytes are missing or fail their checksum; StorageError if an object
        store does not serve them.
    """
    try:
        return future.result()
    except (ValueError, OSError, NotImplementedError) as error:  # tensorstore raises one for each kind of damage
        if not store.is_local and is_outage(error):
            raise storage_error(error, store, "read") from error
        raise _damaged(store, error) from error


def _damaged(store: StoragePath, reason: object) -> PartCorruptError:
    return PartCorruptError(
        f"{store} has damaged or missing features: {reason}; run `eupe store verify {store}` to list the parts, "
        f"`eupe store repair {store}` to extract them again"
    )


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
            raise ValueError(f"chunk {place} of {self._path} lies outside it, according to its index")
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
