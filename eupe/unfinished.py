"""A folder that is made whole or not at all, by one process of a machine at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eupe.errors import ConfigError
from eupe.files import is_open_as


@contextmanager
def unfinished(out: Path, *, verb: str) -> Iterator[Path]:
    """An empty folder beside `out`, locked while it is filled, and gone afterwards unless it was renamed.

    Raises: ConfigError if another process is at work on the same; OSError.
    """
    folder = out.with_name(f".{out.name}.unfinished")
    if folder.is_symlink():
        raise ConfigError(f"{folder}, where {out} is to be made, is a link; remove it, and run the same again")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        if not (_locked(lock) and is_open_as(folder, lock)):
            raise ConfigError(f"another `eupe {verb}` is making {out}; wait for its end, and run the same again")
        for left in folder.iterdir():  # by one that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield folder
        finally:
            if is_open_as(folder, lock):
                shutil.rmtree(folder)
    finally:
        os.close(lock)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
