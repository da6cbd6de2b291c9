"""Reading of arrays by tensorstore, which moves the bytes; zarr-python wrote their metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore as ts

from eupe.errors import PartCorruptError
from eupe.place import Place, is_outage, storage_error
from eupe.store.layout import ArrayLayout

CACHE_BYTES = 64 * 2**20
"""Size of the cache for the parts' boxes and for shard indexes, so that a random read is one ranged request."""
_context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})


def open_array(store: Place, path: str, shape: Sequence[int]) -> Any:
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
    def open(cls, store: Place, layout: ArrayLayout) -> Array:
        """Open an array of a store.

        Raises: PartCorruptError if the array's metadata is missing or damaged; StorageError.
        """
        handle = open_array(store, layout.path, layout.shape)
        if handle.dtype.name != layout.dtype or handle.chunk_layout.read_chunk.shape != layout.chunk:
            raise _damaged(store, f"{layout.path} is not made of {layout.dtype} in chunks of {list(layout.chunk)}")
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


def read_result(future: Any, store: Place) -> Any:
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


def _damaged(store: Place, reason: object) -> PartCorruptError:
    return PartCorruptError(
        f"{store} has damaged or missing features: {reason}; `eupe store verify {store}` names the parts, "
        f"`eupe store repair {store}` makes them again"
    )
