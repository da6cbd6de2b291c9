"""Killed workers and full disks: what was committed stands, and the same work again gives the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from store_cases import Case, as_arrays, assert_same_bits, every_view, tree_digest

from eupe.store import open_store
from eupe.store.reader import committed_parts
from eupe.store.writer import StoreWriter, create_store, finish_store

HERE = Path(__file__).parent


@pytest.mark.parametrize("stage", ["between-arrays", "before-commit-file", "within-commit-file", "before-rename"])
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
    leftovers = [*path.glob("parts/.*.tmp"), *path.rglob("*.__lock")]
    assert bool(leftovers) == (stage != "before-commit-file")

    writer = StoreWriter(path)
    for part in (1, 2):
        writer.commit(case.part(part))
    assert tree_digest(finish_store(path).path) == tree_digest(whole)


def test_a_killed_finish_leaves_the_store_unfinished(whole: Path, copy: Path) -> None:
    """Half-written statistics stand under a temporary name, which the next finish removes."""
    (copy / "stats").rename(copy / ".stats.gone-1.tmp")
    assert not open_store(copy).finished
    assert tree_digest(finish_store(copy).path) == tree_digest(whole)


def in_namespace(folder: Path, *command: str | Path) -> list[str | Path]:
    """A command line that sees a tmpfs of 1 MiB at `folder`, in a mount namespace that ends with it."""
    script = 'mount -t tmpfs -o size=1M none "$1" && shift && exec "$@"'
    return ["unshare", "-rm", "sh", "-c", script, "sh", folder, *command]


@pytest.mark.parametrize("bytes_left", [0, 8192, 20_480])
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
    assert committed_parts(out) == [0, 1, 2]
    assert tree_digest(out) == tree_digest(whole)
