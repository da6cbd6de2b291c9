"""The location of a picture's bytes, and the one function that reads them."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass

import pyarrow as pa

from eupe.corpus.folder import MAX_PICTURE_BYTES
from eupe.corpus.tables import read_row
from eupe.errors import CorpusError, OutageError, StorageError
from eupe.place import Place, storage_error

OUTSIDE = r"^/|(^|/)\.\.(/|$)"
"""Pattern of file names that may lead outside their folder."""
PLACE_COLUMNS = ("file", "start", "length")
"""Columns of an index for the fields of `Inside`; null for a picture that is a file of its own."""


@dataclass(frozen=True)
class Inside:
    """The location of a picture's bytes in a file that holds many."""

    file: str
    """Path of a tar or table, below the corpus's root."""
    start: int
    """First byte in a tar, or row in a table, counted from 0."""
    length: int | None
    """Number of bytes in a tar; None in a table, where the row is enough."""


def insides(samples: pa.Table) -> list[Inside | None]:
    """Return the location for each row of an index; all None if it lacks these columns."""
    if not set(PLACE_COLUMNS) <= set(samples.schema.names):
        return [None] * len(samples)
    columns = (samples[name].to_pylist() for name in PLACE_COLUMNS)
    return [None if file is None else Inside(file, *rest) for file, *rest in zip(*columns, strict=True)]


def read_picture(root: Place, key: str, inside: Inside | None = None) -> bytes:
    """Read a picture's bytes.

    Args:
        inside: None for a picture that is a file of its own, whose path is the key.
    Raises: CorpusError if the picture cannot be read; StorageError if an object store fails; OutageError if the disk
        with the pictures is not available.
    """
    require_below(root, key if inside is None else inside.file)
    try:
        _require_file(root, key if inside is None else inside.file)
        if inside is None:
            require_length(root, key)
            return root.read(key)
        if inside.length is None:
            return read_row(root, inside.file, inside.start, key)
        if inside.length > MAX_PICTURE_BYTES:
            raise CorpusError(too_long(inside.length))
        data = root.read_range(inside.file, inside.start, inside.length)
    except FileNotFoundError as error:
        _require_root(root)  # an unmounted disk is not the picture's fault
        raise CorpusError(str(error)) from error
    except OutageError:
        raise
    except StorageError as error:
        if root.is_local:  # any other failure of a disk concerns only this file
            raise CorpusError(str(error)) from error
        raise
    if len(data) != inside.length:
        raise CorpusError(
            f"{root / inside.file} ends before byte {inside.start + inside.length}, where {key} would end"
        )
    return data


def require_below(root: Place, name: str) -> None:
    """Raise CorpusError if a name, from an index or a list, leads out of its folder.

    Links may lead out of it: they were put there by whoever made the folder of pictures.
    """
    if root.is_local and re.search(OUTSIDE, name):
        raise CorpusError(f"{name} does not lie below {root}; pictures and the files that hold them must lie there")


def require_length(root: Place, key: str) -> None:
    """Check the length of a local file before it is read.

    Raises: CorpusError if it is longer than `MAX_PICTURE_BYTES`; FileNotFoundError; StorageError.
    """
    if root.is_local and (length := root.size(key)) > MAX_PICTURE_BYTES:
        raise CorpusError(too_long(length))


def too_long(length: int) -> str:
    """Return the reason why a picture of this many bytes is not read."""
    return f"{length} bytes are more than a picture has (at most {MAX_PICTURE_BYTES})"


def _require_file(root: Place, key: str) -> None:
    """Check that a local path, if it exists, is a file.

    Raises: CorpusError if it is not; StorageError if it cannot be examined, OutageError if its disk is not available.
    """
    if not root.is_local:
        return
    path = root.path(key)
    try:
        if path.exists() and not path.is_file():
            raise CorpusError(f"{path} is a pipe, a device or a folder, not a file")
    except OSError as error:
        raise storage_error(error, path, "read") from error


def _require_root(root: Place) -> None:
    """Raise OutageError if a local root is missing or empty.

    A single picture may have been removed, but if all are missing, their disk probably is.
    """
    if root.is_local and not (root.local.is_dir() and any(root.local.iterdir())):
        raise OutageError(f"{root} is missing or empty on {socket.gethostname()}; mount it again")
