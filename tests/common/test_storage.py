"""Objects in a local folder: whole or not at all, made once, listed, refused. Buckets: see `test_object_store.py`."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eupe.common.files import UNFINISHED, remove_unfinished
from eupe.common.storage import StoragePath, storage_error
from eupe.errors import ConfigError, StorageError


@pytest.fixture
def place(tmp_path: Path) -> StoragePath:
    return StoragePath.of(tmp_path / "objects")


# Names of places


@pytest.mark.parametrize(
    ("typed", "url", "name"),
    [
        ("/data/store.zarr", "/data/store.zarr", "store.zarr"),
        ("/data/store.zarr/", "/data/store.zarr", "store.zarr"),
        (Path("/data/ü b.zarr"), "/data/ü b.zarr", "ü b.zarr"),
        ("file:///data/store.zarr", "/data/store.zarr", "store.zarr"),
        ("s3://bucket/path/store.zarr", "s3://bucket/path/store.zarr", "store.zarr"),
        ("s3://bucket/path/store.zarr/", "s3://bucket/path/store.zarr", "store.zarr"),
        ("gs://bucket/store.zarr", "gs://bucket/store.zarr", "store.zarr"),
        ("gs://bucket", "gs://bucket", "bucket"),
    ],
)
def test_what_a_user_types_is_a_place(typed: str | Path, url: str, name: str) -> None:
    place = StoragePath.of(typed)
    assert (str(place), place.name) == (url, name)
    assert StoragePath.of(place) is place
    assert place.is_local == url.startswith("/")
    assert str(place / "parts/00000.parquet") == f"{url}/parts/00000.parquet"


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = StoragePath.of("store.zarr")
    monkeypatch.chdir("/")
    assert place.local == tmp_path / "store.zarr"


def test_two_dots_lead_up_from_where_a_link_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path with `..` after a link means what it means to the system; its objects can be written, listed and read."""
    (tmp_path / "disk" / "here").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "here")
    monkeypatch.chdir(tmp_path / "link")
    for typed in ("../store.zarr", tmp_path / "link" / ".." / "store.zarr", f"file://{tmp_path}/link/../store.zarr"):
        place = StoragePath.of(typed)
        assert place.local == tmp_path / "disk" / "store.zarr"
        place.write("a/b", b"1")
        assert (place.list(), place.read("a/b")) == (["a/b"], b"1")
    assert StoragePath.of(tmp_path / "link" / "x").local == tmp_path / "link" / "x", (
        "a link stays where nothing leads up"
    )


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("http://bucket/x", "http:// is not supported; give a local path, s3://... or gs://..."),
        ("S3://bucket/x", "S3:// is not supported"),
        ("s3://", "names no bucket; give s3://BUCKET/PATH"),
        ("gs:///", "names no bucket; give gs://BUCKET/PATH"),
    ],
)
def test_a_place_that_cannot_be_is_one_sentence(typed: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        StoragePath.of(typed)
    assert typed in str(refused.value) and sentence in str(refused.value) and "\n" not in str(refused.value)


AWS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")


@pytest.mark.parametrize(
    ("environment", "settings"),
    [
        ({}, {}),
        ({"AWS_REGION": "eu-west-1"}, {"aws_region": "eu-west-1"}),
        ({"AWS_DEFAULT_REGION": "eu-west-1"}, {"aws_region": "eu-west-1"}),
        ({"AWS_ENDPOINT_URL": "http://a:9"}, {"endpoint": "http://a:9", "aws_region": "us-east-1"}),
        (
            {"AWS_ENDPOINT_URL": "http://a:9", "AWS_ENDPOINT_URL_S3": "http://b:9", "AWS_REGION": "x"},
            {"endpoint": "http://b:9", "aws_region": "x"},
        ),
    ],
)
def test_the_environment_names_the_server(
    environment: dict[str, str], settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in AWS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3, gs = (
        {name: value for name, value in StoragePath.of(url).spec().items() if not name.endswith("_request_retries")}
        for url in ("s3://bucket/a/store.zarr", "gs://bucket")
    )
    assert s3 == {"driver": "s3", "bucket": "bucket", "path": "a/store.zarr/", **settings}
    assert gs == {"driver": "gcs", "bucket": "bucket", "path": ""}


# Objects


def test_an_object_is_read_as_it_was_written_last(place: StoragePath) -> None:
    for data in (b"", b"first", bytes(range(256)) * 999, b"second"):
        place.write("a/b/c", data)
        assert place.read("a/b/c") == data
        assert (place.local / "a/b/c").read_bytes() == data
    assert place.exists("a/b/c") and not place.exists("a/b") and not place.exists("a/b/c/d")


def test_what_is_not_there_is_missing(place: StoragePath) -> None:
    place.write("a/b", b"1")
    for name in ("b", "a", "a/bb", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=f"{place}/{name} does not exist"):
            place.read(name)
        assert not place.exists(name)
    assert StoragePath.of(place.local / "nowhere").list() == []


def test_an_object_is_made_once(place: StoragePath) -> None:
    assert place.create("zarr.json", b"mine")
    assert not place.create("zarr.json", b"yours")
    assert place.read("zarr.json") == b"mine"
    place.delete("zarr.json")
    assert place.create("zarr.json", b"yours")


def test_of_many_that_create_at_once_one_succeeds(place: StoragePath) -> None:
    """Each through a handle of its own, as processes have."""
    for attempt in range(20):
        barrier, made = threading.Barrier(8), []

        def create(i: int, name: str, barrier: threading.Barrier, made: list[int]) -> None:
            own = StoragePath(place.url)
            barrier.wait()
            if own.create(name, str(i).encode()):
                made.append(i)

        arguments = [(i, f"{attempt}.json", barrier, made) for i in range(8)]
        threads = [threading.Thread(target=create, args=a) for a in arguments]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [place.read(f"{attempt}.json")] == [str(i).encode() for i in made]


def test_of_many_processes_that_create_at_once_one_succeeds(place: StoragePath) -> None:
    script = (
        "import sys; from eupe.common.storage import StoragePath; "
        "print(int(StoragePath.of(sys.argv[1]).create('x', sys.argv[2].encode())))"
    )
    command = [sys.executable, "-c", script, str(place)]
    running = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(4)]
    made = [process.communicate()[0].strip() for process in running]
    assert sorted(made) == ["0", "0", "0", "1"]
    assert place.read("x") == str(made.index("1")).encode()


def test_a_reader_sees_the_old_bytes_or_the_new(place: StoragePath) -> None:
    """Never some of each, nor a file that is still growing."""
    versions = {bytes([i]) * 200_000 for i in range(4)}
    place.write("object", next(iter(versions)))
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for data in versions:
                place.write("object", data)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = {(place.local / "object").read_bytes() for _ in range(300)}
    finally:
        stop.set()
        writer.join()
    assert seen <= versions


def test_an_object_is_written_as_its_pieces_come(place: StoragePath) -> None:
    """The old one stands until the last has come, and nothing is listed of the new."""
    place.write("a/object", b"old")

    def pieces() -> Iterator[bytes]:
        for piece in (b"one", b"", b"two" * 100_000):
            yield piece
            assert place.read("a/object") == b"old" and place.list() == ["a/object"]

    place.write_blocks("a/object", pieces())
    assert place.read("a/object") == b"one" + b"two" * 100_000
    assert [file.name for file in (place.local / "a").iterdir()] == ["object"]


def test_pieces_that_fail_leave_what_was_there(place: StoragePath) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"new" * 100_000
        raise ZeroDivisionError

    place.write("a/object", b"old")
    for name in ("a/object", "a/another"):
        with pytest.raises(ZeroDivisionError):
            place.write_blocks(name, pieces())
    assert place.read("a/object") == b"old"
    assert [file.name for file in (place.local / "a").iterdir()] == ["object"]


def test_only_what_dead_writers_left_is_removed(place: StoragePath) -> None:
    """A living one goes on, and its object is whole."""

    def pieces() -> Iterator[bytes]:
        yield b"one"
        (place.local / "a" / f"b.0123{UNFINISHED}").write_bytes(b"dead")
        assert len(list((place.local / "a").iterdir())) == 2
        remove_unfinished(place.local)
        assert len(list((place.local / "a").iterdir())) == 1
        yield b"two"

    place.write_blocks("a/object", pieces())
    assert place.read("a/object") == b"onetwo" and place.list() == ["a/object"]


@given(
    names=st.sets(
        st.lists(st.text("abc.-9é~", min_size=1, max_size=3), min_size=1, max_size=3)
        .filter(lambda words: not {".", ".."} & set(words))
        .map("/".join),
        max_size=8,
    ),
    prefix=st.text("abc.-9é~/", max_size=3).filter(lambda text: not {"", ".", ".."} & set(text.split("/")[:-1])),
)
def test_list_gives_the_names_that_begin_so(
    tmp_path_factory: pytest.TempPathFactory, names: set[str], prefix: str
) -> None:
    place = StoragePath.of(tmp_path_factory.mktemp("list"))
    names = {name for name in names if not any(other.startswith(f"{name}/") for other in names)}
    for name in names:
        place.write(name, b"")
    assert place.list(prefix) == sorted(name for name in names if name.startswith(prefix))
    assert all(place.exists(name) for name in names)


def test_lock_files_of_killed_writers_are_no_objects_and_stop_nobody(place: StoragePath) -> None:
    place.local.mkdir()
    (place.local / "object.__lock").write_bytes(b"half")
    assert place.list() == []
    assert place.create("object", b"whole")
    assert (place.list(), place.read("object")) == (["object"], b"whole")


def test_delete_leaves_the_others(place: StoragePath) -> None:
    for name in ("a", "b/c"):
        place.write(name, b"1")
    place.delete("a")
    place.delete("a")
    place.delete("never")
    assert place.list() == ["b/c"]


def test_a_place_travels_to_another_process(place: StoragePath) -> None:
    place.write("a", b"1")
    again = pickle.loads(pickle.dumps(place))
    assert again == place and hash(again) == hash(place)
    assert again.read("a") == b"1"


# What the storage refuses


@pytest.mark.parametrize("what", ["write", "create", "delete"])
def test_a_refused_write_is_one_sentence(tmp_path: Path, what: str) -> None:
    """A file stands where the folder would be; permissions say nothing to root."""
    (tmp_path / "file").write_text("years of work")
    place = StoragePath.of(tmp_path / "file")
    call: Callable[..., object] = getattr(place, what)
    with pytest.raises(StorageError, match=rf"^{place} cannot be written: .*(Not a directory|File exists)") as refused:
        call("object", *([] if what == "delete" else [b"1"]))
    assert "\n" not in str(refused.value)
    assert (tmp_path / "file").read_text() == "years of work"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="cannot be written"):
        StoragePath.of(tmp_path).write("object", b"1")


def test_what_cannot_be_read_or_listed_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("years of work")
    with pytest.raises(StorageError, match="file/ cannot be listed"):
        StoragePath.of(tmp_path / "file").list()
    with pytest.raises(StorageError, match="cannot be read"):
        StoragePath.of(tmp_path).read("../outside")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        OSError(27, "File too large"),
        ValueError("RESOURCE_EXHAUSTED: Failed to write"),
        ValueError("Error: No space left on device [os_error_code='28']"),
        ValueError("UNAVAILABLE: quota exceeded"),
    ],
)
def test_a_full_disk_says_what_to_do(error: Exception) -> None:
    sentence = str(storage_error(error, StoragePath.of("s3://bucket/store.zarr")))
    assert sentence.startswith("no space left while writing s3://bucket/store.zarr; ")
    assert "free some space and run the same command again" in sentence


def test_another_error_is_told_as_it_is() -> None:
    error = storage_error(ValueError("PERMISSION_DENIED: no"), Path("/data/x"))
    assert str(error) == "/data/x cannot be written: PERMISSION_DENIED: no"
