"""Locks on a disk, and folders that are made whole or not at all, by one process of a machine at a time.

A lock is the operating system's (`flock`), so it ends with its process, however that dies. Two machines see each
other's locks only if their file system passes them on: NFS since version 4 and Lustre mounted with `flock` do.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eupe.common.files import is_open_as
from eupe.common.reading import parse_json
from eupe.errors import ConfigError

LOCK = ".eupe.__lock"
"""Name of the lock in the folder that is held; lists leave out names with this ending."""


def lock_file(path: Path, *, verb: str, of: Path) -> int:
    """Open a file, lock it and write into it who holds it; return its descriptor.

    Args:
        verb: verb of eupe that takes the lock, or a whole command `python ...`, for the note.
        of: path that the lock protects, for messages.
    Raises: ConfigError if another process holds it, or it is a link or a file that eupe did not write; OSError.
    """
    if path.is_symlink():
        raise ConfigError(f"{path}, which eupe uses to lock {of}, is a link; remove it")
    while True:
        # O_NOFOLLOW: a link may have appeared since the check
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            raise ConfigError(is_held(of, note)) from None
        except OSError:  # the file system has no locks
            pass
        if is_open_as(path, descriptor):
            # a file without our note is not ours, and truncating would empty it
            if (found := os.pread(descriptor, 4096, 0)) and _holder(found) is None:
                os.close(descriptor)
                raise ConfigError(f"{path}, which eupe uses to lock {of}, was not written by eupe; move it away")
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder_note(verb)).encode(), 0)
            return descriptor
        os.close(descriptor)  # its holder has just removed it: try again


def holder_note(verb: str) -> dict[str, str | int]:
    """Return a note of who holds a place, for the next process that wants it."""
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return {"verb": verb, "process": os.getpid(), "host": socket.gethostname(), "since": since}


def _holder(note: bytes) -> str | None:
    """Return who wrote a note, in words; None if it is not a holder's note."""
    try:
        held = parse_json(note)
        verb = str(held["verb"])
        command = verb if verb.startswith("python ") else f"eupe {verb}"
        return f"`{command}`, process {held['process']} on {held['host']}, since {held['since']}"
    except (ValueError, KeyError, TypeError):
        return None


def is_held(of: object, note: bytes) -> str:
    """Return the message that a place is held, and by whom, from the holder's note."""
    who = _holder(note) or "an unidentified process"
    return f"{of} is being written by {who}; wait until it ends, or stop it, and run the same command again"


@contextmanager
def unfinished(out: Path, *, verb: str) -> Iterator[Path]:
    """Yield an empty folder beside `out`, locked while it is filled; remove it afterwards unless it was renamed.

    Raises: ConfigError naming the other process if one works on the same `out`; OSError.
    """
    folder = out.with_name(f".{out.name}.unfinished")
    lock_path = out.with_name(f".{out.name}{LOCK}")
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = lock_file(lock_path, verb=verb, of=out)
    try:
        if folder.is_symlink():
            raise ConfigError(f"{folder}, in which {out} is made, is a link; remove it and run the same command again")
        shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock_path.unlink(missing_ok=True)  # still locked: after closing it could be another process's
        os.close(lock)
