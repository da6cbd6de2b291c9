"""Which pictures there are: a folder walked into an index, kept as Parquet.

One row per picture: `key` (path below the root, with forward slashes), `sha256` of its bytes (null where it could not
be read), `num_bytes`, `mtime_ns`, `label` (the first folder below the root, or null). Rows are sorted by key. The root
stands in the schema's metadata, so an index can stand in for its folder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from eupe.corpus.decode import EXTENSIONS
from eupe.errors import CorpusError

ROOT_KEY = b"eupe.root"
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

    root: Path
    samples: pa.Table
    """Columns of `SCHEMA`, one row per picture."""

    def __len__(self) -> int:
        return int(self.samples.num_rows)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the sorted (key, sha256) pairs: equal exactly where the pictures are equal."""
        pairs = zip(self.samples["key"].to_pylist(), self.samples["sha256"].to_pylist(), strict=True)
        return fingerprint(pairs)

    def head(self, limit: int | None) -> Corpus:
        """The first `limit` pictures, or all of them."""
        return self if limit is None else Corpus(self.root, self.samples.slice(0, limit))


def fingerprint(pairs: Iterable[tuple[str, str | None]]) -> str:
    """SHA-256 of the sorted (key, sha256) pairs."""
    digest = hashlib.sha256()
    for key, sha256 in sorted(pairs, key=lambda pair: pair[0]):
        digest.update(f"{key}\0{sha256 or 'unreadable'}\n".encode())
    return digest.hexdigest()


Progress = Callable[[int, int], None]
"""Called with (done, in all)."""


def open_corpus(
    source: str | Path, *, previous: Path | None = None, progress: Progress = lambda done, of: None
) -> Corpus:
    """A folder (indexed now) or an index made before.

    Args:
        previous: an earlier index of the same folder; files of unchanged size and time are not read again.
        progress: called with (files hashed, files in all).
    Raises: CorpusError if there is nothing there, or nothing that is a picture.
    """
    source = Path(source)
    if source.is_dir():
        return index_folder(source, previous=previous, progress=progress)
    if source.is_file() and source.suffix == ".parquet":
        return read_index(source)
    if not source.exists():
        raise CorpusError(f"corpus {source} does not exist; give a folder of pictures or an index made by `eupe index`")
    raise CorpusError(f"corpus {source} is neither a folder of pictures nor an index (.parquet) made by `eupe index`")


def index_folder(root: Path, *, previous: Path | None = None, progress: Progress = lambda done, of: None) -> Corpus:
    """Walk a folder (links to folders are not followed) and hash every picture.

    Raises: CorpusError if it holds no picture.
    """
    root = root.resolve()
    keys = sorted(_picture_keys(root))
    if not keys:
        raise CorpusError(f"corpus {root} holds no picture; looked for {', '.join(sorted(EXTENSIONS))} below it")
    known = _known_hashes(previous, root) if previous is not None else {}
    rows = []
    with ThreadPoolExecutor() as pool:
        for row in pool.map(lambda key: _index_row(root, key, known), keys):
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
                if not str(path).isprintable():
                    raise CorpusError(f"the file name {str(path)!r} has unprintable characters; rename it")
                yield path.relative_to(root).as_posix()


def _known_hashes(index: Path, root: Path) -> dict[tuple[str, int, int], str | None]:
    """Of an earlier index of the same folder; empty where there is none."""
    try:
        known = read_index(index)
    except CorpusError:
        return {}
    rows = known.samples.to_pylist() if known.root == root else []
    return {(row["key"], row["num_bytes"], row["mtime_ns"]): row["sha256"] for row in rows}


def _index_row(root: Path, key: str, known: dict[tuple[str, int, int], str | None]) -> dict[str, object]:
    label = key.split("/", 1)[0] if "/" in key else None
    row: dict[str, object] = {"key": key, "sha256": None, "num_bytes": None, "mtime_ns": None, "label": label}
    try:
        stat = (root / key).stat()
        row |= {"num_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        known_hash = known.get((key, stat.st_size, stat.st_mtime_ns))
        row["sha256"] = known_hash or hashlib.sha256((root / key).read_bytes()).hexdigest()
    except OSError:
        pass  # the extraction reads it again and records the reason in the sample's row
    return row


def write_index(corpus: Corpus, path: Path) -> None:
    """Write the index as Parquet, atomically.

    Raises: CorpusError if the place cannot be written.
    """
    table = corpus.samples.replace_schema_metadata({ROOT_KEY: str(corpus.root).encode()})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, temporary)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise CorpusError(f"the index {path} cannot be written: {error}") from error


def read_index(path: Path) -> Corpus:
    """Read an index made by `write_index`.

    Raises: CorpusError if the file is something else, or its folder is gone.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise CorpusError(f"index {path} cannot be read as Parquet: {error}") from error
    metadata = table.schema.metadata or {}
    if ROOT_KEY not in metadata or table.schema.names != SCHEMA.names:
        raise CorpusError(
            f"{path} is not an index of pictures; make one with `eupe index --corpus FOLDER --out {path}`"
        )
    root = Path(metadata[ROOT_KEY].decode())
    if not root.is_dir():
        raise CorpusError(f"index {path} points to the folder {root}, which does not exist; index its new place again")
    return Corpus(root, table.replace_schema_metadata())
