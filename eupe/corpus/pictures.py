"""Where a picture's bytes are, and the one function that reads them."""

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
"""Of the name of a file: that it may lie elsewhere than below its folder."""
PLACE_COLUMNS = ("file", "start", "length")
"""Of an index: the fields of `Inside`, null for a picture that is a file of its own."""


@dataclass(frozen=True)
class Inside:
    """A picture's bytes inside a file that holds many."""

    file: str
    """A tar or a Parquet table, below the corpus's root."""
    start: int
    """The first byte in a tar, the row in a table, from 0 on."""
    length: int | None
    """Bytes in a tar; None for a table, whose rows are found otherwise."""


def insides(samples: pa.Table) -> list[Inside | None]:
    """Of rows of an index; of one without these columns, all None."""
    if not set(PLACE_COLUMNS) <= set(samples.schema.names):
        return [None] * len(samples)
    columns = (samples[name].to_pylist() for name in PLACE_COLUMNS)
    return [None if file is None else Inside(file, *rest) for file, *rest in zip(*columns, strict=True)]


def read_picture(root: Place, key: str, inside: Inside | None = None) -> bytes:
    """A picture's bytes.

    Args:
        inside: None for a picture that is a file of its own, called as its key says.
    Raises: CorpusError if the picture cannot be read; StorageError if an object store serves nothing at all, and
        OutageError if the disk that it should be on is away.
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
        _require_root(root)
        raise CorpusError(str(error)) from error
    except OutageError:
        raise
    except StorageError as error:
        if root.is_local:
            raise CorpusError(str(error)) from error
        raise
    if len(data) != inside.length:
        raise CorpusError(
            f"{root / inside.file} ends before byte {inside.start + inside.length}, where {key} would end"
        )
    return data


def require_below(root: Place, name: str) -> None:
    """Raises: CorpusError for a name, from an index or a list, that leads out of its folder.

    Links are another matter: those that lie in a folder of pictures are of whoever made it.
    """
    if root.is_local and re.search(OUTSIDE, name):
        raise CorpusError(f"{name} does not lie below {root}; pictures and the files that hold them must lie there")


def require_length(root: Place, key: str) -> None:
    """Ask a local file for its length ahead of reading it.

    Raises: CorpusError if it is longer than any picture; FileNotFoundError; StorageError.
    """
    if root.is_local and (length := root.size(key)) > MAX_PICTURE_BYTES:
        raise CorpusError(too_long(length))


def too_long(length: int) -> str:
    """Say why a picture of this many bytes is not read."""
    return f"{length} bytes are more than a picture has (at most {MAX_PICTURE_BYTES})"


def _require_file(root: Place, key: str) -> None:
    """Raises: CorpusError; OutageError."""
    if not root.is_local:
        return
    path = root.path(key)
    try:
        if path.exists() and not path.is_file():
            raise CorpusError(f"{path} is a pipe, a device or a folder, not a file")
    except OSError as error:
        raise storage_error(error, path, "read") from error


def _require_root(root: Place) -> None:
    """A picture may be gone; where all are, their disk is.

    Raises: OutageError.
    """
    if root.is_local and not (root.local.is_dir() and any(root.local.iterdir())):
        raise OutageError(f"{root} is gone from {socket.gethostname()}, or empty; mount it again")
