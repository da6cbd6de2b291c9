"""Run in a namespace of its own, where a small tmpfs is mounted at FOLDER: fill it up, commit, make room, go on.

    python commit_on_full_disk.py FOLDER BYTES_LEFT OUT

prints what was seen as JSON and copies the finished store to OUT, out of the tmpfs.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from store_cases import as_arrays, assert_same_bits, every_view, make_case, make_spec

from eupe.common.storage import StoragePath
from eupe.errors import StorageError
from eupe.store import open_store
from eupe.store.reader import committed_parts
from eupe.store.writer import StoreWriter, create_store, finish_store


def commit_on_full_disk(folder: Path, bytes_left: int, out: Path) -> dict[str, object]:
    case = make_case(make_spec(), failed={5})
    path, filler = folder / "store.zarr", folder / "filler"
    create_store(path, case.spec)
    writer = StoreWriter(path)
    writer.commit(case.part(0))
    free = os.statvfs(folder)
    filler.write_bytes(bytes(free.f_bavail * free.f_bsize - bytes_left))
    seen: dict[str, object] = {}
    try:
        writer.commit(case.part(1))
    except StorageError as error:
        seen["error"] = str(error)
    seen["committed"] = committed_parts(StoragePath.of(path))
    seen["visible"] = sorted(file.name for file in (path / "parts").glob("*.parquet"))
    rows, views = every_view(case.spec, range(4))
    assert_same_bits(as_arrays(open_store(path).read(rows, views)), case.expected(rows, views, 32))
    filler.unlink()
    writer.commit(case.part(1))
    writer.commit(case.part(2))
    seen["finished"] = finish_store(path).finished
    shutil.copytree(path, out)
    return seen


if __name__ == "__main__":
    print(json.dumps(commit_on_full_disk(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
