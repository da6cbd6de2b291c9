"""Files are on the disk before they take their names, and these are, too; a failure leaves what was there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from eupe.common.files import UNFINISHED, publish, replacing, write_file

Steps = list[tuple[str, str]]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """Record what is flushed and renamed, in order."""
    done: Steps = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def noted(verb: str, real: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def call(source: Path, target: Path) -> Path:
            done.append((verb, target.name))
            return real(source, target)

        return call

    def flush(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        done.append(("flush", "unfinished" if name.endswith(UNFINISHED) else name))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "replace", noted("name", replace))
    monkeypatch.setattr(Path, "rename", noted("name", rename))
    return done


def test_a_file_is_flushed_before_it_takes_its_name_and_the_name_is_flushed_after(tmp_path: Path, steps: Steps) -> None:
    write_file(tmp_path / "folder" / "x.json", "12")
    assert steps == [("flush", "unfinished"), ("name", "x.json"), ("flush", "folder")]
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["x.json"]
    assert (tmp_path / "folder" / "x.json").read_text() == "12"


def test_a_folder_is_flushed_with_all_that_it_holds_before_it_takes_its_name(tmp_path: Path, steps: Steps) -> None:
    (tmp_path / "making" / "below").mkdir(parents=True)
    (tmp_path / "making" / "below" / "a").write_text("1")
    (tmp_path / "making" / "b").write_text("2")
    publish(tmp_path / "making", tmp_path / "made")
    assert sorted(steps[:3]) == [("flush", "a"), ("flush", "b"), ("flush", "below")]
    assert steps[3:] == [("flush", "making"), ("name", "made"), ("flush", tmp_path.name)]
    assert (tmp_path / "made" / "below" / "a").read_text() == "1"


def test_a_library_that_puts_another_file_in_place_of_the_unfinished_one_has_that_flushed(tmp_path: Path) -> None:
    with replacing(tmp_path / "x") as unfinished:
        (tmp_path / "other").write_text("its own")
        (tmp_path / "other").replace(unfinished)
    assert (tmp_path / "x").read_text() == "its own"
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def full(data: bytes) -> Iterator[bytes]:
    yield data
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path: Path, before: bytes | None) -> None:
    if before is not None:
        (tmp_path / "x").write_bytes(before)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "x", full(b"new"))
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([] if before is None else [before])
