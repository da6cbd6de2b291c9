"""An index made piece by piece: the next run reuses the hashes of a killed one, and memory holds only a few pieces."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from eupe.common.files import remove_unfinished
from eupe.common.outputs import require_out
from eupe.common.storage import AnyPath, StoragePath
from eupe.corpus.choice import AS_FOUND, Choice
from eupe.corpus.index import (
    Corpus,
    Progress,
    chosen_index,
    index_bytes,
    index_from_bytes,
    index_metadata,
    index_pieces,
    joined_notes,
    read_index,
    require_pictures,
    write_index,
)
from eupe.corpus.left_out import EVERYTHING, Patterns, added
from eupe.corpus.sources import find_source
from eupe.corpus.tables import is_index
from eupe.errors import CorpusError, StorageError

UNFINISHED = ".unfinished"
"""Suffix of the folder of pieces, which is beside the index and named after it."""
PIECE = re.compile(r"\d{6}\.parquet")
"""Names of pieces; nothing else in their folder is read or removed."""
ROWS_PER_GROUP = 65536


def make_index(
    source: AnyPath,
    out: AnyPath,
    *,
    patterns: Patterns = EVERYTHING,
    progress: Progress = lambda done, of: None,
    choice: Choice = AS_FOUND,
    overwrite: bool = False,
) -> Corpus:
    """Index pictures into a file, reusing an earlier index there and the pieces of an interrupted run.

    Args:
        source, patterns, choice: as in `open_corpus`.
        overwrite: whether to replace a file there that is not an index.
    Raises: CorpusError if there is no picture, or the place cannot be written; ConfigError if the file there is not an
        index, or is one of the sources; StorageError if an object store cannot be read or written.
    """
    found = replace(find_source(source, patterns), choice=choice)
    sources = [source, *(found.root / name for name in found.files)]
    place = require_out(out, lambda there: is_index(there.parent, there.name), sources=sources, overwrite=overwrite)
    if found.kind == "index":
        corpus = chosen_index(found)
        write_index(corpus, place)
        return corpus
    previous = None
    with contextlib.suppress(CorpusError):
        previous = read_index(place)
    unfinished = place.parent / f"{place.name}{UNFINISHED}"
    # All of them are read now, because new pieces take the same names.
    interrupted = [piece.samples for piece in _left_over(unfinished) if piece.root == found.root]
    made = Corpus(found.root, pa.table({}), found.left_out, choice)
    num_pieces = 0
    try:
        for piece in index_pieces(found, previous, progress, interrupted=interrupted):
            unfinished.write(_piece_name(num_pieces), index_bytes(Corpus(found.root, piece.rows, piece.left_out)))
            notes = joined_notes((made.notes, piece.notes))
            made = replace(made, left_out=added(made.left_out, piece.left_out), notes=notes)
            num_pieces += 1
        keys = [_piece(unfinished, number).select(["key"]) for number in range(num_pieces)]
        require_pictures(found, replace(made, samples=pa.concat_tables(keys)))
        place.parent.write_blocks(place.name, _joined(unfinished, num_pieces, made))
    except StorageError as error:
        if place.is_local and found.root.is_local:
            raise CorpusError(f"the index {out} cannot be written: {error}") from error
        raise
    # Only now: until the index is written, a killed run resumes from its pieces.
    for name in filter(PIECE.fullmatch, unfinished.list()):
        unfinished.delete(name)
    if unfinished.is_local:
        remove_unfinished(unfinished.local)
        with contextlib.suppress(OSError):  # other files are in the folder
            unfinished.local.rmdir()
    return index_from_bytes(place.parent.read(place.name), str(out))


def _piece_name(number: int) -> str:
    return f"{number:06d}.parquet"


def _piece(unfinished: StoragePath, number: int) -> pa.Table:
    name = _piece_name(number)
    return index_from_bytes(unfinished.read(name), str(unfinished / name)).samples


def _left_over(unfinished: StoragePath) -> Iterator[Corpus]:
    if unfinished.is_local and not unfinished.local.is_dir():
        return
    for name in filter(PIECE.fullmatch, unfinished.list()):
        with contextlib.suppress(CorpusError):
            yield index_from_bytes(unfinished.read(name), name)


def _joined(unfinished: StoragePath, count: int, made: Corpus) -> Iterator[bytes]:
    """Yield the index of all pieces as blocks of Parquet."""
    sink = _Sink()
    writer: pq.ParquetWriter | None = None
    rows: list[pa.Table] = []
    for number in range(count):
        rows.append(_piece(unfinished, number))
        if sum(map(len, rows)) < ROWS_PER_GROUP and number + 1 < count:
            continue
        table = pa.concat_tables(rows)
        if writer is None:
            schema = table.schema.with_metadata(index_metadata(made))
            writer = pq.ParquetWriter(sink, schema, write_page_checksum=True)
        writer.write_table(table.replace_schema_metadata(index_metadata(made)))
        rows = []
        yield sink.taken()
    if writer is not None:
        writer.close()
    yield sink.taken()


class _Sink:
    """A writable file whose written bytes are taken out between writes."""

    closed = False

    def __init__(self) -> None:
        self._blocks: list[bytes] = []
        self._length = 0

    def write(self, data: bytes) -> int:
        self._blocks.append(bytes(data))
        self._length += len(data)
        return len(data)

    def tell(self) -> int:
        return self._length

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def taken(self) -> bytes:
        data = b"".join(self._blocks)
        self._blocks = []
        return data
