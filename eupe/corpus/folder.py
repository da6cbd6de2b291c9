"""Pictures that are files of their own: the walk through a folder in key order, and the hash of each file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

from eupe.common.files import key_of, name_of
from eupe.common.storage import StoragePath
from eupe.corpus.left_out import BROKEN_LINKS, LINKS_BACK, hidden
from eupe.errors import CorpusError

MAX_PICTURE_BYTES = 2**30
"""Size limit of a file; decoders refuse much smaller ones, but only once they are in memory."""

Row = dict[str, Any]
"""One row of the index, by column; absent columns are null."""

Known = Mapping[str, Row]
"""Rows of an earlier index, by key."""


@dataclass(frozen=True)
class Entry:
    """A file below a folder."""

    name: str
    """Path below the folder, as text that `key_of` writes."""
    left_out: str | None = None
    """Reason why the file is left out; None if it is not."""


def entries(root: StoragePath) -> Iterator[Entry]:
    """Yield all files below a folder, sorted by path.

    Links to folders are followed, except links back to a folder above them.

    Raises: CorpusError if a folder cannot be read; StorageError if an object store cannot be read.
    """
    if root.is_local:
        yield from _walk(root.local, "", ())
        return
    for name in root.list():
        yield Entry(name, hidden(name))


def file_names(root: StoragePath) -> Iterator[str]:
    """Yield the paths of the files that are not left out; see `entries`."""
    return (entry.name for entry in entries(root) if entry.left_out is None)


Identity = tuple[int, int]
"""Device and inode of a folder."""


def _walk(folder: Path, prefix: str, above: tuple[Identity, ...]) -> Iterator[Entry]:
    """Yield the files below a folder, with only the folders on the current path in memory.

    Folders are sorted as `name/`, so the order is that of the whole paths.

    Args:
        above: identities of the folders on the path to this one, to detect links back to them.
    """
    try:
        above = (*above, _identity(folder.stat()))
        with os.scandir(folder) as found:
            names = sorted(_named(entry, above) for entry in found)
    except OSError as error:
        raise CorpusError(f"corpus folder {error.filename} cannot be read: {error.strerror}") from error
    for name, reason in names:
        if not name.endswith("/"):
            yield Entry(prefix + name, reason or None)
        elif reason:
            inside = (Path(at, file) for at, _, files in os.walk(folder / name_of(name)) for file in files)
            yield from (Entry(prefix + key_of(str(file.relative_to(folder))), reason) for file in sorted(inside))
        else:
            yield from _walk(folder / name_of(name), prefix + name, above)


def _named(entry: os.DirEntry[str], above: tuple[Identity, ...]) -> tuple[str, str]:
    """Return an entry's name and the reason why it is left out, empty if it is not.

    A folder whose files are listed or counted has a slash at the end of its name.
    """
    name = key_of(entry.name)
    link = entry.is_symlink()
    try:
        folder = entry.is_dir()
    except OSError:  # links that form a circle
        folder = False
    if reason := hidden(f"{name}/" if folder else name):
        return (f"{name}/" if folder and not link else name), reason
    if not folder:
        return name, BROKEN_LINKS if link and not Path(entry).exists() else ""
    if link and _identity(entry.stat()) in above:
        return name, LINKS_BACK
    return f"{name}/", ""


def _identity(about: os.stat_result) -> Identity:
    return about.st_dev, about.st_ino


def picture_row(root: StoragePath, known: Known, key: str) -> Row:
    """Return the index row of a picture that is a file.

    It has no hash if the file cannot be read or is too large; extraction records the reason.

    Raises: StorageError if an object store cannot be read.
    """
    label = key.split("/", 1)[0] if "/" in key else None
    row: Row = {"key": key, "label": label}
    before = known.get(key)
    if not root.is_local:
        if before is not None:  # an object has no time to compare; its row is from this index's interrupted run
            return row | {name: before[name] for name in ("sha256", "num_bytes")}
        try:
            data = root.read(key)
        except FileNotFoundError:
            return row
        return row | {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    try:
        stat = root.path(key).stat()
        if not S_ISREG(stat.st_mode):
            return row  # reading a pipe may block, and a device may have no end
        row |= {"num_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        if before is not None and all(before[name] == row[name] for name in ("num_bytes", "mtime_ns")):
            row["sha256"] = before["sha256"]
        if stat.st_size <= MAX_PICTURE_BYTES:  # a larger file is refused when it is read
            row["sha256"] = row.get("sha256") or _hash_of(root.path(key))
    except OSError:
        pass
    return row


def _hash_of(file: Path) -> str:
    """Return a file's SHA-256, hexadecimal.

    Raises: OSError if it cannot be read.
    """
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, hashlib.sha256).hexdigest()


def modified_ns(root: StoragePath, name: str) -> int | None:
    """Return when a file was last changed; None in an object store, where no time guarantees the content.

    Raises: CorpusError if the file cannot be read.
    """
    if not root.is_local:
        return None
    try:
        return root.path(name).stat().st_mtime_ns
    except OSError as error:
        raise CorpusError(f"{root / name} cannot be read: {error.strerror}") from error
