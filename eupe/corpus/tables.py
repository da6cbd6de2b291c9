"""Pictures in Parquet tables: as bytes, or as paths of files beside the table.

Bytes are in a struct column of `bytes` and perhaps `path`, as Hugging Face writes them, or in a binary column. Rows are
decoded in slices of some megabytes, and what has been decoded is kept within bounds, so that rows that are asked for
one after the other are decoded once. A row at random costs the decoding of its row group up to it.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from eupe.corpus.folder import Known, Row, modified_ns, picture_row, require_printable
from eupe.corpus.left_out import NO_PICTURE, LeftOut, added
from eupe.errors import CorpusError, StorageError
from eupe.place import Place

BINARY_COLUMNS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
PATH_COLUMNS = ("path", "file_name", "image_path")
LABEL_COLUMNS = ("label", "class")
CAPTION_COLUMNS = ("caption", "text")
INDEX_MARK = b"eupe.root"
"""In the metadata of our own indexes, which are tables, too."""

SLICE_BYTES = 8 * 2**20
"""Decoded at once, about."""
CACHE_BYTES = 256 * 2**20
"""Of decoded pictures kept, in each process."""
OPEN_TABLES = 16


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what; leaves of structs by their dotted names."""

    data: str | None
    path: str | None
    label: str | None
    names: list[str] | None
    """Of the classes that integers of `label` stand for."""
    caption: str | None

    @property
    def picture(self) -> list[str]:
        return [name for name in (self.data, self.path) if name is not None]

    @property
    def words(self) -> list[str]:
        return [name for name in (self.label, self.caption) if name is not None]


def columns_of(schema: pa.Schema, where: Place) -> Columns:
    """Raises: CorpusError if no column holds pictures, or it is not clear which."""
    fields = {field.name: field.type for field in schema}
    structs = [name for name, kind in fields.items() if _is_picture(kind)]
    binaries = [name for name in BINARY_COLUMNS if name in fields and _is_binary(fields[name])]
    paths = [name for name in PATH_COLUMNS if name in fields and _is_text(fields[name])]
    found = structs or binaries or paths
    if not found:
        raise NoPicturesError(
            f"table {where} has no column of pictures among {', '.join(schema.names)}; it takes a struct with bytes "
            f"(Hugging Face's Image), a binary column ({', '.join(BINARY_COLUMNS)}) or one of paths "
            f"({', '.join(PATH_COLUMNS)})"
        )
    if len(found) > 1 and "image" not in found:
        raise CorpusError(
            f"table {where} has several columns of pictures, {', '.join(found)}; call the one to take `image`"
        )
    name = "image" if "image" in found else found[0]
    data, path = (None, name) if found is paths else (name, None)
    if found is structs:
        data, path = f"{name}.bytes", f"{name}.path" if fields[name].get_field_index("path") >= 0 else None
    label = next((n for n in LABEL_COLUMNS if n in fields and (_is_text(fields[n]) or _is_integer(fields[n]))), None)
    caption = next((n for n in CAPTION_COLUMNS if n in fields and _is_text(fields[n])), None)
    names = _class_names(schema.metadata or {}, label) if label and _is_integer(fields[label]) else None
    return Columns(data, path, label, names, caption)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_integer(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind))


def _is_picture(kind: pa.DataType) -> bool:
    place = kind.get_field_index("bytes") if pa.types.is_struct(kind) else -1
    return place >= 0 and _is_binary(kind.field(place).type)


def _class_names(metadata: dict[bytes, bytes], label: str) -> list[str] | None:
    """Of a Hugging Face ClassLabel."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names]


class NoPicturesError(CorpusError):
    """A table without any column that could hold pictures."""


def table_kind(root: Place, name: str) -> Literal["index", "bytes", "paths"] | None:
    """Return what a Parquet file holds: our own index, pictures as bytes or as paths; None for none of these.

    Raises: FileNotFoundError; CorpusError if it is no Parquet, or not clear; StorageError.
    """
    with _opened(root, name) as table:
        if INDEX_MARK in (table.schema_arrow.metadata or {}):
            return "index"
        try:
            columns = columns_of(table.schema_arrow, root / name)
        except NoPicturesError:
            return None
    return "paths" if columns.data is None else "bytes"


def is_index(root: Place, name: str) -> bool:
    """Whether a Parquet file is an index of ours rather than a table of pictures.

    Raises: FileNotFoundError; CorpusError if it is no Parquet; StorageError.
    """
    with _opened(root, name) as table:
        return INDEX_MARK in (table.schema_arrow.metadata or {})


def _opened(root: Place, name: str) -> pq.ParquetFile:
    """Raises: FileNotFoundError; CorpusError; StorageError."""
    file = root.open(name)
    try:
        return pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True)
    except (StorageError, FileNotFoundError):
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CorpusError(f"{root / name} cannot be read as Parquet: {error}") from error


def table_rows(root: Place, name: str, known: Known) -> tuple[list[Row], LeftOut]:
    """Rows of the index, one for each picture, in the table's order, and what is left out.

    Args:
        name: of the table, below the root.
        known: rows of this table in an earlier index; where they are all of them, and of the same time, nothing is
            hashed again.
    Raises: CorpusError if the table cannot be read as one of pictures; StorageError if an object store does not serve
        it.
    """
    require_printable(str(root / name))
    modified = modified_ns(root, name)
    rows: list[Row] = []
    gaps = 0
    try:
        with _opened(root, name) as table:
            columns = columns_of(table.schema_arrow, root / name)
            before = _unchanged(known, modified, table.metadata.num_rows)
            for number, (data, path, words) in enumerate(_read(table, columns, hashed=before is None)):
                place = {"file": name, "start": number, "mtime_ns": modified}
                key = f"{name}/{number:08d}"
                if before is not None:
                    row = {"key": key, **place} | {column: before[number][column] for column in ("sha256", "num_bytes")}
                elif data is not None:
                    digest = hashlib.sha256(data).hexdigest()
                    row = {"key": key, **place, "sha256": digest, "num_bytes": len(data)}
                elif path:
                    row = picture_row(root, known, _key_of(root, name, path))
                else:
                    gaps += 1
                    continue
                rows.append(row | _words(columns, words))
    except FileNotFoundError as error:
        raise CorpusError(str(error)) from error
    except StorageError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"table {root / name} cannot be read after {len(rows)} rows: {error}") from error
    return rows, added({NO_PICTURE: gaps})


def _unchanged(known: Known, modified: int | None, num_rows: int) -> dict[int, Row] | None:
    """An earlier index's rows by number, if each row of the table is among them."""
    rows = {row["start"]: row for row in known.values() if row["file"] is not None and row["mtime_ns"] == modified}
    return rows if len(rows) == num_rows and rows else None


def _read(table: pq.ParquetFile, columns: Columns, *, hashed: bool) -> Iterator[tuple[Any, str | None, list[Any]]]:
    """Bytes, path, and label and caption of each row; without bytes and paths unless they are to be hashed."""
    names = [*(columns.picture if hashed else ()), *columns.words]
    if not names:
        yield from ((None, None, []) for _ in range(table.metadata.num_rows))
        return
    for group in range(table.metadata.num_row_groups):
        for batch in table.iter_batches(_slice_rows(table, group), row_groups=[group], columns=names):
            data = _leaf(batch, columns.data) if hashed and columns.data else [None] * len(batch)
            path = _leaf(batch, columns.path) if hashed and columns.path else [None] * len(batch)
            words = [_leaf(batch, name) for name in columns.words]
            for i in range(len(batch)):
                yield _plain(data[i]), _plain(path[i]), [_plain(column[i]) for column in words]


def _plain(value: Any) -> Any:
    return value.as_py() if isinstance(value, pa.Scalar) else value


def _leaf(batch: pa.RecordBatch, name: str) -> pa.Array:
    """A column, or of a struct column a child that is null where the struct is."""
    if name in batch.schema.names:
        return batch.column(name)
    parent, _, child = name.rpartition(".")
    column = batch.column(parent)
    return column.flatten()[column.type.get_field_index(child)]


def _slice_rows(table: pq.ParquetFile, group: int) -> int:
    about = table.metadata.row_group(group)
    rows: int = SLICE_BYTES * about.num_rows // max(1, about.total_byte_size)
    return max(1, min(1024, rows))


def _words(columns: Columns, values: list[Any]) -> Row:
    found = dict(zip(columns.words, values, strict=True))
    label = found.get(columns.label) if columns.label else None
    if columns.names is not None and label is not None:
        label = columns.names[label] if 0 <= label < len(columns.names) else None
    return {
        "label": None if label is None else str(label),
        "caption": found.get(columns.caption) if columns.caption else None,
    }


def _key_of(root: Place, table: str, path: str) -> str:
    """Of a file that a table names: its path below the root.

    Raises: CorpusError if it lies elsewhere.
    """
    folder = root / posixpath.dirname(table) if "/" in table else root
    whole = posixpath.normpath(path if posixpath.isabs(path) else posixpath.join("/", folder.url.lstrip("/"), path))
    below = posixpath.join("/", root.url.lstrip("/"), "")
    if not root.is_local:
        whole, below = posixpath.normpath(posixpath.join("/", posixpath.dirname(table), path)), "/"
    if not whole.startswith(below) or (not root.is_local and posixpath.isabs(path)):
        raise CorpusError(
            f"table {root / table} names {path}, which does not lie below {root}; "
            "give paths relative to the table's folder"
        )
    require_printable(whole)
    return whole.removeprefix(below)


@dataclass
class _Reading:
    """A table that is open, and where its last reading stands."""

    table: pq.ParquetFile
    column: str
    ends: list[int]
    """Of the row groups, counted in rows."""
    group: int = -1
    next_row: int = 0
    batches: Iterator[pa.RecordBatch] = field(default_factory=lambda: iter(()))


class RowReader:
    """Bytes of rows of tables; safe to use from several threads.

    Each table is decoded by one thread at a time.
    """

    def __init__(self, cache_bytes: int = CACHE_BYTES) -> None:
        self._cache_bytes = cache_bytes
        self._rows: OrderedDict[tuple[str, int | None, int], bytes] = OrderedDict()
        self._num_bytes = 0
        self._tables: OrderedDict[tuple[str, int | None], tuple[_Reading, threading.Lock]] = OrderedDict()
        self._lock = threading.Lock()
        self.num_decoded = 0
        """Rows, for whoever wants to know what reading costs."""

    def read(self, root: Place, name: str, row: int) -> bytes:
        """Raises: FileNotFoundError; CorpusError if there is no such picture; StorageError."""
        table = (str(root / name), modified_ns(root, name))
        if (data := self._cached((*table, row))) is not None:
            return data
        reading, turn = self._reading(root, name, table)
        with turn:
            if (data := self._cached((*table, row))) is not None:
                return data
            try:
                data = self._decode(reading, table, row)
            except StorageError:
                raise
            except (OSError, pa.ArrowException, StopIteration) as error:
                reading.group = -1
                raise CorpusError(f"row {row} of {root / name} cannot be read: {error}") from error
        if data is None:
            raise CorpusError(f"{root / name} has no picture in row {row}")
        return data

    def _cached(self, place: tuple[str, int | None, int]) -> bytes | None:
        with self._lock:
            if place in self._rows:
                self._rows.move_to_end(place)
            return self._rows.get(place)

    def _reading(self, root: Place, name: str, table: tuple[str, int | None]) -> tuple[_Reading, threading.Lock]:
        with self._lock:
            if table in self._tables:
                self._tables.move_to_end(table)
                return self._tables[table]
        opened = _opened(root, name)
        column = columns_of(opened.schema_arrow, root / name).data
        if column is None:
            raise CorpusError(f"{root / name} holds no bytes of pictures; it has changed since it was indexed")
        groups = (opened.metadata.row_group(group).num_rows for group in range(opened.metadata.num_row_groups))
        with self._lock:
            entry = self._tables.setdefault(
                table, (_Reading(opened, column, list(accumulate(groups))), threading.Lock())
            )
            if len(self._tables) > OPEN_TABLES:
                self._tables.popitem(last=False)
        return entry

    def _decode(self, reading: _Reading, table: tuple[str, int | None], row: int) -> bytes | None:
        """The row's bytes; all rows that are decoded on the way to it are kept, too."""
        group = bisect_right(reading.ends, row)
        if row < 0 or group == len(reading.ends):
            return None
        if group != reading.group or row < reading.next_row:
            reading.group, reading.next_row = group, reading.ends[group - 1] if group else 0
            reading.batches = reading.table.iter_batches(
                _slice_rows(reading.table, group), row_groups=[group], columns=[reading.column]
            )
        wanted: bytes | None = None
        while reading.next_row <= row:
            values = _leaf(next(reading.batches), reading.column)
            for i, value in enumerate(values.to_pylist(), reading.next_row):
                if i == row:
                    wanted = value
                if value is not None:
                    self._keep((*table, i), value)
            reading.next_row += len(values)
            self.num_decoded += len(values)
        return wanted

    def _keep(self, place: tuple[str, int | None, int], data: bytes) -> None:
        with self._lock:
            self._num_bytes += len(data) - len(self._rows.pop(place, b""))
            self._rows[place] = data
            while self._num_bytes > self._cache_bytes and len(self._rows) > 1:
                self._num_bytes -= len(self._rows.popitem(last=False)[1])


_rows = RowReader()


def read_row(root: Place, name: str, row: int) -> bytes:
    """The bytes of the picture in a row of a table.

    Raises: FileNotFoundError; CorpusError if there is no such picture; StorageError.
    """
    return _rows.read(root, name, row)
