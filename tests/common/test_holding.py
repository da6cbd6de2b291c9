"""One writer to a place: real processes with real locks, and leases in a real S3 server."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from making import TINY_STUDENT, make_store
from object_store import S3Server

from eupe.common import holding
from eupe.common.holding import LEASE, Holder
from eupe.common.locks import LOCK
from eupe.common.storage import StoragePath
from eupe.errors import ConfigError, IncompleteError
from eupe.store import Store

HOLD = """
import sys
from pathlib import Path
from eupe.common.holding import Holder
from eupe.common.locks import lock_file
from eupe.common.storage import StoragePath

verb, place = sys.argv[1:]
with Holder(verb) as holder:
    if verb == "run":
        lock_file(Path(place) / ".lock", verb=verb, of=place)
    else:
        holder.hold(StoragePath.of(place))
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(place: Path | StoragePath, verb: str = "train") -> Iterator[subprocess.Popen[str]]:
    """Have another process hold a place."""
    words = [sys.executable, "-c", HOLD, verb, str(place)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_is_told_who_holds_it_since_when(tmp_path: Path) -> None:
    with held(tmp_path, "store repair") as other, Holder("extract") as holder, pytest.raises(ConfigError) as refusal:
        holder.hold(StoragePath.of(tmp_path))
    said = f"{tmp_path} is being written by `eupe store repair`, process {other.pid} on {socket.gethostname()}, since "
    assert re.match(re.escape(said) + r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d .*; wait until it ends", str(refusal.value))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, None])
def test_a_lock_ends_with_its_process(tmp_path: Path, number: signal.Signals | None) -> None:
    with held(tmp_path) as other:
        if number is None:
            other.communicate()
        else:
            other.send_signal(number)
            other.wait()
        with Holder("train") as holder:
            holder.hold(StoragePath.of(tmp_path))
            assert (tmp_path / LOCK).exists()
    assert list(tmp_path.iterdir()) == []


def test_a_place_is_held_once_by_whatever_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with Holder("train") as holder:
        for name in ("a", "b", "a"):
            holder.hold(StoragePath.of(tmp_path / name))
        with Holder("train") as second, pytest.raises(ConfigError, match="is being written by"):
            second.hold(StoragePath.of(tmp_path / "b"))
    assert list((tmp_path / "a").iterdir()) == []


def test_a_folder_that_was_not_there_is_gone_again_if_nothing_came_of_it(tmp_path: Path) -> None:
    with Holder("train") as holder:
        holder.hold(StoragePath.of(tmp_path / "made" / "deep"))
        holder.hold(StoragePath.of(tmp_path / "filled"))
        (tmp_path / "filled" / "x").touch()
    assert not (tmp_path / "made" / "deep").exists()
    assert [file.name for file in (tmp_path / "filled").iterdir()] == ["x"]


def test_one_that_comes_while_the_lock_is_being_given_up_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has opened the file that the other removes then."""
    opened: list[int] = []
    real = os.open

    def open_late(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        descriptor = real(path, flags, mode, **more)
        if not opened and str(path).endswith(LOCK):
            opened.append(descriptor)
            Path(path).unlink()
        return descriptor

    monkeypatch.setattr(os, "open", open_late)
    with Holder("train") as holder:
        holder.hold(StoragePath.of(tmp_path))
        assert opened and (tmp_path / LOCK).exists()
        with held_is_refused(tmp_path):
            pass


@pytest.mark.parametrize("foreign", ["link", "file"])
def test_a_lock_never_empties_what_somebody_else_made(tmp_path: Path, foreign: str) -> None:
    """A downloaded store may hold such a lock; to take a lock empties its file."""
    theirs = tmp_path / LOCK if foreign == "file" else tmp_path / "victim"
    theirs.write_text("theirs")
    if foreign == "link":
        (tmp_path / LOCK).symlink_to(theirs)
    with Holder("store repair") as holder, pytest.raises(ConfigError, match=r"is a link|was not written by eupe"):
        holder.hold(StoragePath.of(tmp_path))
    assert theirs.read_text() == "theirs"


@contextmanager
def held_is_refused(place: Path) -> Iterator[None]:
    with Holder("extract") as second, pytest.raises(ConfigError, match="is being written by `eupe train`"):
        second.hold(StoragePath.of(place))
    yield


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(holding, "PATIENCE_SECONDS", 1.0)


@pytest.mark.usefixtures("impatient")
def test_a_lease_in_a_bucket_is_renewed_and_given_up(s3: S3Server) -> None:
    place = s3.bucket / "x.zarr"
    with Holder("extract") as first:
        first.hold(place)
        time.sleep(1.5)
        with (
            Holder("store repair") as second,
            pytest.raises(ConfigError, match=f"`eupe extract`, process {os.getpid()}"),
        ):
            second.hold(place)
        first.require_held()
    assert not place.exists(LEASE)
    with Holder("store repair") as second:
        second.hold(place)


@pytest.mark.usefixtures("impatient")
def test_a_lease_whose_holder_was_killed_is_taken_over(s3: S3Server) -> None:
    place = s3.bucket / "x.zarr"
    with held(place, "extract") as other:
        other.kill()
        other.wait()
        assert place.exists(LEASE)
        with Holder("extract") as second:
            second.hold(place)
            second.require_held()
    assert not place.exists(LEASE)


@pytest.mark.usefixtures("impatient")
def test_one_whose_lease_was_taken_over_is_told_and_leaves_it(s3: S3Server) -> None:
    place = s3.bucket / "x.zarr"
    with Holder("extract") as first:
        first.hold(place)
        place.write(LEASE, b'{"verb": "extract", "process": 1, "host": "other", "since": "now", "holder": "another"}')
        time.sleep(1.0)
        with pytest.raises(IncompleteError, match="another process now writes to s3://"):
            first.require_held()
    assert b"another" in place.read(LEASE)


@pytest.mark.parametrize("verb", ["train", "extract", "store repair", "store convert", "run"])
def test_every_verb_that_writes_respects_it(
    verb: str, tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, tiny_store: Store, run_eupe: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    train = ["train", "--targets", tiny_store.path, "--student", TINY_STUDENT, "--steps", 2, "--batch-size", 8]
    extract = ["extract", "--teacher", "timm:test_vit", "--weights", tiny_weights, "--corpus", tiny_corpus]
    (tmp_path / "r.yaml").write_text(f"out: {out}\nsteps:\n  s: {{store stats: {{path: {tiny_store.path}}}}}\n")
    words = {
        "train": [*train, "--holdout", 0.3, "--out", out],
        "extract": [*extract, "--size", 64, "--out", out],
        "store repair": ["store", "repair", out],
        "store convert": ["store", "convert", tiny_store.path, "--precision", "int8", "--out", out],
        "run": ["run", tmp_path / "r.yaml"],
    }[verb]
    if verb == "store repair":
        make_store(out, tiny_corpus, tiny_weights)
    (out).mkdir(exist_ok=True)
    with held(out, verb) as other:
        before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
        outcome = run_eupe(*words)
        assert outcome.code == 2, outcome.err
        assert f"is being written by `eupe {verb}`, process {other.pid} on" in outcome.err
        assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
