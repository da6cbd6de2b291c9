"""The index of a corpus: one row per picture of a folder, tars or tables, kept as Parquet.

Each row has `key` (path below the root, with forward slashes), `sha256` of the picture's bytes (null if they could not
be read), `num_bytes`, `mtime_ns` of the file that holds it, and `label` (or null; for a file without metadata, the
first folder below the root). Pictures in tars and tables also have `file`, `start` and `length` (see `Inside`; null for
a picture that is a file of its own) and `caption`. Rows are sorted by key, but rows of one tar or table keep its order.
The root, a path or an object store's URL, is in the schema's metadata, so an index can stand in for its folder.

The time of an object does not guarantee its content: in an object store `mtime_ns` is null, and indexing it again reads
and hashes all pictures again.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eupe.common.cores import num_cores
from eupe.common.prefetch import map_ahead
from eupe.common.reading import parse_json
from eupe.common.storage import AnyPath, StoragePath
from eupe.corpus.choice import AS_FOUND, Choice
from eupe.corpus.folder import Row, picture_row
from eupe.corpus.left_out import (
    BY_EXCLUDE,
    BY_INCLUDE,
    BY_LIMIT,
    EVERYTHING,
    NO_PICTURE,
    LeftOut,
    Patterns,
    added,
    left_none,
)
from eupe.corpus.metadata import Metadata
from eupe.corpus.own_table import read_own_table
from eupe.corpus.pictures import OUTSIDE
from eupe.corpus.sources import Source, find_folder, find_source, require_meaning
from eupe.corpus.tables import table_rows
from eupe.corpus.tars import tar_rows
from eupe.errors import ConfigError, CorpusError, StorageError

ROOT_KEY = b"eupe.root"
GAPS_KEY = b"eupe.without_picture"
"""Count of `NO_PICTURE`, stored as in older indexes, which had no other reasons."""
LEFT_OUT_KEY = b"eupe.left_out"
CHOICE_KEY = b"eupe.choice"
NOTES_KEY = b"eupe.notes"
NAMED_KEYS = 5
NAMED_NOTES = 10
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("sha256", pa.string()),
        pa.field("num_bytes", pa.int64()),
        pa.field("mtime_ns", pa.int64()),
        pa.field("label", pa.string()),
    ]
)
CONTAINED = pa.schema(
    [
        *SCHEMA,
        pa.field("file", pa.string()),
        pa.field("start", pa.int64()),
        pa.field("length", pa.int64()),
        pa.field("caption", pa.string()),
    ]
)
"""Schema for tars, tables and folders with metadata; the index of any other folder lacks the added columns."""

MAX_PLACE = 2**60
"""Limit of lengths and positions in an index, in bytes or rows; larger values mean damage."""
ROWS_AT_ONCE = 8192
"""Number of rows that are made, written or hashed together."""


@dataclass(frozen=True)
class Corpus:
    """Pictures with their keys and the location of their bytes."""

    root: StoragePath
    samples: pa.Table
    """Columns of `SCHEMA` or of `CONTAINED`, one row per picture."""
    left_out: LeftOut = field(default_factory=dict)
    """Counts of the files, tar members and table rows that are not among the samples, by reason."""
    choice: Choice = AS_FOUND
    """The user's choice among several pictures or labels."""
    notes: Sequence[str] = ()
    """Sentences for the user about automatic choices, and about labels or captions that were left out."""

    def __len__(self) -> int:
        return int(self.samples.num_rows)

    @property
    def num_found(self) -> int:
        """Return the number of files, tar members or table rows found, whether or not they are pictures."""
        return len(self) + sum(self.left_out.values())

    @cached_property
    def fingerprint(self) -> str:
        """Return the SHA-256 over the sorted (key, sha256) pairs; equal exactly if keys and pictures are equal."""
        return fingerprint(self.samples)

    @property
    def duplicates(self) -> list[list[str]]:
        """Return groups of keys whose pictures are the same, byte for byte."""
        counts = pc.value_counts(self.samples["sha256"].drop_null())
        several = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        rows = self.samples.select(["key", "sha256"]).filter(pc.is_in(self.samples["sha256"], several))
        groups: dict[str, list[str]] = {}
        for key, sha256 in zip(rows["key"].to_pylist(), rows["sha256"].to_pylist(), strict=True):
            groups.setdefault(sha256, []).append(key)
        return list(groups.values())

    def pick(
        self,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        shuffle: int | None = None,
        limit: int | None = None,
    ) -> Corpus:
        """Return a corpus with some of the pictures.

        Args:
            include, exclude: shell patterns, matched against whole keys; `*` also matches slashes. All pictures are
                included if `include` is empty.
            shuffle: seed of a random order that replaces the order of the keys.
            limit: number of pictures to keep, from the start of that order.
        Raises: CorpusError if no picture is left.
        """
        if not include and not exclude and shuffle is None:
            return self._only(self.samples.slice(0, limit), {})
        keys = self.samples["key"].to_pylist()
        reasons = [*map(Patterns(include, exclude).reason, keys)]
        picked = [i for i, reason in enumerate(reasons) if reason is None]
        if not picked:
            raise CorpusError(left_none(len(keys), self.root, keys[0]))
        if shuffle is not None:
            # A hash per key: whether one picture precedes another does not depend on the rest of the corpus.
            picked.sort(key=lambda i: hashlib.blake2b(f"{shuffle}\0{keys[i]}".encode(), digest_size=16).digest())
        return self._only(self.samples.take(picked[:limit]), Counter(filter(None, reasons)))

    def _only(self, samples: pa.Table, by_patterns: LeftOut) -> Corpus:
        beyond = len(self) - len(samples) - sum(by_patterns.values())
        return replace(self, samples=samples, left_out=added(self.left_out, by_patterns, {BY_LIMIT: beyond}))


def some_keys(keys: Sequence[str]) -> str:
    """Return the first few keys as text, and how many more there are."""
    more = len(keys) - NAMED_KEYS
    return ", ".join(keys[:NAMED_KEYS]) + (f", and {more} more" if more > 0 else "")


def fingerprint(samples: pa.Table) -> str:
    """Return the SHA-256 over the lines `key NUL sha256 LF` of an index, sorted by key.

    A missing hash is replaced by `unreadable`.
    """
    digest = hashlib.sha256()
    pairs = in_order(samples.select(["key", "sha256"]), "key")
    for start in range(0, len(pairs), ROWS_AT_ONCE):
        rows = pairs.slice(start, ROWS_AT_ONCE)
        ends = pc.binary_join_element_wise(pc.fill_null(rows["sha256"], "unreadable"), "", "\n")
        for lines in pc.binary_join_element_wise(rows["key"], ends, "\0").chunks:
            # Hash Arrow's text buffer itself; the chunk may be a slice of it, so the text starts at its first offset.
            offsets = np.frombuffer(lines.buffers()[1], np.int32)[lines.offset : lines.offset + len(lines) + 1]
            digest.update(memoryview(lines.buffers()[2])[offsets[0] : offsets[-1]])
    return digest.hexdigest()


Progress = Callable[[int, int], None]
"""Callback that takes the number done and the total number."""


def open_corpus(
    source: AnyPath,
    *,
    previous: Corpus | None = None,
    patterns: Patterns = EVERYTHING,
    progress: Progress = lambda done, of: None,
    choice: Choice = AS_FOUND,
) -> Corpus:
    """Open a corpus: index a folder, tars or tables now, or read an index made before.

    Args:
        source: a path, `s3://...` or `gs://...`, optionally with a range of files in braces.
        previous: an earlier index of the same pictures; local files of unchanged size and time are not read again.
        progress: called with the numbers of pictures hashed and of all pictures; for tars and tables the latter is
            extrapolated from those that are done.
        patterns: the pictures to take; picture files that do not match are not read.
        choice: the pictures and labels to take if there are several.
    Raises: CorpusError if nothing is there, nothing is a picture, or nothing matches the choice; StorageError if an
        object store cannot be read.
    """
    found = replace(find_source(source, patterns), choice=choice)
    if found.kind == "index":
        return chosen_index(found)
    return _gathered(found, previous, progress)


def chosen_index(found: Source) -> Corpus:
    """Read the index that a source names, and apply its patterns.

    Raises: CorpusError if the index cannot be read, or was made with a choice other than the one requested.
    """
    corpus = read_index(found.root / found.files[0])
    if found.choice not in (AS_FOUND, corpus.choice):
        raise CorpusError(
            f"index {found.root / found.files[0]} was made {corpus.choice.told()}; {found.choice.words()} has "
            "an effect only when pictures are indexed, so give it to `eupe index`, or omit it here"
        )
    return corpus.pick(include=found.patterns.include, exclude=found.patterns.exclude)


def index_folder(
    folder: AnyPath, *, previous: Corpus | None = None, progress: Progress = lambda done, of: None
) -> Corpus:
    """Index the pictures in a folder, as `open_corpus` does.

    Raises: CorpusError if there is no picture; StorageError if an object store cannot be read.
    """
    return _gathered(find_folder(StoragePath.of(folder).resolved()), previous, progress)


def _gathered(found: Source, previous: Corpus | None, progress: Progress) -> Corpus:
    pieces = list(index_pieces(found, previous, progress))
    left_out = added(found.left_out, *(piece.left_out for piece in pieces))
    notes = joined_notes(piece.notes for piece in pieces)
    corpus = Corpus(found.root, pa.concat_tables([piece.rows for piece in pieces]), left_out, found.choice, notes)
    require_pictures(found, corpus)
    return corpus


def require_pictures(found: Source, corpus: Corpus) -> None:
    """Raise CorpusError if there is no picture, or a key occurs twice."""
    if not len(corpus):
        if by_patterns := sum(corpus.left_out.get(reason, 0) for reason in (BY_INCLUDE, BY_EXCLUDE)):
            raise CorpusError(left_none(by_patterns, found.root, f"{(*found.files, '')[0]}/..."))
        raise CorpusError(f"corpus {found.root} holds no picture in its {len(found.files)} {found.kind}")
    if found.kind == "tables":  # two of them may name the same file; all other keys are unique
        counts = pc.value_counts(corpus.samples["key"])
        twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        if len(twice):
            raise CorpusError(
                f"{some_keys(twice.to_pylist())}: named by more than one row of the tables of {found.root}; name each "
                "picture once"
            )


@dataclass(frozen=True)
class Piece:
    """A part of an index's rows: those of one tar or table, or of some thousand files of a folder."""

    rows: pa.Table
    left_out: LeftOut = field(default_factory=dict)
    """Counts of one tar or table; empty for a folder, whose `Source` has the counts."""
    notes: Sequence[str] = ()


def index_pieces(
    found: Source, previous: Corpus | None, progress: Progress, *, interrupted: Sequence[pa.Table] = ()
) -> Iterator[Piece]:
    """Yield the index of pictures piece by piece, in order; several files are read at once.

    Args:
        previous: an earlier index, whose hashes are reused for local files of unchanged size and time.
        interrupted: pieces of this index from an interrupted run, whose hashes are reused for objects, too.
    Raises: CorpusError if a folder, tar or table cannot be read, or the choice does not fit; StorageError if an object
        store cannot be read.
    """
    require_meaning(found)
    usable = previous is not None and previous.root == found.root and found.root.is_local
    column = "key" if found.kind == "pictures" else "file"
    known = [_Known(table, column) for table in (*([previous.samples] if previous and usable else ()), *interrupted)]
    with ThreadPoolExecutor(threads := found.root.threads(num_cores() + 4)) as pool:
        if found.kind == "pictures":
            metadata = Metadata(found.root, found.metadata, found.choice)
            keys, done = found.picture_keys(), 0
            following = list(itertools.islice(keys, ROWS_AT_ONCE))
            while some := following:
                row_of = partial(picture_row, found.root, _by_key(known, some))
                rows = []
                for row in pool.map(row_of, some):
                    rows.append(row)
                    progress(done := done + 1, found.num_pictures)
                # Taken ahead, because the notes are complete only with the last piece.
                following = list(itertools.islice(keys, ROWS_AT_ONCE))
                schema = CONTAINED if found.metadata else SCHEMA
                rows = metadata.told(rows)
                yield Piece(pa.Table.from_pylist(rows, schema=schema), notes=() if following else metadata.notes())
        else:
            work = partial(_file_piece, found, known)
            done = 0
            for i, piece in enumerate(map_ahead(pool, work, found.files, ahead=threads), 1):
                done += len(piece.rows)
                progress(done, done * len(found.files) // i)
                yield piece


def _file_piece(found: Source, known: Sequence[_Known], name: str) -> Piece:
    rows_of = tar_rows if found.kind == "tars" else table_rows
    contents = rows_of(found.root, name, _by_key(known, [name]), found.choice)
    reasons = [found.patterns.reason(row["key"]) for row in contents.rows]
    taken = [row for row, reason in zip(contents.rows, reasons, strict=True) if reason is None]
    left_out = added(contents.left_out, Counter(filter(None, reasons)))
    return Piece(pa.Table.from_pylist(taken, schema=CONTAINED), left_out, contents.notes)


def joined_notes(notes: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Return each note once, and at most `NAMED_NOTES` of them."""
    return tuple(itertools.islice(dict.fromkeys(itertools.chain.from_iterable(notes)), NAMED_NOTES))


class _Known:
    """An earlier index, sorted by one column, in which rows are looked up by some of its values."""

    def __init__(self, samples: pa.Table, column: str) -> None:
        """Sort the rows by a column.

        Args:
            column: the column whose values rows are looked up by.
        """
        self._column = column
        has = column in samples.schema.names
        # A picture that is a file of its own has no `file`, so it cannot be found by that column.
        self._samples = in_order(samples.filter(samples[column].is_valid()), column) if has else samples.slice(0, 0)
        self._values = self._samples[column] if has else pa.chunked_array([], pa.string())

    def rows(self, values: Sequence[str]) -> list[Row]:
        """Return the rows that hold one of these values."""
        places, value_at = range(len(self._values)), lambda i: self._values[i].as_py()
        # Only rows between the smallest and the largest value are compared, not the whole index for each piece.
        start = bisect_left(places, min(values), key=value_at)
        near = self._samples.slice(start, bisect_right(places, max(values), key=value_at) - start)
        if not len(near):
            return []
        found: list[Row] = near.filter(pc.is_in(near[self._column], pa.array(values, pa.string()))).to_pylist()
        return found


def in_order(samples: pa.Table, column: str) -> pa.Table:
    """Return rows sorted by a column; the same table if it is sorted already."""
    values = samples[column]
    return samples if pc.all(pc.less_equal(values[:-1], values[1:])).as_py() else samples.sort_by(column)


def _by_key(known: Sequence[_Known], values: Sequence[str]) -> dict[str, Row]:
    return {row["key"]: row for index in known for row in index.rows(values)}


def write_index(corpus: Corpus, path: AnyPath) -> None:
    """Write the index as Parquet, atomically.

    Raises: CorpusError if the place cannot be written.
    """
    place = StoragePath.of(path)
    try:
        place.parent.write(place.name, index_bytes(corpus))
    except StorageError as error:
        raise CorpusError(f"the index {path} cannot be written: {error}") from error


def index_metadata(corpus: Corpus) -> dict[bytes, bytes]:
    """Return the metadata that an index has besides its rows."""
    metadata = {ROOT_KEY: str(corpus.root).encode()}
    if gaps := corpus.left_out.get(NO_PICTURE):
        metadata[GAPS_KEY] = str(gaps).encode()
    if others := {reason: count for reason, count in corpus.left_out.items() if reason != NO_PICTURE}:
        metadata[LEFT_OUT_KEY] = json.dumps(others, sort_keys=True).encode()
    if chosen := corpus.choice.to_bytes():
        metadata[CHOICE_KEY] = chosen
    if corpus.notes:
        metadata[NOTES_KEY] = json.dumps(corpus.notes).encode()
    return metadata


def index_bytes(corpus: Corpus) -> bytes:
    """Return the index as Parquet."""
    file = io.BytesIO()
    table = corpus.samples.replace_schema_metadata(index_metadata(corpus))
    pq.write_table(table, file, write_page_checksum=True)
    return file.getvalue()


def index_from_bytes(data: bytes, where: str) -> Corpus:
    """Read an index from the result of `index_bytes`; the pictures themselves need not exist.

    Raises: CorpusError, naming `where`, if the data is not an index or is damaged.
    """
    try:
        table = read_own_table(data)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CorpusError(f"index {where} cannot be read as Parquet: {error}") from error
    metadata = table.schema.metadata or {}
    if ROOT_KEY not in metadata or not any(table.schema.equals(schema) for schema in (SCHEMA, CONTAINED)):
        raise CorpusError(
            f"{where} is not an index of pictures; make one with `eupe index --corpus FOLDER --out INDEX.parquet`"
        )
    try:
        root = StoragePath.of(metadata[ROOT_KEY].decode())
        others = parse_json(metadata.get(LEFT_OUT_KEY, b"{}"))
        left_out = added({NO_PICTURE: int(metadata.get(GAPS_KEY, b"0"))}, others)
        notes = parse_json(metadata.get(NOTES_KEY, b"[]"))
        choice = Choice.from_bytes(metadata.get(CHOICE_KEY, b""))
        if not all(type(count) is int for count in left_out.values()) or not all(isinstance(n, str) for n in notes):
            raise ValueError("its notes are not text or its counts are not integers")
        _require_places(table)
    except (ValueError, TypeError, AttributeError, ConfigError) as error:
        raise CorpusError(f"index {where} is damaged ({error}); index the pictures again") from error
    _require_below(root, table, where)
    return Corpus(root, table.replace_schema_metadata(), left_out, choice, notes)


def _require_places(samples: pa.Table) -> None:
    """Raise ValueError if a row has no key, or an impossible position in a file."""
    if samples["key"].null_count:
        raise ValueError("a picture has no key")
    for name in ("num_bytes", "start", "length"):
        column = samples[name] if name in samples.schema.names else pa.nulls(0, pa.int64())
        ends = pc.min_max(column).as_py()
        if (ends["min"] or 0) < 0 or (ends["max"] or 0) > MAX_PLACE:
            raise ValueError(f"{name} is out of range: {ends['min']} to {ends['max']}")
    if (
        "file" in samples.schema.names
        and pc.any(pc.xor(samples["file"].is_valid(), samples["start"].is_valid())).as_py()
    ):
        raise ValueError("a picture has a file but no position in it, or a position but no file")


def _require_below(root: StoragePath, samples: pa.Table, where: str) -> None:
    """Raise CorpusError if a row names a file outside the root."""
    names = samples["key"]
    if "file" in samples.schema.names:
        names = pc.coalesce(samples["file"], names)
    outside = names.filter(pc.match_substring_regex(names, OUTSIDE)) if root.is_local else []
    if len(outside):
        raise CorpusError(
            f"index {where} names {some_keys([*map(str, outside)])}, which does not lie below its root {root}; index "
            "the pictures again"
        )


def index_root(path: AnyPath) -> StoragePath | None:
    """Return the root that a local index names, without reading its rows; None if the file is not a local index."""
    place = StoragePath.of(path)
    if not place.is_local or not place.local.is_file():
        return None
    try:
        metadata = pq.read_schema(place.local).metadata or {}
    except (OSError, ValueError, pa.ArrowException):
        return None
    return StoragePath.of(metadata[ROOT_KEY].decode()) if ROOT_KEY in metadata else None


def read_index(path: AnyPath) -> Corpus:
    """Read an index written by `write_index`.

    Raises: CorpusError if the file is not an index, or its folder is gone; StorageError if it cannot be read.
    """
    place = StoragePath.of(path)
    try:
        corpus = index_from_bytes(place.parent.read(place.name), str(path))
    except FileNotFoundError as error:
        raise CorpusError(f"index {error}; make it with `eupe index`") from error
    if corpus.root.is_local and not corpus.root.local.is_dir():
        raise CorpusError(
            f"index {path} points to the folder {corpus.root}, which does not exist; index its new location"
        )
    return corpus
