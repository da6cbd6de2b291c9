"""Where a picture's bytes are, and the one function that reads them."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from eupe.corpus.tables import read_row
from eupe.errors import CorpusError, StorageError
from eupe.place import Place

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
    Raises: CorpusError if the picture cannot be read; StorageError if an object store serves nothing at all.
    """
    if inside is None and root.is_local and (path := root.local / key).exists() and not path.is_file():
        raise CorpusError(f"{path} is a pipe, a device or a folder, not a file")
    try:
        if inside is None:
            return root.read(key)
        if inside.length is None:
            return read_row(root, inside.file, inside.start)
        data = root.read_range(inside.file, inside.start, inside.length)
    except FileNotFoundError as error:
        raise CorpusError(str(error)) from error
    except StorageError as error:
        if root.is_local:
            raise CorpusError(str(error)) from error
        raise
    if len(data) != inside.length:
        raise CorpusError(
            f"{root / inside.file} ends before byte {inside.start + inside.length}, where {key} would end"
        )
    return data
