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

Start = Callable[[Path], "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def words(many_pictures: Path, tiny_weights: Path) -> list[object]:
    """An extraction of four parts."""
    words: list[object] = ["extract", "--teacher", "timm:test_vit", "--weights", tiny_weights]
    words += ["--corpus", many_pictures, "--views", "rrc:16", "--size", 64, "--dtype", "fp32", "--batch-size", 4]
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
    assert committed(out) == 4
    return store_files(out)


def assert_goes_on_to(again: Start, out: Path, expected: dict[str, bytes]) -> None:
    """The same command again ends in the same bytes."""
    code, output = finish(again(out))
    assert code == 0, output
    assert_same_store(out, expected)


def test_a_killed_worker_is_replaced_and_its_part_done_again(
    start: Start, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    process = start(tmp_path / "s.zarr")
    wait_until(lambda: committed(tmp_path / "s.zarr") >= 1, process)
    victims = extract_workers(process.pid)
    assert len(victims) == 1
    os.kill(victims[0], signal.SIGKILL)
    code, output = finish(process)
    assert code == 0, output
    assert_same_store(tmp_path / "s.zarr", undisturbed)


def test_after_a_killed_driver_only_the_missing_parts_are_done(
    start: Start, again: Start, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out = tmp_path / "s.zarr"
    process = start(out)
    wait_until(lambda: committed(out) >= 1, process)
    tree = list(descendants(process.pid))
    process.kill()
    process.wait()
    wait_until_gone(tree)
    whole = {file: file.stat().st_mtime_ns for file in out.glob("parts/[0-9]*.parquet")}
    assert 1 <= len(whole) < len([name for name in undisturbed if name.startswith("parts/")])
    assert_goes_on_to(again, out, undisturbed)
    assert {file: file.stat().st_mtime_ns for file in whole} == whole


def test_ctrl_c_keeps_what_is_whole_and_says_how_to_go_on(
    start: Start, again: Start, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out = tmp_path / "s.zarr"
    process = start(out)
    wait_until(lambda: committed(out) >= 1, process)
    os.killpg(process.pid, signal.SIGINT)
    code, output = finish(process)
    assert code == 1, output
    assert "run the same command again" in " ".join(output.split())
    assert "Traceback" not in output
    assert committed(out) >= 1
    assert_goes_on_to(again, out, undisturbed)


def test_sigterm_commits_what_is_under_way_and_leaves(
    start: Start, again: Start, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """One worker has two parts under way: with the first committed and a third begun, the fourth is left."""
    out = tmp_path / "s.zarr"
    process = start(out)
    wait_until(lambda: committed(out) >= 1, process)
    process.terminate()
    code, output = finish(process)
    assert code == 1, output
    done = committed(out)
    assert 2 <= done <= 3
    assert f"stopped: {done} of 4 parts" in " ".join(output.split()) and "Traceback" not in output
    assert not list(out.rglob("*.__lock")), "nothing is left half-written"
    assert_goes_on_to(again, out, undisturbed)
