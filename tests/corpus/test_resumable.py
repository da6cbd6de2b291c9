"""An index that is cut off goes on, and is in the end the one that would have been made at once."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
from containers import make_tar, png, tars_of
from making import make_corpus

from eupe.corpus.index import index_bytes, open_corpus, read_index
from eupe.corpus.resumable import UNFINISHED, make_index
from eupe.errors import CorpusError

if TYPE_CHECKING:
    from object_store import S3Server


class Stop(Exception):
    pass


def stop_after(count: int) -> Callable[[int, int], None]:
    def progress(done: int, of: int) -> None:
        if done > count:
            raise Stop

    return progress


def hashed(work: Callable[[], Any]) -> int:
    """Return the number of pictures that are hashed while `work` runs."""
    sha256, calls = hashlib.sha256, []
    with mock.patch("hashlib.sha256", lambda *data: calls.append(1) or sha256(*data)):
        work()
    return len(calls)


@pytest.mark.parametrize("tars", [True, False])
def test_what_was_hashed_before_the_end_is_not_hashed_again(tmp_path: Path, tars: bool) -> None:
    source = make_corpus(tmp_path / "p", count=24)
    source = tars_of(source, tmp_path / "s", count=6) if tars else source
    out = tmp_path / "i.parquet"
    with mock.patch("eupe.corpus.index.ROWS_AT_ONCE", 4), mock.patch("eupe.corpus.resumable.ROWS_PER_GROUP", 10):
        with pytest.raises(Stop):
            make_index(source, out, progress=stop_after(13))
        assert not out.exists() and len(list(Path(f"{out}{UNFINISHED}").iterdir())) == 3
        (Path(f"{out}{UNFINISHED}") / "000003.parquet.1f.__lock").write_bytes(b"of a writer that was killed")
        assert hashed(lambda: make_index(source, out)) == 12
        assert hashed(lambda: make_index(source, out)) == 0
    assert not Path(f"{out}{UNFINISHED}").exists()
    assert index_bytes(read_index(out)) == index_bytes(open_corpus(source))


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    for i in range(60):
        make_tar(folder / f"{i:03d}.tar", {"a.bin": bytes(2**22), "a.png": png(i)})
    out = tmp_path / "i.parquet"
    words = [sys.executable, "-m", "eupe", "index", "--corpus", str(folder), "--out", str(out)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pieces = Path(f"{out}{UNFINISHED}")
    deadline = time.monotonic() + 120
    while not pieces.is_dir() or not any(pieces.glob("*.parquet")):
        assert process.poll() is None and time.monotonic() < deadline
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    first, stat = folder / "000.tar", (folder / "000.tar").stat()
    honest = open_corpus(folder).samples
    first.write_bytes(first.read_bytes().replace(png(0), png(0)[:-1] + b"?"))
    os.utime(first, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert open_corpus(first).samples["sha256"][0] != honest["sha256"][0]
    assert subprocess.run(words, capture_output=True, check=False).returncode == 0
    assert read_index(out).samples.equals(honest), "the first tar was not read again"


def test_objects_that_were_hashed_before_the_end_stand(s3: S3Server, tmp_path: Path) -> None:
    from object_store import upload

    place = upload(make_corpus(tmp_path / "p", count=12), s3.bucket / "photos")
    out = s3.bucket / "i.parquet"
    with mock.patch("eupe.corpus.index.ROWS_AT_ONCE", 4):
        with pytest.raises(Stop):
            make_index(place, out, progress=stop_after(8))
        s3.forget()
        make_index(place, out)
    assert len(s3.served("GET", r"png$")) == 4
    assert index_bytes(read_index(out)) == index_bytes(open_corpus(place))
    assert not [name for name in s3.bucket.list() if UNFINISHED in name]


def test_the_command_tells_of_samples_without_a_picture(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    make_tar(tmp_path / "x.tar", {"a.png": png(1), "b.txt": b"lost", "c.cls": b"1"})
    outcome = run_eupe("index", "--corpus", tmp_path / "x.tar", "--out", tmp_path / "i.parquet")
    assert outcome.code == 0, outcome.err
    lonely = "label and caption files without a picture"
    assert f"left out: 2 (2 {lonely}: .cls 1, .txt 1)" in outcome.out
    assert read_index(tmp_path / "i.parquet").left_out == {f"{lonely}: .{kind}": 1 for kind in ("cls", "txt")}
    before = (tmp_path / "i.parquet").read_bytes()
    make_tar(tmp_path / "x.tar", {"b.txt": b"lost"})
    with pytest.raises(CorpusError, match="holds no picture"):
        make_index(tmp_path / "x.tar", tmp_path / "i.parquet")
    assert (tmp_path / "i.parquet").read_bytes() == before
