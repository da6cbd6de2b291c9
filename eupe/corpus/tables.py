"""Pictures in Parquet or Arrow tables: as bytes, or as paths of files beside the table.

Bytes are in a struct column of `bytes` and optionally `path`, as Hugging Face writes them, in a binary column, or in
lists of either. Parquet is decoded in slices of some megabytes, and decoded pictures are kept in a bounded cache, so
that reading rows in order decodes each once. Reading a random row decodes its row group up to that row.
"""

from __future__ import annotations

import hashlib
import math
import posixpath
import re
import threading
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PureWindowsPath
from typing import Any, Literal
from urllib.parse import unquote

import pyarrow as pa

from eupe.common.files import key_of
from eupe.common.storage import StoragePath
from eupe.corpus.choice import AS_FOUND, Choice, Contents, writable
from eupe.corpus.columns import (
    Columns,
    LabelColumn,
    Path,
    PictureColumn,
    columns_of,
    found_stored,
    named_stored,
    picture_kind,
)
from eupe.corpus.folder import Known, Row, modified_ns, picture_row
from eupe.corpus.left_out import NO_PICTURE, added
from eupe.corpus.table_files import ArrowTable, TableFile, column_at, num_rows, open_table
from eupe.errors import CorpusError, StorageError

INDEX_MARK = b"eupe.root"
"""Metadata key of our own indexes, which are tables, too."""
KEY = re.compile(r"(?P<row>\d+)(\.(?P<item>\d+))?(@(?P<column>.+))?")
"""Key of a picture in a table, after the table's name and a slash."""

ELSEWHERE = "rows that name a file outside the corpus's folder"
WEB = "rows that name an address on the web"
AGAIN = "rows that name a picture again"
WEB_ADDRESS = ("http://", "https://")
FILE_URL = re.compile(r"file:(//(localhost)?(?=/))?")
BASE64 = re.compile(r"data:image/|/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkq|TU0AK|Qk0")
"""Beginnings of pictures that were written as base64 text."""
BASE64_LENGTH = 100
"""Length from which text that begins like base64 is not taken for a path."""

MAX_WORDS = 2**16
"""Limit of a label or caption, in characters: a few bytes of a table can give a million rows the same text."""
CACHE_BYTES = 256 * 2**20
"""Size of the cache of decoded pictures, for each process."""
OPEN_TABLES = 16

Item = tuple[bytes | None, str | None]
"""Bytes and path of a picture; None if the table does not have them."""


def is_index(root: StoragePath, name: str) -> bool:
    """Return whether a table is our own index rather than a table of pictures.

    Raises: FileNotFoundError; CorpusError if it cannot be read as a table; StorageError if the storage fails.
    """
    return INDEX_MARK in (open_table(root, name).schema.metadata or {})


def table_kind(root: StoragePath, name: str) -> Literal["index", "bytes", "paths"] | None:
    """Return whether a table is our own index, or holds pictures as bytes or as paths; None for none of these.

    Raises: FileNotFoundError; CorpusError if it cannot be read as a table; StorageError if the storage fails.
    """
    schema = open_table(root, name).schema
    if INDEX_MARK in (schema.metadata or {}):
        return "index"
    return picture_kind(schema)


def table_rows(root: StoragePath, name: str, known: Known, choice: Choice = AS_FOUND) -> Contents:
    """Read a table's contents for the index.

    Args:
        name: path of the table, below the root.
        known: rows of this table in an earlier index; if they cover the whole table, and its modification time is the
            same, nothing is hashed again.
    Raises: CorpusError if the table cannot be read as a table of pictures; StorageError if an object store cannot be
        read.
    """
    modified = modified_ns(root, name)
    rows: list[Row] = []
    left_out: Counter[str] = Counter()
    try:
        table = open_table(root, name)
        columns = columns_of(table.schema, root / name, choice)
        pictures, note = _files_or_stored(root, name, table, columns)
        words = Words(table, columns)
        keys = _Keys(name, pictures, chosen=columns.chosen)
        before = _unchanged(known, modified, keys, num_rows(table))
        odd_path: str | None = None
        labels: dict[str, str | None] = {}
        leaves = pictures.leaves if before is None else []
        for number, (items, batch, i) in enumerate(_read(table, pictures, leaves, words.paths)):
            said = words.of(batch, i)
            item = -1
            for item, (data, path) in enumerate(items):
                key = keys.of(number, item)
                place = {"key": key, "file": name, "start": number, "mtime_ns": modified}
                if before is not None:
                    row = place | {column: before[key][column] for column in ("sha256", "num_bytes")}
                elif data is not None:
                    row = place | {"sha256": hashlib.sha256(data).hexdigest(), "num_bytes": len(data)}
                elif not path:
                    left_out[NO_PICTURE] += 1
                    continue
                elif (own := place_key(root, name, path)) is None:
                    left_out[WEB if path.startswith(WEB_ADDRESS) else ELSEWHERE] += 1
                    odd_path = odd_path or path
                    continue
                elif own in labels and labels[own] == said["label"]:
                    # With another label it is kept, and refused later as a duplicate key.
                    left_out[AGAIN] += 1
                    continue
                else:
                    labels[own] = said["label"]
                    row = picture_row(root, known, own)
                rows.append(row | said)
            left_out[NO_PICTURE] += item < 0
    except FileNotFoundError as error:
        raise CorpusError(str(error)) from error
    except (CorpusError, StorageError):
        raise
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise CorpusError(f"table {root / name} cannot be read after {len(rows)} rows: {error}") from error
    _require_files(root, name, rows, odd_path)
    notes = [*columns.notes, *([note] if note else []), *words.notes(root / name)]
    return Contents(rows, added(left_out), tuple(notes))


@dataclass(frozen=True)
class _Keys:
    """The keys of a table's pictures: `FILE/ROW`, and whatever else it takes to find a picture again."""

    table: str
    pictures: PictureColumn
    chosen: bool

    def of(self, row: int, item: int) -> str:
        """Return a key, with `.ITEM` for a list, and `@COLUMN` for a column that would not be found automatically."""
        number = f".{item}" if self.pictures.many else ""
        return f"{self.table}/{row:08d}{number}{f'@{self.pictures.name}' if self.chosen else ''}"


def _unchanged(known: Known, modified: int | None, keys: _Keys, count: int) -> dict[str, Row] | None:
    """Return an earlier index's rows by key; None if they do not include every row of the table."""
    rows = {key: row for key, row in known.items() if row["file"] == keys.table and row["mtime_ns"] == modified}
    if not rows or keys.pictures.many or len(rows) != count:
        return None
    return rows if all(keys.of(number, 0) in rows for number in range(count)) else None


def _files_or_stored(
    root: StoragePath, name: str, table: TableFile, columns: Columns
) -> tuple[PictureColumn, str | None]:
    """Return the column to take, and a note if there were two: files take precedence over bytes if the first exists.

    Raises: CorpusError if the column of paths holds pictures as base64 text.
    """
    if columns.files is None:
        assert columns.stored is not None
        return columns.stored, None
    rows = _read(table, columns.files, columns.files.leaves, [])
    first = next((path for items, *_ in rows for _, path in items if path), None)
    if first is not None and len(first) >= BASE64_LENGTH and BASE64.match(first):
        raise CorpusError(
            f"column {columns.files.name} of table {root / name} holds pictures as base64 text; decode it into a "
            "binary column"
        )
    if columns.stored is None:
        return columns.files, None
    key = None if first is None else place_key(root, name, first)
    there = key is not None and (_is_there(root, key) if root.is_local else root.exists(key))
    taken, other = (columns.files, columns.stored) if there else (columns.stored, columns.files)
    return taken, f"pictures are taken from column {taken.name}; there is also {other.name}: choose with --image-column"


def _read(
    table: TableFile, pictures: PictureColumn, leaves: Sequence[Path], words: Sequence[Path]
) -> Iterator[tuple[Iterable[Item], pa.RecordBatch | None, int]]:
    """Yield each row's pictures, with the batch and the position in it that hold its label and caption.

    Without `leaves`, a row has one picture, whose bytes and path are None.
    """
    columns = [*leaves, *words]
    if not columns:
        for i in range(num_rows(table)):
            yield [(None, None)], None, i
        return
    for group in range(len(table.ends)):
        for batch in table.batches(group, columns):
            found = [column_at(batch, leaf) for leaf in leaves]
            for i in range(len(batch)):
                yield (_items(pictures, found, i) if leaves else [(None, None)]), batch, i


def _items(pictures: PictureColumn, columns: Sequence[pa.Array], row: int) -> Iterator[Item]:
    """Yield the pictures of one row, one at a time, because a list may hold the same bytes many times."""
    if pictures.many:
        listed = columns[0][row].values
        yield from (_item(value.as_py()) for value in (() if listed is None else listed))
        return
    values = [column[row].as_py() for column in columns]
    if pictures.kind == "text":
        yield None, values[0]
    else:
        yield (values[0] if pictures.has_bytes else None), (values[-1] if pictures.has_path else None)


def _item(value: Any) -> Item:
    """Return the picture in an element of a list."""
    return (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)


class Words:
    """Labels and captions of a table's rows."""

    def __init__(self, table: TableFile, columns: Columns) -> None:
        self._label, self._caption = columns.label, columns.caption
        self._fraction = None if self._label is None else _first_fraction(table, self._label)
        if self._fraction is not None:
            self._label = None
        self._column = columns.label
        self._batch: pa.RecordBatch | None = None
        self._labels: list[Any] = []
        self._captions: list[Any] = []
        self._faults: Counter[str] = Counter()

    @property
    def paths(self) -> list[Path]:
        """Return the paths of the columns to read."""
        return [path for path in (self._label.path if self._label else None, self._caption) if path is not None]

    def of(self, batch: pa.RecordBatch | None, i: int) -> Row:
        """Return the label and caption of row `i` of a batch."""
        if batch is not self._batch and batch is not None:
            self._batch = batch
            self._labels = self._values(batch, self._label.path if self._label else None)
            self._captions = self._values(batch, self._caption)
        if batch is None:
            return {"label": None, "caption": None}
        names = self._label.names if self._label else None
        return {"label": _label_word(self._labels[i], names), "caption": writable(self._captions[i])}

    def _values(self, batch: pa.RecordBatch, path: Path | None) -> list[Any]:
        """Return a column as Python values; None for text that cannot be used, which is counted."""
        if path is None:
            return [None] * len(batch)
        column = column_at(batch, path)
        if not pa.types.is_dictionary(column.type):
            found = [_word(scalar) for scalar in column]
        else:
            indices = column.indices.to_pylist()
            words: dict[int | None, tuple[Any, str | None]] = {}
            for index, scalar in zip(indices, column, strict=True):
                if index not in words:  # rows that share a long text share one copy of it
                    words[index] = _word(scalar)
            found = [words[index] for index in indices]
        self._faults.update(fault for _, fault in found if fault is not None)
        return [value for value, _ in found]

    def notes(self, where: StoragePath) -> Iterator[str]:
        """Yield the notes for the user; they are complete once all rows have been read."""
        if self._fraction is not None and self._column is not None:
            yield (
                f"column {self._column.name} of table {where} holds numbers such as {self._fraction:g}, which are not "
                "classes, so no label was taken; choose another with --label-column"
            )
        for fault, count in self._faults.items():
            yield f"{count} labels and captions of table {where} {fault}, and are left out"


def _word(scalar: pa.Scalar) -> tuple[Any, str | None]:
    """Return a label or caption as a Python value, or None and what is wrong with it."""
    try:
        value = scalar.as_py()
    except UnicodeDecodeError:
        return None, "are not UTF-8 text"
    if isinstance(value, str) and len(value) > MAX_WORDS:
        return None, f"are longer than {MAX_WORDS} characters"
    return value, None


def _first_fraction(table: TableFile, label: LabelColumn) -> float | None:
    """Return the first label with a fraction, which cannot be a class; None if there is none.

    Whole numbers may be classes even as floats, because missing labels turn integers into floats.
    """
    kind = label.kind.value_type if pa.types.is_dictionary(label.kind) else label.kind
    if not pa.types.is_floating(kind):
        return None
    for group in range(len(table.ends)):
        for batch in table.batches(group, [label.path]):
            for value in column_at(batch, label.path).to_pylist():
                if value is not None and not math.isnan(value) and not float(value).is_integer():
                    return float(value)
    return None


def _label_word(value: Any, names: Sequence[str] | None) -> str | None:
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value)
    if names is not None and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None
    return None if value is None else writable(str(value))


def _require_files(root: StoragePath, name: str, rows: Sequence[Row], odd_path: str | None) -> None:
    """Raise CorpusError if all files that the table names are missing or outside the root."""
    where = root / name
    if not rows and odd_path is not None:
        raise CorpusError(
            f"table {where} names pictures on the web, such as {odd_path}; download them, for example with img2dataset"
            if odd_path.startswith(WEB_ADDRESS)
            else f"table {where} names {odd_path}, which does not lie below {root}; give paths relative to the table's "
            "folder"
        )
    files = [row["key"] for row in rows if row.get("file") is None and row.get("sha256") is None]
    if files and len(files) == len(rows) and root.is_local and not any(_is_there(root, key) for key in files):
        raise CorpusError(
            f"none of the {len(files)} files that table {where} names exists, the first is {root / files[0]}; add "
            "them, or give paths relative to the table's folder"
        )


def place_key(root: StoragePath, table: str, path: str) -> str | None:
    """Return the path below the root of a file that a table names; None if the file lies elsewhere."""
    if path.startswith(f"{root.url}/"):
        path = path if root.is_local else posixpath.relpath(path.removeprefix(f"{root.url}/"), _folder(table))
    elif "\0" in path or ("://" in path and not path.startswith("file:")):
        return None
    choices = [path]
    if match := FILE_URL.match(path):  # its path may be percent-encoded or not
        choices = [unquote(path[match.end() :]), path[match.end() :]]
    elif "\\" in path:  # either Windows separators, or part of a name
        choices.append(PureWindowsPath(path).as_posix())
    keys = [key_of(key) for choice in choices if (key := _below(root, table, choice)) is not None]
    there = (key for key in keys if root.is_local and _is_there(root, key))
    return next(there, keys[0] if keys else None)


def _is_there(root: StoragePath, key: str) -> bool:
    try:
        return root.path(key).exists()
    except OSError:  # a name that is too long for the file system
        return False


def _folder(table: str) -> str:
    return posixpath.dirname(table) or "."


def _below(root: StoragePath, table: str, path: str) -> str | None:
    """Return a path, absolute or relative to the table's folder, as a path below the root; None if it is outside."""
    if not posixpath.isabs(path):
        key = posixpath.normpath(posixpath.join(posixpath.dirname(table), path))
        return None if key == ".." or key.startswith("../") else key
    if not root.is_local:
        return None
    below = posixpath.join(root.url, "")
    folder, name = posixpath.split(posixpath.normpath(path))
    for whole in (folder, posixpath.realpath(folder)):  # the root has no links, but `path` may
        if f"{whole}/".startswith(below):
            return posixpath.join(f"{whole}/".removeprefix(below), name)
    return None


@dataclass
class _Reading:
    """An open table, and the position after its last read."""

    table: TableFile
    pictures: PictureColumn
    group: int = -1
    next_row: int = 0
    batches: Iterator[pa.RecordBatch] = field(default_factory=lambda: iter(()))


Table = tuple[str, int | None, str | None]
"""A table's place, its modification time, and the chosen column, if any."""
Spot = tuple[str, int | None, str | None, int, int]
"""A table's place, time and column, a row in it, and a picture in that row."""


class RowReader:
    """A reader of picture bytes from tables, with a cache; safe to use from several threads.

    Each table is decoded by one thread at a time.
    """

    def __init__(self, cache_bytes: int = CACHE_BYTES) -> None:
        self._cache_bytes = cache_bytes
        self._rows: OrderedDict[Spot, bytes] = OrderedDict()
        self._num_bytes = 0
        self._tables: OrderedDict[Table, tuple[_Reading, threading.Lock]] = OrderedDict()
        self._lock = threading.Lock()
        self.num_decoded = 0
        """Number of rows decoded so far, a measure of the cost of reading."""

    def read(self, root: StoragePath, name: str, row: int, *, item: int = 0, column: str | None = None) -> bytes:
        """Return the bytes of a picture.

        Args:
            item: position in the row's list of pictures.
            column: None for the column that is taken automatically.
        Raises: FileNotFoundError; CorpusError if there is no such picture; StorageError if the storage fails.
        """
        table = (str(root / name), modified_ns(root, name), column)
        if (data := self._cached((*table, row, item))) is not None:
            return data
        reading, turn = self._reading(root, name, table)
        with turn:
            # Another thread may have decoded it in the meantime.
            if (data := self._cached((*table, row, item))) is not None:
                return data
            try:
                data = self._decode(reading, table, row, item)
            except StorageError:
                raise
            except (OSError, pa.ArrowException, StopIteration) as error:
                reading.group = -1  # the iterator is unusable, so the next read starts its group again
                raise CorpusError(f"row {row} of {root / name} cannot be read: {error}") from error
        if data is None:
            raise CorpusError(f"{root / name} has no picture in row {row}")
        return data

    def _cached(self, place: Spot) -> bytes | None:
        with self._lock:
            if place in self._rows:
                self._rows.move_to_end(place)
            return self._rows.get(place)

    def _reading(self, root: StoragePath, name: str, table: Table) -> tuple[_Reading, threading.Lock]:
        with self._lock:
            if table in self._tables:
                self._tables.move_to_end(table)
                return self._tables[table]
        opened, column = open_table(root, name), table[2]
        schema, where = opened.schema, root / name
        pictures = found_stored(schema, where) if column is None else named_stored(schema, where, column)
        if pictures is None:
            raise CorpusError(
                f"{where} holds no bytes of pictures{f' in column {column}' if column else ''}; it has changed since "
                "it was indexed"
            )
        with self._lock:
            entry = self._tables.setdefault(table, (_Reading(opened, pictures), threading.Lock()))
            if len(self._tables) > OPEN_TABLES:
                self._tables.popitem(last=False)
        return entry

    def _decode(self, reading: _Reading, table: Table, row: int, item: int) -> bytes | None:
        """Return the picture's bytes; for Parquet, cache all rows that are decoded on the way to it."""
        pictures, ends = reading.pictures, reading.table.ends
        leaf = pictures.leaves[0]
        group = bisect_right(ends, row)
        if row < 0 or group == len(ends):
            return None
        if isinstance(reading.table, ArrowTable):
            self.num_decoded += 1
            found = _items(pictures, [column_at(reading.table.row(row), leaf)], 0)
            return next(islice(found, item, None), (None, None))[0]
        # Batches come only forwards, so an earlier row needs its group from the start.
        if group != reading.group or row < reading.next_row:
            reading.group, reading.next_row = group, ends[group - 1] if group else 0
            reading.batches = reading.table.batches(group, [leaf])
        wanted: bytes | None = None
        while reading.next_row <= row:
            values = column_at(next(reading.batches), leaf)
            for i in range(len(values)):
                for number, (data, _) in enumerate(_items(pictures, [values], i)):
                    if (reading.next_row + i, number) == (row, item):
                        wanted = data
                    if data is not None:
                        self._keep((*table, reading.next_row + i, number), data)
            reading.next_row += len(values)
            self.num_decoded += len(values)
        return wanted

    def _keep(self, place: Spot, data: bytes) -> None:
        with self._lock:
            self._num_bytes += len(data) - len(self._rows.pop(place, b""))
            self._rows[place] = data
            while self._num_bytes > self._cache_bytes and len(self._rows) > 1:
                self._num_bytes -= len(self._rows.popitem(last=False)[1])


_rows = RowReader()


def read_row(root: StoragePath, name: str, row: int, key: str) -> bytes:
    """Return the bytes of a picture in a row of a table.

    Args:
        key: the picture's key, which says which of the row's pictures it is if there are several.
    Raises: FileNotFoundError; CorpusError if there is no such picture; StorageError if the storage fails.
    """
    match = KEY.fullmatch(key.removeprefix(f"{name}/"))
    item, column = (match["item"], match["column"]) if match else (None, None)
    return _rows.read(root, name, row, item=int(item or 0), column=column)
