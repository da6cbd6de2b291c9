"""Run in a process of its own: commit part 1 of the shared case and die by SIGKILL at a given stage.

    python commit_and_die.py STAGE STORE

STAGE is the number of writes that are let through, or `half:N` to die in the middle of the next.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from store_cases import make_case, make_spec

from eupe.common.storage import StoragePath
from eupe.store.writer import StoreWriter


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def half_of(data: bytes) -> Iterator[bytes]:
    yield data[: len(data) // 2]
    die()


def commit_and_die(stage: str, store: Path) -> None:
    half, _, count = stage.rpartition(":")
    write, left = StoragePath.write_blocks, int(count)

    def dying(place: StoragePath, name: str, blocks: Iterable[bytes]) -> None:
        nonlocal left
        if not left and half:
            write(place, name, half_of(b"".join(blocks)))
        if not left:
            die()
        left -= 1
        write(place, name, blocks)

    StoragePath.write_blocks = dying  # type: ignore[method-assign]
    StoreWriter(store).commit(make_case(make_spec(), failed={5}).part(1))


if __name__ == "__main__":
    commit_and_die(sys.argv[1], Path(sys.argv[2]))
