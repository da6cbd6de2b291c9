"""The one reader of pictures: what is the picture's fault, and what is the disk's."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from making import make_corpus

from eupe.common.storage import StoragePath
from eupe.corpus.pictures import Inside, read_picture
from eupe.errors import CorpusError, OutageError


def test_a_picture_is_its_files_bytes_or_a_range_of_them(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"0123456789")
    assert read_picture(StoragePath.of(tmp_path), "a.png") == b"0123456789"
    assert read_picture(StoragePath.of(tmp_path), "a.png/x", Inside("a.png", 3, 4)) == b"3456"


def test_one_that_is_gone_is_its_own_fault_all_of_them_are_the_disks(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "c", count=2)
    root = StoragePath.of(corpus)
    (corpus / "class0" / "0000.png").unlink()
    with pytest.raises(CorpusError, match="does not exist"):
        read_picture(root, "class0/0000.png")
    shutil.rmtree(corpus)
    for there in (False, True):
        if there:
            corpus.mkdir()  # as an empty mount point
        with pytest.raises(OutageError, match=r"is missing or empty on .*; mount it again"):
            read_picture(root, "class1/0001.png")
        with pytest.raises(OutageError):
            read_picture(root, "x.tar/0.png", Inside("x.tar", 0, 4))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ESTALE, OutageError),
        (errno.ETIMEDOUT, OutageError),
        (errno.EIO, CorpusError),
        (errno.EACCES, CorpusError),
    ],
)
def test_a_disk_that_is_away_is_told_from_a_bad_file(
    code: int, expected: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make_corpus(tmp_path / "c", count=1)

    def refused(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    class Refusing:
        """An object store whose reads fail with the words of tensorstore."""

        def read(self, name: str) -> Any:
            raise ValueError(f"UNKNOWN: Failed to open {name}: {os.strerror(code)} [os_error_code='{code}']")

    root = StoragePath.of(corpus)
    root.__dict__["_objects"] = Refusing()
    monkeypatch.setattr(os, "pread", refused)
    for inside in (None, Inside("class0/0000.png", 0, 4)):
        with pytest.raises(expected, match="cannot be read"):
            read_picture(root, "class0/0000.png", inside)
