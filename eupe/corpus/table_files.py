"""Table files with one interface: Parquet, and Arrow as Hugging Face's `save_to_disk` writes it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from eupe.common.storage import StoragePath
from eupe.corpus.columns import Path
from eupe.errors import CorpusError, StorageError

ARROW = ".arrow"
FILE_MAGIC = b"ARROW1"
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"

SLICE_BYTES = 8 * 2**20
"""Approximate number of bytes decoded at once."""
SLICE_ROWS = 1024
REPEATED_BYTES = 256 * 2**20
"""Limit of bytes decoded at once if one value may be in every row: Parquet stores such a value only once."""


class ParquetTable:
    """A Parquet file, whose groups are Parquet's row groups."""

    def __init__(self, root: StoragePath, name: str) -> None:
        """Open the file.

        Raises: FileNotFoundError; CorpusError if it cannot be read as Parquet; StorageError if the storage fails.
        """
        file = root.open(name)
        try:
            about = pq.read_metadata(file)
            self._file = pq.ParquetFile(
                file,
                metadata=about,
                read_dictionary=_in_lists(about),
                # Without these two, whole column chunks of a row group would be in memory.
                pre_buffer=False,
                buffer_size=2**20,
                page_checksum_verification=True,
            )
        except (StorageError, FileNotFoundError):
            raise
        except (OSError, ValueError, pa.ArrowException) as error:
            raise CorpusError(f"{root / name} cannot be read as Parquet: {error}") from error
        groups = range(self._file.metadata.num_row_groups)
        self.ends = list(accumulate(self._file.metadata.row_group(group).num_rows for group in groups))
        """Row after the last one of each group, counted over the whole file."""

    @property
    def schema(self) -> pa.Schema:
        return self._file.schema_arrow

    def batches(self, group: int, columns: Sequence[Path]) -> Iterator[pa.RecordBatch]:
        """Yield some columns of a group, in slices of some megabytes."""
        about = self._file.metadata.row_group(group)
        names = [".".join(path) for path in columns]
        rows = min(_slice_rows(about.num_rows, about.total_byte_size), _rows_of_repeated(about, names))
        yield from self._file.iter_batches(rows, row_groups=[group], columns=names)


class ArrowTable:
    """A local Arrow file or stream, mapped into memory, whose groups are Arrow's record batches."""

    def __init__(self, root: StoragePath, name: str) -> None:
        """Open the file.

        Raises: FileNotFoundError; CorpusError if it is not local, truncated or not Arrow; StorageError if the storage
            fails.
        """
        where = root / name
        if not root.is_local:
            raise CorpusError(
                f"{where} is an Arrow file, which can be read from a local disk only; copy it to one, or write the "
                "data set with `to_parquet` and upload that"
            )
        with root.open(name) as file:
            magic = file.read(len(FILE_MAGIC))
            file.seek(0, 2)
            file.seek(max(0, file.tell() - len(STREAM_END)))
            end = file.read()
        try:
            mapped = pa.memory_map(where.url)
            if magic == FILE_MAGIC:
                reader = pa.ipc.open_file(mapped)
                self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            else:
                reader = pa.ipc.open_stream(mapped)
                self._batches = list(reader)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise CorpusError(f"{where} cannot be read as Arrow: {error}; make or fetch it again") from error
        # pyarrow takes a stream that is cut between two batches for a whole one.
        if magic != FILE_MAGIC and end != STREAM_END:
            rows = sum(map(len, self._batches))
            raise CorpusError(
                f"{where} is truncated after {rows} rows (its end mark is missing); make or fetch it again"
            )
        self.schema = reader.schema
        self.ends = list(accumulate(map(len, self._batches)))

    def batches(self, group: int, columns: Sequence[Path]) -> Iterator[pa.RecordBatch]:
        """Yield some columns of a group, in slices of some megabytes."""
        batch = self._batches[group].select(list(dict.fromkeys(path[0] for path in columns)))
        rows = _slice_rows(len(batch), batch.nbytes)
        for start in range(0, len(batch), rows):
            yield batch.slice(start, rows)

    def row(self, row: int) -> pa.RecordBatch:
        """Return one row as a batch; the other rows are not read."""
        group = bisect_right(self.ends, row)
        return self._batches[group].slice(row - (self.ends[group - 1] if group else 0), 1)


TableFile = ParquetTable | ArrowTable


def open_table(root: StoragePath, name: str) -> TableFile:
    """Open a table, as Arrow or Parquet by its name.

    Raises: FileNotFoundError; CorpusError if it cannot be read as a table; StorageError if the storage fails.
    """
    return ArrowTable(root, name) if name.lower().endswith(ARROW) else ParquetTable(root, name)


def num_rows(table: TableFile) -> int:
    """Return the number of rows of all groups."""
    return table.ends[-1] if table.ends else 0


def column_at(batch: pa.RecordBatch, path: Path) -> pa.Array:
    """Return a column, or a child of a struct column, which is null where the struct is."""
    column = batch.column(path[0])
    for name in path[1:]:
        # Unlike field(), flatten() makes a child null where its struct is.
        column = column.flatten()[column.type.get_field_index(name)]
    return column


def _slice_rows(num_rows: int, num_bytes: int) -> int:
    return max(1, min(SLICE_ROWS, SLICE_BYTES * num_rows // max(1, num_bytes)))


def _in_lists(about: pq.FileMetaData) -> list[str]:
    """Return the columns of bytes in lists, kept as dictionaries: one row may hold the same value a million times."""
    columns = [about.schema.column(i) for i in range(about.num_columns)]
    return [c.path for c in columns if c.max_repetition_level and c.physical_type == "BYTE_ARRAY"]


def _rows_of_repeated(about: pq.RowGroupMetaData, names: Sequence[str]) -> int:
    """Return how many rows may be decoded at once if each held the longest value that the dictionaries can hold."""
    chunks = (about.column(i) for i in range(about.num_columns))
    longest: int = sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.has_dictionary_page and f"{chunk.path_in_schema}.".startswith(tuple(f"{name}." for name in names))
    )
    return max(1, REPEATED_BYTES // max(1, longest))
