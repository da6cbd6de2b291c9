"""Killed workers and full disks: what was committed stands, and the same work again gives the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from store_cases import Case, as_arrays, assert_same_bits, every_view, make_case, make_spec, tree_digest, write_store

from eupe.common.storage import StoragePath
from eupe.errors import SpecMismatchError
from eupe.store import open_store
from eupe.store.reader import committed_parts
from eupe.store.writer import StoreWriter, create_store, extend_store, finish_store

HERE = Path(__file__).parent
WRITES = 9
"""Of one commit: three small arrays, four of features, the moments, the commit file."""


@pytest.mark.parametrize("stage", [*map(str, range(WRITES)), "half:4", f"half:{WRITES - 1}"])
def test_a_killed_worker_leaves_no_part_and_its_redo_the_same_bytes(
    case: Case, whole: Path, tmp_path: Path, stage: str
) -> None:
    path = tmp_path / "store.zarr"
    create_store(path, case.spec)
    StoreWriter(path).commit(case.part(0))
    died = subprocess.run([sys.executable, HERE / "commit_and_die.py", stage, path], capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    store = open_store(path)
    assert store.missing_parts() == [1, 2]
    assert store.samples["row"].to_pylist() == [0, 1, 2, 3]
    rows, views = every_view(case.spec, range(4))
    assert_same_bits(as_arrays(store.read(rows, views)), case.expected(rows, views, 32))
    assert bool(list(path.rglob("*.__lock"))) == stage.startswith("half")

    writer = StoreWriter(path)
    for part in (1, 2):
        writer.commit(case.part(part))
    assert tree_digest(finish_store(path).path) == tree_digest(whole)


class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL; what was written stays."""


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], bool]:
    """Call something and kill it after some changes of the storage; False if it made no more than that."""

    def run(count: int, call: Callable[[], object]) -> bool:
        left = count

        def dying(change: Callable[..., object]) -> Callable[..., object]:
            def changed(*arguments: object) -> object:
                nonlocal left
                if not left:
                    raise Killed
                left -= 1
                return change(*arguments)

            return changed

        with monkeypatch.context() as patch:
            for what in ("write_blocks", "create", "delete"):
                patch.setattr(StoragePath, what, dying(getattr(StoragePath, what)))
            try:
                call()
            except Killed:
                return True
        return False

    return run


Kill = Callable[[int, Callable[[], object]], bool]


SMALL = {32: 2}
"""One size is enough where the storage is stopped at every change."""


def test_a_store_whose_maker_was_killed_is_healed_by_the_next(tmp_path: Path, kill_after: Kill) -> None:
    case = make_case(make_spec(num_samples=3, grids=SMALL))
    write_store(case, tmp_path / "whole")
    count = 0
    while kill_after(count, partial(create_store, tmp_path / str(count), case.spec)):
        path = tmp_path / str(count)
        if count:
            assert open_store(path).spec == case.spec, "the root comes first"
            with pytest.raises(SpecMismatchError):
                create_store(path, make_spec(num_views=2))
        else:
            assert not path.exists()
        write_store(case, path)
        assert tree_digest(path) == tree_digest(tmp_path / "whole")
        count += 1
    assert count >= 7, "the root, a group, five arrays"


def test_a_killed_finish_leaves_the_store_unfinished_and_the_next_gives_the_same_bytes(
    tmp_path: Path, kill_after: Kill
) -> None:
    case = make_case(make_spec(num_samples=6, grids=SMALL), failed={5})
    write_store(case, tmp_path / "whole")
    create_store(tmp_path / "made", case.spec)
    writer = StoreWriter(tmp_path / "made")
    for part in range(2):
        writer.commit(case.part(part))
    finished = []
    while True:
        path = shutil.copytree(tmp_path / "made", tmp_path / str(len(finished)))
        if not kill_after(len(finished), partial(finish_store, path)):
            break
        finished.append(open_store(path).finished)
        assert tree_digest(finish_store(path).path) == tree_digest(tmp_path / "whole")
    assert finished[-2:] == [True, True] and not any(finished[:-2]), "finished where only moments are left to remove"


def test_a_killed_extension_can_be_done_again(tmp_path: Path, kill_after: Kill) -> None:
    """The kills come at every second change, from the first metadata to the last of the merged moments.

    The statistics may differ in their last bits if the old ones were lost while the new ones were written.
    """
    grown = make_case(make_spec(segments=[6, 5], grids=SMALL), failed={5})
    first = make_case(make_spec(num_samples=6, grids=SMALL), failed={5})
    for name, values in first.arrays.items():
        values[:] = grown.arrays[name][:6]

    def extend(path: Path) -> None:
        store = open_store(path)
        if len(store.spec.corpus["segments"]) == 1:
            store = extend_store(store, fingerprint="ef" * 32, num_new=5)
        writer = StoreWriter(path)
        for part in store.missing_parts():
            writer.commit(grown.part(part))
        finish_store(path)

    write_store(first, tmp_path / "first")
    extend(shutil.copytree(tmp_path / "first", tmp_path / "whole"))
    whole, expected = open_store(tmp_path / "whole"), tree_digest(tmp_path / "whole")
    old = every_view(first.spec, range(6))
    for count in range(0, 999, 2):
        path = shutil.copytree(tmp_path / "first", tmp_path / str(count))
        if not kill_after(count, partial(extend, path)):
            break
        assert_same_bits(as_arrays(open_store(path).read(*old)), first.expected(*old, 32))
        extend(path)
        got = tree_digest(path)
        assert got.keys() == expected.keys()
        assert not {name for name in expected if got[name] != expected[name] and not name.startswith("stats/")}
        for kind in ("summary", "dense"):
            ours, theirs = (store.full_stats(32, kind) for store in (open_store(path), whole))
            assert ours.count == theirs.count
            np.testing.assert_array_equal(ours.norms, theirs.norms)
            np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-12)
            np.testing.assert_allclose(ours.cov, theirs.cov, rtol=1e-12, atol=1e-12 * theirs.std.max() ** 2)
    assert count > 30


def in_namespace(folder: Path, *command: str | Path) -> list[str | Path]:
    """A command line that sees a tmpfs of 1 MiB at `folder`, in a mount namespace that ends with it."""
    script = 'mount -t tmpfs -o size=1M none "$1" && shift && exec "$@"'
    return ["unshare", "-rm", "sh", "-c", script, "sh", folder, *command]


@pytest.mark.parametrize("bytes_left", [0, 8192, 20_480, 32_768])
def test_a_full_disk_is_one_sentence_and_harms_nothing(whole: Path, tmp_path: Path, bytes_left: int) -> None:
    small, out = tmp_path / "small", tmp_path / "out.zarr"
    small.mkdir()
    if sys.platform != "linux" or subprocess.run(in_namespace(small, "true"), capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs Linux with unprivileged user namespaces")
    command = [sys.executable, HERE / "commit_on_full_disk.py", small, str(bytes_left), out]
    ran = subprocess.run(in_namespace(small, *command), capture_output=True, text=True, env=dict(os.environ))
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout)
    assert seen["error"].startswith(f"no space left while writing {small}/store.zarr; ")
    assert "\n" not in seen["error"] and "run the same command again" in seen["error"]
    assert (seen["committed"], seen["visible"], seen["finished"]) == ([0], ["00000.parquet"], True)
    assert committed_parts(StoragePath.of(out)) == [0, 1, 2]
    assert tree_digest(out) == tree_digest(whole)
