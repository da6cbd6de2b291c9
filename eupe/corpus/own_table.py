"""Reading of Parquet files that eupe wrote and somebody may have changed, with memory bounded by the file's length.

A few bytes of Parquet can expand until memory is full: a repeated row, or one long text in many rows. Our files never
do, because each row has a key of its own.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

TIMES_LONGER = 64
"""Limit, in lengths of the file, of each column's text (repeated values count each time) and of all other columns."""
FREE_BYTES = 256 * 2**20
"""Bytes allowed on top of that, so that small files pass."""


def read_own_table(data: bytes) -> pa.Table:
    """Read a whole table, verifying every checksum and all text.

    Raises: ValueError, OSError or ArrowException if it is damaged, or expands to more than our files of its length do.
    """
    about = pq.read_metadata(pa.BufferReader(data))
    if about.num_rows > len(data):  # each row has its own key, of a byte at least
        raise ValueError(f"it claims to have {about.num_rows} rows in {len(data)} bytes")
    schema = about.schema.to_arrow_schema()
    words = [field.name for field in schema if pa.types.is_string(field.type)]
    # As dictionaries, a repeated text is in memory once until its total length is known.
    table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True, read_dictionary=words)
    plain = table.select([name for name in table.schema.names if name not in words])
    lengths = [_num_bytes(table[name]) for name in words]
    if max([plain.nbytes, *lengths], default=0) > TIMES_LONGER * len(data) + FREE_BYTES:
        raise ValueError(f"it expands to more than a table of eupe with {len(data)} bytes can")
    columns = [table[name].cast(pa.string()) if name in words else table[name] for name in table.schema.names]
    table = pa.table(columns, schema=schema)
    table.validate(full=True)
    return table


def _num_bytes(column: pa.ChunkedArray) -> int:
    """Return the bytes of a column's text, with repeated values counted each time."""
    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    lengths = (pc.binary_length(chunk.dictionary).take(chunk.indices) for chunk in column.chunks)
    return sum(pc.sum(length).as_py() or 0 for length in lengths)
