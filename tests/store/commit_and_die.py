"""Run in a process of its own: commit part 1 of the shared case and die by SIGKILL at a given stage."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import IO, Any, NoReturn

from store_cases import make_case, make_spec

from eupe.store import writer


def die(*_: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


class Dying:
    """An array whose write is where it ends; those before it are on disk."""

    def __getitem__(self, rows: slice) -> Dying:
        return self

    write = die


def write_half(table: object, file: IO[bytes], **options: object) -> None:
    file.write(b"PAR1 half a file")
    file.flush()
    die()


def commit_and_die(stage: str, store: Path) -> None:
    store_writer = writer.StoreWriter(store)
    if stage == "between-arrays":
        finished = store_writer._arrays["boxes"]
        part = make_case(make_spec(), failed={5}).part(1)
        finished[4:8].write(part.boxes).result()
        (store / "flips/c/1").mkdir(parents=True)
        (store / "flips/c/1/0.__lock").write_bytes(b"half a chunk")
        store_writer._arrays["flips"] = Dying()
    elif stage == "before-commit-file":
        writer.StoreWriter._commit_rows = die  # type: ignore[method-assign]
    elif stage == "within-commit-file":
        writer.pq.write_table = write_half
    elif stage == "before-rename":
        Path.replace = die  # type: ignore[method-assign]
    store_writer.commit(make_case(make_spec(), failed={5}).part(1))


if __name__ == "__main__":
    commit_and_die(sys.argv[1], Path(sys.argv[2]))
