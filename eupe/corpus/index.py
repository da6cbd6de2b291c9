"""Which pictures there are: a folder, tars or tables walked into an index, kept as Parquet.

One row per picture: `key` (path below the root, with forward slashes), `sha256` of its bytes (null where it could not
be read), `num_bytes`, `mtime_ns` of the file that holds it, `label` (or null; of a file, the first folder below the
root). Of tars and tables also `file`, `start` and `length` (see `Inside`; null for a picture that is a file of its own)
and `caption`. Rows are sorted by key, those of one tar or table lie as they do in it. The root, a path or an object
store's URL, stands in the schema's metadata, so an index can stand in for its folder.

Objects have no time that would vouch for their content: in an object store `mtime_ns` is null, and whoever indexes it
reads and hashes all pictures anew.
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

from eupe.ahead import map_ahead
from eupe.cores import num_cores
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
from eupe.place import Place, Where
from eupe.reading import parse_json

ROOT_KEY = b"eupe.root"
GAPS_KEY = b"eupe.without_picture"
"""How many `NO_PICTURE`, as indexes said before they knew of other reasons."""
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
"""Of pictures in tars and tables; a folder's index goes without what these columns add."""

MAX_PLACE = 2**60
"""Bytes of a file, or rows."""
ROWS_AT_ONCE = 8192
"""Of a folder, made and written together."""


@dataclass(frozen=True)
class Corpus:
    """Pictures with keys, and where their bytes are."""

    root: Place
    samples: pa.Table
    """Columns of `SCHEMA` or of `CONTAINED`, one row per picture."""
    left_out: LeftOut = field(default_factory=dict)
    """What is none of the samples, when they were indexed."""
    choice: Choice = AS_FOUND
    """What the user chose where tars and tables hold more."""
    notes: Sequence[str] = ()
    """What was taken where there was a choice that the user did not make."""

    def __len__(self) -> int:
        return int(self.samples.num_rows)

    @property
    def num_found(self) -> int:
        """Files of a folder, members of tars and rows of tables, pictures or not."""
        return len(self) + sum(self.left_out.values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the sorted (key, sha256) pairs: equal exactly where the pictures are equal."""
        return fingerprint(self.samples)

    @property
    def duplicates(self) -> list[list[str]]:
        """Keys of pictures that are the same, byte for byte, group by group."""
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
        """Some of the pictures.

        Args:
            include, exclude: patterns as in a shell, matched against whole keys, where `*` also stands for slashes; all
                pictures are included where no pattern says which.
            shuffle: a seed, for an order of its own in place of the keys'.
            limit: only the first so many, in that order.
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
            picked.sort(key=lambda i: hashlib.blake2b(f"{shuffle}\0{keys[i]}".encode(), digest_size=16).digest())
        return self._only(self.samples.take(picked[:limit]), Counter(filter(None, reasons)))

    def _only(self, samples: pa.Table, by_patterns: LeftOut) -> Corpus:
        beyond = len(self) - len(samples) - sum(by_patterns.values())
        return replace(self, samples=samples, left_out=added(self.left_out, by_patterns, {BY_LIMIT: beyond}))


def some_keys(keys: Sequence[str]) -> str:
    """The first few of them in words, and how many more there are."""
    more = len(keys) - NAMED_KEYS
    return ", ".join(keys[:NAMED_KEYS]) + (f", and {more} more" if more > 0 else "")


def fingerprint(samples: pa.Table) -> str:
    """SHA-256 over the lines `key NUL sha256 LF` of an index, sorted by key; `unreadable` stands in for no hash."""
    digest = hashlib.sha256()
    pairs = in_order(samples.select(["key", "sha256"]), "key")
    for start in range(0, len(pairs), ROWS_AT_ONCE):
        rows = pairs.slice(start, ROWS_AT_ONCE)
        ends = pc.binary_join_element_wise(pc.fill_null(rows["sha256"], "unreadable"), "", "\n")
        for lines in pc.binary_join_element_wise(rows["key"], ends, "\0").chunks:
            offsets = np.frombuffer(lines.buffers()[1], np.int32)[lines.offset : lines.offset + len(lines) + 1]
            digest.update(memoryview(lines.buffers()[2])[offsets[0] : offsets[-1]])
    return digest.hexdigest()


Progress = Callable[[int, int], None]
"""Called with (done, in all)."""


def open_corpus(
    source: Where,
    *,
    previous: Corpus | None = None,
    patterns: Patterns = EVERYTHING,
    progress: Progress = lambda done, of: None,
    choice: Choice = AS_FOUND,
) -> Corpus:
    """A folder, tars or tables (indexed now), or an index made before.

    Args:
        source: a path, `s3://...` or `gs://...`, perhaps with a range of files in braces.
        previous: an earlier index of the same pictures; local files of unchanged size and time are not read again.
        progress: called with (pictures hashed, pictures in all); of tars and tables that is what it will be if all
            hold as many as those that are done.
        patterns: which pictures; a file that they leave out is not read.
        choice: which pictures and labels to take where there are several.
    Raises: CorpusError if there is nothing there, nothing that is a picture, or nothing that was chosen; StorageError
        if an object store does not serve it.
    """
    found = replace(find_source(source, patterns), choice=choice)
    if found.kind == "index":
        return chosen_index(found)
    return _gathered(found, previous, progress)


def chosen_index(found: Source) -> Corpus:
    """Read an index that stands for its pictures.

    Raises: CorpusError if it was made with another choice than is asked for now.
    """
    corpus = read_index(found.root / found.files[0])
    if found.choice not in (AS_FOUND, corpus.choice):
        raise CorpusError(
            f"index {found.root / found.files[0]} was made {corpus.choice.told()}; {found.choice.words()} chooses when "
            "pictures are indexed, so give it to `eupe index`, or leave it out here"
        )
    return corpus.pick(include=found.patterns.include, exclude=found.patterns.exclude)


def index_folder(
    folder: Where, *, previous: Corpus | None = None, progress: Progress = lambda done, of: None
) -> Corpus:
    """`open_corpus` of what lies in a folder.

    Raises: CorpusError if there is no picture; StorageError if an object store does not serve them.
    """
    return _gathered(find_folder(Place.of(folder).resolved()), previous, progress)


def _gathered(found: Source, previous: Corpus | None, progress: Progress) -> Corpus:
    pieces = list(index_pieces(found, previous, progress))
    left_out = added(found.left_out, *(piece.left_out for piece in pieces))
    notes = joined_notes(piece.notes for piece in pieces)
    corpus = Corpus(found.root, pa.concat_tables([piece.rows for piece in pieces]), left_out, found.choice, notes)
    require_pictures(found, corpus)
    return corpus


def require_pictures(found: Source, corpus: Corpus) -> None:
    """Raises: CorpusError if there is none, or two of one key."""
    if not len(corpus):
        if by_patterns := sum(corpus.left_out.get(reason, 0) for reason in (BY_INCLUDE, BY_EXCLUDE)):
            raise CorpusError(left_none(by_patterns, found.root, f"{(*found.files, '')[0]}/..."))
        raise CorpusError(f"corpus {found.root} holds no picture in its {len(found.files)} {found.kind}")
    if found.kind == "tables":
        counts = pc.value_counts(corpus.samples["key"])
        twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        if len(twice):
            raise CorpusError(
                f"{some_keys(twice.to_pylist())}: named by more than one row of the tables of {found.root}; name each "
                "picture once"
            )


@dataclass(frozen=True)
class Piece:
    """Some of an index's rows: those of one tar or table, or of some thousand files of a folder."""

    rows: pa.Table
    left_out: LeftOut = field(default_factory=dict)
    """Of the tar or table; of a folder's pieces nothing, for its source says what it leaves out."""
    notes: Sequence[str] = ()


def index_pieces(
    found: Source, previous: Corpus | None, progress: Progress, *, interrupted: Sequence[pa.Table] = ()
) -> Iterator[Piece]:
    """The index of pictures, piece by piece and in order; several files are read at once.

    Args:
        previous: an earlier index, which vouches for local files of unchanged size and time.
        interrupted: pieces of this very index from a run that was cut off; they vouch for objects, too.
    Raises: CorpusError; StorageError if an object store does not serve the pictures.
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
    """Return each sentence once, and no more than people read."""
    return tuple(itertools.islice(dict.fromkeys(itertools.chain.from_iterable(notes)), NAMED_NOTES))


class _Known:
    """An earlier index, of which a few rows are asked for at a time: those between the least and the largest value."""

    def __init__(self, samples: pa.Table, column: str) -> None:
        """
        Args:
            column: by which rows are asked for.
        """
        self._column = column
        has = column in samples.schema.names
        # Rows whose pictures are files of their own are in no tar or table.
        self._samples = in_order(samples.filter(samples[column].is_valid()), column) if has else samples.slice(0, 0)
        self._values = self._samples[column] if has else pa.chunked_array([], pa.string())

    def rows(self, values: Sequence[str]) -> list[Row]:
        """Return those that hold one of these values."""
        places, value_at = range(len(self._values)), lambda i: self._values[i].as_py()
        start = bisect_left(places, min(values), key=value_at)
        near = self._samples.slice(start, bisect_right(places, max(values), key=value_at) - start)
        if not len(near):
            return []
        found: list[Row] = near.filter(pc.is_in(near[self._column], pa.array(values, pa.string()))).to_pylist()
        return found


def in_order(samples: pa.Table, column: str) -> pa.Table:
    """Return rows sorted by a column; as they are where they are that already."""
    values = samples[column]
    return samples if pc.all(pc.less_equal(values[:-1], values[1:])).as_py() else samples.sort_by(column)


def _by_key(known: Sequence[_Known], values: Sequence[str]) -> dict[str, Row]:
    return {row["key"]: row for index in known for row in index.rows(values)}


def write_index(corpus: Corpus, path: Where) -> None:
    """Write the index as Parquet, atomically.

    Raises: CorpusError if the place cannot be written.
    """
    place = Place.of(path)
    try:
        place.parent.write(place.name, index_bytes(corpus))
    except StorageError as error:
        raise CorpusError(f"the index {path} cannot be written: {error}") from error


def index_metadata(corpus: Corpus) -> dict[bytes, bytes]:
    """What an index says beside its rows."""
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
    """The index as Parquet."""
    file = io.BytesIO()
    table = corpus.samples.replace_schema_metadata(index_metadata(corpus))
    pq.write_table(table, file, write_page_checksum=True)
    return file.getvalue()


def index_from_bytes(data: bytes, where: str) -> Corpus:
    """The reverse of `index_bytes`; the pictures themselves need not be there.

    Raises: CorpusError, naming `where`, if it is something else.
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
        root = Place.of(metadata[ROOT_KEY].decode())
        others = parse_json(metadata.get(LEFT_OUT_KEY, b"{}"))
        left_out = added({NO_PICTURE: int(metadata.get(GAPS_KEY, b"0"))}, others)
        notes = parse_json(metadata.get(NOTES_KEY, b"[]"))
        choice = Choice.from_bytes(metadata.get(CHOICE_KEY, b""))
        if not all(type(count) is int for count in left_out.values()) or not all(isinstance(n, str) for n in notes):
            raise ValueError("what it says of its pictures is not in words and counts")
        _require_places(table)
    except (ValueError, TypeError, AttributeError, ConfigError) as error:
        raise CorpusError(f"index {where} is damaged ({error}); index the pictures again") from error
    _require_below(root, table, where)
    return Corpus(root, table.replace_schema_metadata(), left_out, choice, notes)


def _require_places(samples: pa.Table) -> None:
    """Raises: ValueError for a row without a key, or a place in a file that none can have."""
    if samples["key"].null_count:
        raise ValueError("a picture has no key")
    for name in ("num_bytes", "start", "length"):
        column = samples[name] if name in samples.schema.names else pa.nulls(0, pa.int64())
        ends = pc.min_max(column).as_py()
        if (ends["min"] or 0) < 0 or (ends["max"] or 0) > MAX_PLACE:
            raise ValueError(f"{name} is {ends['min']} to {ends['max']}")
    if (
        "file" in samples.schema.names
        and pc.any(pc.xor(samples["file"].is_valid(), samples["start"].is_valid())).as_py()
    ):
        raise ValueError("a picture has a file and no place in it, or a place in no file")


def _require_below(root: Place, samples: pa.Table, where: str) -> None:
    """Raises: CorpusError for a row that names a file outside of the root."""
    names = samples["key"]
    if "file" in samples.schema.names:
        names = pc.coalesce(samples["file"], names)
    outside = names.filter(pc.match_substring_regex(names, OUTSIDE)) if root.is_local else []
    if len(outside):
        raise CorpusError(
            f"index {where} names {some_keys([*map(str, outside)])}, which does not lie below its root {root}; index "
            "the pictures again"
        )


def index_root(path: Where) -> Place | None:
    """Return the root that a local index names, reading no row of it; None of what is no such file."""
    place = Place.of(path)
    if not place.is_local or not place.local.is_file():
        return None
    try:
        metadata = pq.read_schema(place.local).metadata or {}
    except (OSError, ValueError, pa.ArrowException):
        return None
    return Place.of(metadata[ROOT_KEY].decode()) if ROOT_KEY in metadata else None


def read_index(path: Where) -> Corpus:
    """Read an index made by `write_index`.

    Raises: CorpusError if the file is something else, or its folder is gone; StorageError.
    """
    place = Place.of(path)
    try:
        corpus = index_from_bytes(place.parent.read(place.name), str(path))
    except FileNotFoundError as error:
        raise CorpusError(f"index {error}; make it with `eupe index`") from error
    if corpus.root.is_local and not corpus.root.local.is_dir():
        raise CorpusError(
            f"index {path} points to the folder {corpus.root}, which does not exist; index its new place again"
        )
    return corpus
