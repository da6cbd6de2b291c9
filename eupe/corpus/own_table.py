"""Parquet files that we wrote ourselves, and that a stranger may have changed: read within bounds of their own length.

Parquet can say in a few bytes what fills all memory: a row that is repeated, a long word under many rows. No file of
ours does, for each of its rows has a key of its own.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

TIMES_LONGER = 64
"""Than the file: all words of a column, where each row has its own."""
FREE_BYTES = 256 * 2**20
"""Of words, in the smallest file."""


def read_own_table(data: bytes) -> pa.Table:
    """Read a whole table, with every checksum and all text looked at.

    Raises: ValueError (an ArrowException is one, or an OSError) if it is damaged, or says more than it is long.
    """
    about = pq.read_metadata(pa.BufferReader(data))
    if about.num_rows > len(data):
        raise ValueError(f"it says that it has {about.num_rows} rows in {len(data)} bytes")
    schema = about.schema.to_arrow_schema()
    words = [field.name for field in schema if pa.types.is_string(field.type)]
    table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True, read_dictionary=words)
    plain = table.select([name for name in table.schema.names if name not in words])
    lengths = [_num_bytes(table[name]) for name in words]
    if max([plain.nbytes, *lengths], default=0) > TIMES_LONGER * len(data) + FREE_BYTES:
        raise ValueError(f"it says more than {len(data)} bytes of a table of ours can")
    columns = [table[name].cast(pa.string()) if name in words else table[name] for name in table.schema.names]
    table = pa.table(columns, schema=schema)
    table.validate(full=True)
    return table


def _num_bytes(column: pa.ChunkedArray) -> int:
    """Count the bytes of a column's words as if each row had its own."""
    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    lengths = (pc.binary_length(chunk.dictionary).take(chunk.indices) for chunk in column.chunks)
    return sum(pc.sum(length).as_py() or 0 for length in lengths)
