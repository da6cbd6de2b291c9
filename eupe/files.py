"""Atomic writes of files and folders: a reader finds the old bytes, the new ones or nothing, whatever fails.

A file is written beside its final path under another name, flushed to the disk and renamed; then the rename is flushed.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED = ".__lock"
"""Suffix of files while they are written; tensorstore uses it, too, and its lists leave such files out."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; if the block succeeds, flush the file and rename it to `path`.

    The file is locked while its writer lives, so that `remove_unfinished` recognises what a killed writer left. If the
    block fails, nothing is left.

    Raises: OSError.
    """
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}{UNFINISHED}")
    try:
        with unfinished.open("xb") as file:
            with suppress(OSError):  # the file system has no locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield unfinished
            # by name: a library may have put another file there
            # before the rename: a crash could otherwise leave `path` without its bytes
            sync(unfinished)
            unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_file(path: Path, blocks: Iterable[bytes] | bytes | str) -> None:
    """Write a whole file, given as bytes, text (written as UTF-8) or pieces; make missing folders.

    Raises: OSError, and whatever making the pieces raises; what was there before is then still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pieces = (blocks.encode(),) if isinstance(blocks, str) else (blocks,) if isinstance(blocks, bytes) else blocks
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        file.writelines(pieces)


def publish(folder: Path, out: Path) -> None:
    """Flush everything in a folder to the disk, then rename it to `out`, which must be missing or an empty folder.

    Raises: OSError.
    """
    for path in folder.rglob("*"):
        if not path.is_symlink():
            sync(path)
    sync(folder)
    folder.rename(out)
    sync(out.absolute().parent)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk.

    Raises: OSError.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_open_as(path: Path, descriptor: int) -> bool:
    """Return whether the file open under a descriptor is still the one at `path`, neither removed nor replaced."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def remove_unfinished(folder: Path) -> None:
    """Delete what killed writers left, at any depth; what a living writer has locked stays."""
    for path in folder.rglob(f"*{UNFINISHED}"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
