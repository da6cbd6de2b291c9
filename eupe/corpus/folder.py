"""Pictures that are files of their own: a folder walked in the order of the keys, each file hashed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from stat import S_ISREG
from typing import Any

from eupe.errors import CorpusError
from eupe.place import Place

Row = dict[str, Any]
"""Of the index, by column; a column that is not named is null."""

Known = Mapping[str, Row]
"""Rows of an earlier index, by key."""


def file_names(root: Place) -> Iterator[str]:
    """Paths of all files below a folder, sorted; neither what is hidden nor what links to folders lead to.

    Raises: CorpusError if a folder cannot be read; StorageError if an object store does not serve it.
    """
    if root.is_local:
        yield from _walk(root.local, "")
        return
    for key in root.list():
        if not any(word.startswith(".") for word in key.split("/")):
            yield key


def _walk(folder: Path, prefix: str) -> Iterator[str]:
    """One folder at a time in memory: with folders compared as `name/`, the order is that of the whole paths."""
    try:
        with os.scandir(folder) as entries:
            names = [
                f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name
                for entry in entries
                if not entry.name.startswith(".") and not (entry.is_symlink() and Path(entry).is_dir())
            ]
    except OSError as error:
        raise CorpusError(f"corpus folder {error.filename} cannot be read: {error.strerror}") from error
    for name in sorted(names):
        if name.endswith("/"):
            yield from _walk(folder / name[:-1], prefix + name)
        else:
            yield prefix + name


def require_printable(path: str) -> None:
    """Raises: CorpusError for a name that could not be shown or written down."""
    if not path.isprintable():
        raise CorpusError(f"the file name {path!r} has unprintable characters; rename it")


def picture_row(root: Place, known: Known, key: str) -> Row:
    """Of a picture that is a file; without a hash if it cannot be read, for the extraction to record the reason.

    Raises: StorageError if an object store does not serve it.
    """
    label = key.split("/", 1)[0] if "/" in key else None
    row: Row = {"key": key, "label": label}
    before = known.get(key)
    if not root.is_local:
        if before is not None:
            return row | {name: before[name] for name in ("sha256", "num_bytes")}
        try:
            data = root.read(key)
        except FileNotFoundError:
            return row
        return row | {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    try:
        stat = (root.local / key).stat()
        if not S_ISREG(stat.st_mode):
            return row  # a pipe would be waited for, a device has no end
        row |= {"num_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        if before is not None and all(before[name] == row[name] for name in ("num_bytes", "mtime_ns")):
            row["sha256"] = before["sha256"]
        row["sha256"] = row.get("sha256") or hashlib.sha256((root.local / key).read_bytes()).hexdigest()
    except OSError:
        pass
    return row


def modified_ns(root: Place, name: str) -> int | None:
    """When a file was changed; None in an object store, where no time vouches for the content.

    Raises: CorpusError if it is gone.
    """
    if not root.is_local:
        return None
    try:
        return (root.local / name).stat().st_mtime_ns
    except OSError as error:
        raise CorpusError(f"{root / name} cannot be read: {error.strerror}") from error
