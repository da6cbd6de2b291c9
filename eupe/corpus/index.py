"""Which pictures there are: a folder walked into an index, kept as Parquet.

One row per picture: `key` (path below the root, with forward slashes), `sha256` of its bytes (null where it could not
be read), `num_bytes`, `mtime_ns`, `label` (the first folder below the root, or null). Rows are sorted by key. The root,
a path or an object store's URL, stands in the schema's metadata, so an index can stand in for its folder.

Objects have no time that would vouch for their content: in an object store `mtime_ns` is null, and whoever indexes it
reads and hashes all pictures anew.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path
from stat import S_ISREG

import pyarrow as pa
import pyarrow.parquet as pq

from eupe.corpus.decode import EXTENSIONS
from eupe.errors import CorpusError, StorageError
from eupe.place import Place, Where

ROOT_KEY = b"eupe.root"
NAMED_KEYS = 5
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("sha256", pa.string()),
        pa.field("num_bytes", pa.int64()),
        pa.field("mtime_ns", pa.int64()),
        pa.field("label", pa.string()),
    ]
)


@dataclass(frozen=True)
class Corpus:
    """Pictures with keys, and where their bytes are."""

    root: Place
    samples: pa.Table
    """Columns of `SCHEMA`, one row per picture."""

    def __len__(self) -> int:
        return int(self.samples.num_rows)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the sorted (key, sha256) pairs: equal exactly where the pictures are equal."""
        pairs = zip(self.samples["key"].to_pylist(), self.samples["sha256"].to_pylist(), strict=True)
        return fingerprint(pairs)

    @property
    def duplicates(self) -> list[list[str]]:
        """Keys of pictures that are the same, byte for byte, group by group."""
        groups: dict[str, list[str]] = {}
        for key, sha256 in zip(self.samples["key"].to_pylist(), self.samples["sha256"].to_pylist(), strict=True):
            if sha256 is not None:
                groups.setdefault(sha256, []).append(key)
        return [keys for keys in groups.values() if len(keys) > 1]

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
        keys = self.samples["key"].to_pylist()
        picked = [
            i for i, key in enumerate(keys) if (not include or _matches(key, include)) and not _matches(key, exclude)
        ]
        if not picked:
            raise CorpusError(
                f"--include and --exclude leave none of the {len(keys)} pictures of {self.root}; they are matched "
                f"against paths below it, like {keys[0]}"
            )
        if shuffle is not None:
            picked.sort(key=lambda i: hashlib.blake2b(f"{shuffle}\0{keys[i]}".encode(), digest_size=16).digest())
        return Corpus(self.root, self.samples.take(picked[:limit]))


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def some_keys(keys: Sequence[str]) -> str:
    """The first few of them in words, and how many more there are."""
    more = len(keys) - NAMED_KEYS
    return ", ".join(keys[:NAMED_KEYS]) + (f", and {more} more" if more > 0 else "")


def fingerprint(pairs: Iterable[tuple[str, str | None]]) -> str:
    """SHA-256 of the sorted (key, sha256) pairs."""
    digest = hashlib.sha256()
    for key, sha256 in sorted(pairs, key=lambda pair: pair[0]):
        digest.update(f"{key}\0{sha256 or 'unreadable'}\n".encode())
    return digest.hexdigest()


Progress = Callable[[int, int], None]
"""Called with (done, in all)."""


def open_corpus(source: Where, *, previous: Corpus | None = None, progress: Progress = lambda done, of: None) -> Corpus:
    """A folder (indexed now) or an index made before.

    Args:
        source: a path, `s3://...` or `gs://...`; what ends in `.parquet` is an index.
        previous: an earlier index of the same folder; local files of unchanged size and time are not read again.
        progress: called with (files hashed, files in all).
    Raises: CorpusError if there is nothing there, or nothing that is a picture; StorageError if an object store does
        not serve it.
    """
    place = Place.of(source)
    is_index = place.name.endswith(".parquet")
    if not place.is_local:
        return read_index(place) if is_index else index_folder(place, previous=previous, progress=progress)
    if place.local.is_dir():
        return index_folder(place, previous=previous, progress=progress)
    if place.local.is_file() and is_index:
        return read_index(place)
    if not place.local.exists():
        raise CorpusError(f"corpus {source} does not exist; give a folder of pictures or an index made by `eupe index`")
    raise CorpusError(f"corpus {source} is neither a folder of pictures nor an index (.parquet) made by `eupe index`")


def index_folder(
    folder: Where, *, previous: Corpus | None = None, progress: Progress = lambda done, of: None
) -> Corpus:
    """Find every picture (links to folders are not followed) and hash it.

    Raises: CorpusError if there is none; StorageError if an object store does not serve them.
    """
    root = Place.of(folder)
    if root.is_local:
        root = Place(str(root.local.resolve()))
    keys = sorted(_picture_keys(root.local) if root.is_local else _object_keys(root))
    if not keys:
        raise CorpusError(f"corpus {root} holds no picture; looked for {', '.join(sorted(EXTENSIONS))} below it")
    known = _known_hashes(previous, root) if previous is not None else {}
    row_of = partial(_file_row, root.local, known) if root.is_local else partial(_object_row, root)
    rows = []
    with ThreadPoolExecutor(root.threads((os.cpu_count() or 1) + 4)) as pool:
        for row in pool.map(row_of, keys):
            rows.append(row)
            progress(len(rows), len(keys))
    return Corpus(root, pa.Table.from_pylist(rows, schema=SCHEMA))


def _picture_keys(root: Path) -> Iterable[str]:
    def stop(error: OSError) -> None:
        raise CorpusError(f"corpus folder {error.filename} cannot be read: {error.strerror}") from error

    for folder, subfolders, files in os.walk(root, onerror=stop):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS:
                path = Path(folder, name)
                _require_printable(str(path))
                yield path.relative_to(root).as_posix()


def _object_keys(root: Place) -> Iterable[str]:
    for key in root.list():
        words = key.split("/")
        if not any(word.startswith(".") for word in words) and Path(words[-1]).suffix.lower() in EXTENSIONS:
            _require_printable(str(root / key))
            yield key


def _require_printable(path: str) -> None:
    if not path.isprintable():
        raise CorpusError(f"the file name {path!r} has unprintable characters; rename it")


def _known_hashes(previous: Corpus, root: Place) -> dict[tuple[str, int, int], str | None]:
    """Of an earlier index of the same folder; empty where it is of another."""
    rows = previous.samples.to_pylist() if previous.root == root else []
    return {(row["key"], row["num_bytes"], row["mtime_ns"]): row["sha256"] for row in rows}


def _row(key: str) -> dict[str, object]:
    label = key.split("/", 1)[0] if "/" in key else None
    return {"key": key, "sha256": None, "num_bytes": None, "mtime_ns": None, "label": label}


def _file_row(root: Path, known: dict[tuple[str, int, int], str | None], key: str) -> dict[str, object]:
    row = _row(key)
    try:
        stat = (root / key).stat()
        if not S_ISREG(stat.st_mode):
            return row  # a pipe would be waited for, a device has no end
        row |= {"num_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        known_hash = known.get((key, stat.st_size, stat.st_mtime_ns))
        row["sha256"] = known_hash or hashlib.sha256((root / key).read_bytes()).hexdigest()
    except OSError:
        pass  # the extraction reads it again and records the reason in the sample's row
    return row


def _object_row(root: Place, key: str) -> dict[str, object]:
    """Raises: StorageError."""
    row = _row(key)
    try:
        data = root.read(key)
    except FileNotFoundError:
        return row
    return row | {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_picture(root: Place, key: str) -> bytes:
    """A picture's bytes.

    Raises: CorpusError if the picture cannot be read; StorageError if an object store serves nothing at all.
    """
    if root.is_local and (path := root.local / key).exists() and not path.is_file():
        raise CorpusError(f"{path} is a pipe, a device or a folder, not a file")
    try:
        return root.read(key)
    except FileNotFoundError as error:
        raise CorpusError(str(error)) from error
    except StorageError as error:
        if root.is_local:
            raise CorpusError(str(error)) from error
        raise


def write_index(corpus: Corpus, path: Where) -> None:
    """Write the index as Parquet, atomically.

    Raises: CorpusError if the place cannot be written.
    """
    place = Place.of(path)
    try:
        place.parent.write(place.name, index_bytes(corpus))
    except StorageError as error:
        raise CorpusError(f"the index {path} cannot be written: {error}") from error


def index_bytes(corpus: Corpus) -> bytes:
    """The index as Parquet."""
    file = io.BytesIO()
    table = corpus.samples.replace_schema_metadata({ROOT_KEY: str(corpus.root).encode()})
    pq.write_table(table, file, write_page_checksum=True)
    return file.getvalue()


def index_from_bytes(data: bytes, where: str) -> Corpus:
    """The reverse of `index_bytes`; the pictures themselves need not be there.

    Raises: CorpusError, naming `where`, if it is something else.
    """
    try:
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CorpusError(f"index {where} cannot be read as Parquet: {error}") from error
    metadata = table.schema.metadata or {}
    if ROOT_KEY not in metadata or table.schema.names != SCHEMA.names:
        raise CorpusError(
            f"{where} is not an index of pictures; make one with `eupe index --corpus FOLDER --out {where}`"
        )
    return Corpus(Place.of(metadata[ROOT_KEY].decode()), table.replace_schema_metadata())


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
