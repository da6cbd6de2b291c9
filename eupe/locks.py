"""Locks on a disk, and a folder that is made whole or not at all, by one process of a machine at a time.

A lock is the operating system's (`flock`), so it ends with its process however that dies. Two machines see each other's
only where their file system passes locks on: NFS since version 4 and Lustre mounted with `flock` do.
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

from eupe.errors import ConfigError
from eupe.files import is_open_as
from eupe.reading import parse_json

LOCK = ".eupe.__lock"
"""In the folder that is held; lists leave names that end so out."""


def lock_file(path: Path, *, verb: str, of: Path) -> int:
    """Open a file and lock it, with a note in it of who has done so; return its descriptor.

    Args:
        of: what is held by that, for the sentence that says so.
    Raises: ConfigError if another process has it, or it is a link or a file of somebody else's; OSError.
    """
    if path.is_symlink():
        raise ConfigError(f"{path}, by which eupe locks {of}, is a link; remove it")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            raise ConfigError(is_held(of, note)) from None
        except OSError:  # of a file system without locks
            pass
        if is_open_as(path, descriptor):
            if (found := os.pread(descriptor, 4096, 0)) and _holder(found) is None:
                os.close(descriptor)
                raise ConfigError(f"{path}, by which eupe locks {of}, was not written by eupe; move it away")
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder_note(verb)).encode(), 0)
            return descriptor
        os.close(descriptor)  # its holder has removed it just now


def holder_note(verb: str) -> dict[str, str | int]:
    """Say who holds a place, for whoever comes next."""
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return {"verb": verb, "process": os.getpid(), "host": socket.gethostname(), "since": since}


def _holder(note: bytes) -> str | None:
    """Return who wrote a note, in words; None if it is none."""
    try:
        held = parse_json(note)
        return f"`eupe {held['verb']}`, process {held['process']} on {held['host']}, since {held['since']}"
    except (ValueError, KeyError, TypeError):
        return None


def is_held(of: object, note: bytes) -> str:
    """Say that a place is held, and by whom, from the holder's note."""
    who = _holder(note) or "a process that has not said who it is"
    return f"{of} is being written by {who}; wait for its end, or stop it, and run the same command again"


@contextmanager
def unfinished(out: Path, *, verb: str) -> Iterator[Path]:
    """Make an empty folder beside `out`, locked while it is filled, and remove it afterwards unless it was renamed.

    Raises: ConfigError if another process is at work on the same, which is told by name; OSError.
    """
    folder = out.with_name(f".{out.name}.unfinished")
    lock_path = out.with_name(f".{out.name}{LOCK}")
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = lock_file(lock_path, verb=verb, of=out)
    try:
        if folder.is_symlink():
            raise ConfigError(f"{folder}, where {out} is to be made, is a link; remove it, and run the same again")
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock_path.unlink(missing_ok=True)
        os.close(lock)
