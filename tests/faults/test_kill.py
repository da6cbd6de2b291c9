"""Kill what can be killed in mid-part; the finished store is that of an undisturbed run, byte for byte."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import descendants
from running import (
    assert_same_store,
    begin,
    committed,
    extract_workers,
    finish,
    store_files,
    wait_until,
    wait_until_gone,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PARTS = 8
Start = Callable[[Path], "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def words(many_pictures: Path, tiny_weights: Path) -> list[object]:
    """An extraction of `PARTS` parts."""
    words: list[object] = ["extract", "--teacher", "timm:test_vit", "--weights", tiny_weights]
    words += ["--corpus", many_pictures, "--views", "rrc:32", "--size", 64, "--dtype", "fp32", "--batch-size", 4]
    return words


@pytest.fixture(scope="module")
def start(words: list[object]) -> Start:
    """Begin the extraction in a process of its own, which is the leader of all of its processes, as a user's is."""
    return lambda out: begin(*words, "--out", out)


@pytest.fixture(scope="module")
def again(words: list[object], warm_python: str) -> Start:
    """Begin the same extraction where nothing is to be killed."""
    return lambda out: begin(*words, "--out", out, program=warm_python)


@pytest.fixture(scope="module")
def undisturbed(again: Start, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "s.zarr"
    code, output = finish(again(out))
    assert code == 0, output
    assert committed(out) == PARTS
    return store_files(out)


def parts(out: Path) -> dict[Path, int]:
    """The commit files, and when each was written."""
    return {file: file.stat().st_mtime_ns for file in out.glob("parts/[0-9]*.parquet")}


def test_a_killed_worker_is_replaced_and_after_a_killed_driver_only_the_missing_parts_are_done(
    start: Start, again: Start, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out = tmp_path / "s.zarr"
    process = start(out)
    wait_until(lambda: committed(out) >= 1, process)
    victims = extract_workers(process.pid)
    assert len(victims) == 1
    before = parts(out)
    os.kill(victims[0], signal.SIGKILL)
    wait_until(lambda: committed(out) > len(before), process)
    assert extract_workers(process.pid) != victims, "another works in its place"
    tree = list(descendants(process.pid))
    process.kill()
    process.wait()
    wait_until_gone(tree)
    whole = parts(out)
    assert before.items() <= whole.items()
    assert 2 <= len(whole) < len([name for name in undisturbed if name.startswith("parts/")])
    code, output = finish(again(out))
    assert code == 0, output
    assert_same_store(out, undisturbed)
    assert whole.items() <= parts(out).items()


def test_sigterm_and_ctrl_c_keep_what_is_whole_and_say_how_to_go_on(
    start: Start, again: Start, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """One worker has two parts under way, which SIGTERM lets be committed, and no other is begun."""
    out = tmp_path / "s.zarr"
    process = again(out)
    wait_until(lambda: committed(out) >= 1, process)
    process.terminate()
    code, output = finish(process)
    assert code == 1, output
    first = parts(out)
    assert 2 <= len(first) <= PARTS - 3
    assert f"stopped: {len(first)} of {PARTS} parts" in " ".join(output.split()) and "Traceback" not in output
    assert not list(out.rglob("*.__lock")), "nothing is left half-written"

    process = start(out)
    wait_until(lambda: committed(out) > len(first), process)
    os.killpg(process.pid, signal.SIGINT)
    code, output = finish(process)
    assert code == 1, output
    assert "run the same command again" in " ".join(output.split())
    assert "Traceback" not in output
    assert len(first) < committed(out) < PARTS

    code, output = finish(again(out))
    assert code == 0, output
    assert_same_store(out, undisturbed)
    assert first.items() <= parts(out).items()
