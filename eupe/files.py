"""Files and folders on disks, written so that a reader finds the old bytes, the new ones or nothing, whatever fails.

A file is written beside its place under another name, flushed to the disk, renamed, and the rename flushed as well.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED = ".__lock"
"""How the names of files end while they are written; tensorstore's word, which lists leave out."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a neighbour of `path` to write to; when the block ends well, it is flushed and takes the name `path`.

    The neighbour is locked while its writer lives, so that `remove_unfinished` knows what a killed one left. Where the
    block fails nothing is left.

    Raises: OSError.
    """
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}{UNFINISHED}")
    try:
        with unfinished.open("xb") as file:
            with suppress(OSError):  # of a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield unfinished
            sync(unfinished)
            unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_file(path: Path, blocks: Iterable[bytes] | bytes | str) -> None:
    """Write a whole file, given as bytes, as text for UTF-8, or in pieces; folders on the way to it are made.

    Raises: OSError, and what making the pieces raises; then what was there before is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    pieces = (blocks.encode(),) if isinstance(blocks, str) else (blocks,) if isinstance(blocks, bytes) else blocks
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        file.writelines(pieces)


def publish(folder: Path, out: Path) -> None:
    """Flush everything in a folder to the disk, then give it the name `out`, where nothing or an empty folder is.

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
    """Tell whether what is open under a descriptor is still what has the name `path`, and not gone or another."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def remove_unfinished(folder: Path) -> None:
    """Delete what writers that were killed left behind, at any depth; what a living one has locked stays."""
    for path in folder.rglob(f"*{UNFINISHED}"):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
