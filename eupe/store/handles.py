"""How tensorstore, which moves the bytes, opens the arrays that zarr-python made."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import tensorstore as ts

from eupe.errors import PartCorruptError, StorageError

INDEX_CACHE_BYTES = 64 * 2**20
"""Keeps shard indexes, so that a random read costs one ranged read."""


def open_array(store: Path, path: str, *, writable: bool = False) -> Any:
    """A tensorstore handle; reading what was never written raises instead of giving the fill value."""
    return ts.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{(store / path).absolute()}/"},
            "fill_missing_data_reads": False,
            "store_data_equal_to_fill_value": True,
            "recheck_cached_metadata": "open",
            "recheck_cached_data": "open",
            "context": {"cache_pool": {"total_bytes_limit": INDEX_CACHE_BYTES}},
        },
        open=True,
        read=True,
        write=writable,
    ).result()


def read_result(future: Any, store: Path) -> Any:
    """Wait for a read.

    Raises: PartCorruptError, naming the store, if bytes are missing or fail their checksum.
    """
    try:
        return future.result()
    except (ValueError, OSError, NotImplementedError) as error:  # one per kind of damage tensorstore meets
        raise PartCorruptError(
            f"{store} has damaged or missing features: {error}; remove the part's file from {store / 'parts'} "
            "and run the same `eupe extract` again to redo it"
        ) from error


def storage_error(error: Exception, where: Path) -> StorageError:
    """One sentence for a write that the file system refused."""
    text = str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or "No space left" in text or "RESOURCE_EXHAUSTED" in text or "quota" in text:
        return StorageError(
            f"no space left while writing {where}; the parts committed before are whole: free some space and run the "
            "same command again"
        )
    return StorageError(f"{where} cannot be written: {text}")
