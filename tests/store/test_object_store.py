"""Stores and pictures in a bucket of a real S3 server: what is asked of it, in which order, and what if it fails."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from making import make_corpus
from object_store import Asked, S3Server, objects, upload
from store_cases import Case, as_arrays, assert_same_bits, every_view, make_case, make_spec, write_store

from eupe.common.storage import READS_AT_ONCE, StoragePath
from eupe.corpus.index import index_folder, open_corpus, write_index
from eupe.corpus.pictures import read_picture
from eupe.corpus.views import ViewSpec
from eupe.errors import ConfigError, CorpusError, PartCorruptError, StorageError, StoreError
from eupe.extract.load import Sample, load_sample
from eupe.store import open_store
from eupe.store.reader import committed_parts

ONE_RETRY = {"max_retries": 1, "initial_delay": "10ms", "max_delay": "10ms"}
MISSING = "http://127.0.0.1:9"
"""Nobody listens at the discard port."""

Run = Callable[..., Any]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eupe.common.storage.RETRIES", ONE_RETRY)


@pytest.fixture(scope="module")
def heavy() -> Case:
    """Two parts of 16 samples in two views; a dense map takes 16 KB, a shard half a megabyte."""
    spec = make_spec(num_samples=32, num_views=2, samples_per_part=16, grids={32: 8}, summary_dim=64, dense_dim=128)
    return make_case(spec)


# Objects


def test_objects_are_written_read_listed_and_deleted(s3: S3Server) -> None:
    place = s3.bucket / "a folder"
    names = ["zarr.json", "c/0/0", "ü ñ.png", "a b+c&d=e?f#g%41.jpg", "a'(b)!*~;:@,$.jpg", "a//b", "😀"]
    for name in names:
        place.write(name, name.encode())
    place.write("empty", b"")
    assert place.list() == sorted([*names, "empty"])
    assert place.list("c/") == ["c/0/0"]
    assert objects(place) == {name: name.encode() for name in names} | {"empty": b""}
    assert all(place.exists(name) for name in [*names, "empty"])
    assert not place.exists("zarr") and not place.exists("c") and not place.exists("c/0")
    place.write("c/0/0", b"anew")
    assert place.read("c/0/0") == b"anew"
    place.delete("c/0/0")
    place.delete("c/0/0")
    with pytest.raises(FileNotFoundError, match=f"{place}/c/0/0 does not exist"):
        place.read("c/0/0")


def test_of_many_that_create_at_once_one_succeeds(s3: S3Server) -> None:
    for attempt in range(5):
        barrier = threading.Barrier(8)

        def create(i: int, name: str = f"{attempt}.json", barrier: threading.Barrier = barrier) -> bool:
            own = StoragePath(s3.bucket.url)
            barrier.wait()
            return own.create(name, str(i).encode())

        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(create, range(8)))
        assert sum(made) == 1
        assert s3.bucket.read(f"{attempt}.json") == str(made.index(True)).encode()


def test_whether_an_object_exists_is_one_request_however_many_names_begin_alike(s3: S3Server) -> None:
    for i in range(1100):
        s3.put_quickly(f"many/{i}", b"")
    s3.forget()
    assert not s3.bucket.exists("many")
    assert len(s3.asked) == 1
    s3.forget()
    assert len(s3.bucket.list("many")) == 1100
    assert len(s3.asked) == 2


def test_google_storage_is_named_as_tensorstore_names_it() -> None:
    spec = StoragePath.of("gs://bucket/a/store.zarr").spec()
    assert (spec["driver"], spec["bucket"], spec["path"]) == ("gcs", "bucket", "a/store.zarr/")
    assert "gcs_request_retries" in spec and "endpoint" not in spec


def test_a_path_made_of_a_url_is_the_url() -> None:
    assert StoragePath.of(Path("s3://bucket/store.zarr")).url == "s3://bucket/store.zarr"


def test_a_bucket_lies_in_nothing() -> None:
    assert str(StoragePath.of("s3://bucket/i.parquet").parent) == "s3://bucket"
    with pytest.raises(ConfigError, match="is a bucket; give a path in it"):
        _ = StoragePath.of("s3://i.parquet").parent


# Stores


def test_a_bucket_holds_the_same_bytes_as_a_folder(s3: S3Server, case: Case, whole: Path) -> None:
    store = write_store(case, s3.bucket / "s.zarr")
    assert objects(store.path) == objects(StoragePath.of(whole))
    opened = open_store(str(s3.bucket / "s.zarr"))
    assert opened.finished
    for size in case.spec.sizes:
        rows, views = every_view(case.spec, range(case.spec.num_samples))
        assert_same_bits(as_arrays(opened.read(rows, views, size=size)), case.expected(rows, views, size))


def test_a_part_is_committed_by_one_put_that_comes_last(s3: S3Server, case: Case) -> None:
    write_store(case, s3.bucket / "s.zarr")
    puts = [asked.key for asked in s3.served("PUT")]
    assert {asked.method for asked in s3.asked} <= {"GET", "HEAD", "PUT", "DELETE"}
    for part in range(case.spec.num_parts):
        of_part = [key for key in puts if re.search(rf"^(?!.*/stats/).*(/c/{part}/|/{part:05d}\.)", key)]
        assert of_part[-1] == f"s.zarr/parts/{part:05d}.parquet"
        assert len(set(of_part)) == len(of_part) == 3 + len(case.features) + 2
    statistics = [key for key in puts if "/stats/" in key]
    assert puts[-1] == statistics[-1] == "s.zarr/stats/zarr.json"


def test_random_reads_ask_for_ranges_and_once_for_a_shards_index(s3: S3Server, heavy: Case) -> None:
    write_store(heavy, s3.bucket / "s.zarr")
    shard_bytes = {name: len(data) for name, data in objects(s3.bucket).items()}
    dense = [name for name in shard_bytes if "/dense/c/" in name]
    assert min(shard_bytes[name] for name in dense) > 400_000
    store = open_store(s3.bucket / "s.zarr")
    s3.forget()
    places = [(3, 0), (17, 1), (29, 0), (3, 1)]
    for row, view in places:
        assert_same_bits(as_arrays(store.read([row], [view])), heavy.expected([row], [view], 32))
    asked = s3.served("GET", "/dense/c/")
    assert all(a.status == 206 and a.byte_range for a in asked)
    for shard in dense:
        assert len([a for a in asked if a.key == shard and is_suffix(a)]) == 1
    assert len([a for a in asked if not is_suffix(a)]) == len(places)
    assert sum(a.num_bytes for a in asked) < 0.2 * min(shard_bytes[name] for name in dense)


def is_suffix(asked: Asked) -> bool:
    """The index stands at a shard's end."""
    return (asked.byte_range or "").startswith("bytes=-")


def test_a_batch_of_views_is_read_at_once(s3: S3Server, heavy: Case) -> None:
    write_store(heavy, s3.bucket / "s.zarr")
    store = open_store(s3.bucket / "s.zarr")
    store.read([0, 16], [0, 0])
    s3.forget()
    s3.delay_seconds = 0.05
    rows, views = [1, 5, 9, 13, 17, 21, 25, 29], [0, 1] * 4
    assert_same_bits(as_arrays(store.read(rows, views)), heavy.expected(rows, views, 32))
    assert s3.most_at_once >= 4


def test_damage_in_a_bucket_is_damage(s3: S3Server, case: Case) -> None:
    write_store(case, s3.bucket / "s.zarr")
    name = "32/dense/c/1/0/0/0/0"
    whole = (s3.bucket / "s.zarr").read(name)
    (s3.bucket / "s.zarr").write(name, whole[:10] + bytes(10) + whole[20:])
    with pytest.raises(PartCorruptError, match="damaged or missing features"):
        open_store(s3.bucket / "s.zarr").read([4], [0], size=32)
    (s3.bucket / "s.zarr").delete(name)
    with pytest.raises(PartCorruptError, match="damaged or missing features"):
        open_store(s3.bucket / "s.zarr").read([4], [0], size=32)


# A server that fails


@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (500, "InternalError")])
def test_a_server_that_fails_for_a_moment_is_asked_again(
    s3: S3Server, case: Case, whole: Path, status: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eupe.common.storage.RETRIES", {"max_retries": 3, "initial_delay": "10ms", "max_delay": "20ms"})
    s3.fail(status, code, method="PUT", after=9, times=2)
    s3.fail(status, code, method="GET", key="zarr.json$", after=3, times=1)
    write_store(case, s3.bucket / "s.zarr")
    assert [a.status for a in s3.asked].count(status) == 3
    assert objects(s3.bucket / "s.zarr") == objects(StoragePath.of(whole))


def test_a_server_that_goes_on_failing_leaves_what_was_committed(
    s3: S3Server, case: Case, whole: Path, impatient: None
) -> None:
    s3.fail(503, "SlowDown", method="PUT", key="dense/c/2/")
    with pytest.raises(StorageError, match=r"cannot be written: the server .* keeps failing .*SlowDown") as refused:
        write_store(case, s3.bucket / "s.zarr")
    assert "\n" not in str(refused.value)
    assert committed_parts(s3.bucket / "s.zarr") == [0, 1]
    s3.faults.clear()
    write_store(case, s3.bucket / "s.zarr", order=[2])
    assert objects(s3.bucket / "s.zarr") == objects(StoragePath.of(whole))


def test_a_server_that_is_gone_is_a_sentence(
    s3: S3Server, case: Case, impatient: None, monkeypatch: pytest.MonkeyPatch, run_eupe: Run
) -> None:
    write_store(case, s3.bucket / "s.zarr")
    store = open_store(s3.bucket / "s.zarr")
    s3.fail(503, "ServiceUnavailable")
    with pytest.raises(StorageError, match=r"s\.zarr cannot be read: the server .* keeps failing"):
        store.read([0], [0])
    monkeypatch.setenv("AWS_ENDPOINT_URL", MISSING)
    for words in (
        ["store", "info", f"{s3.bucket}/s.zarr"],
        ["index", "--corpus", f"{s3.bucket}/photos", "--out", "/nowhere/i.parquet"],
        ["train", "--targets", f"{s3.bucket}/s.zarr", "--student", "test_vit", "--out", "/nowhere/run"],
        ["eval", "knn", f"{s3.bucket}/s.zarr"],
    ):
        outcome = run_eupe(*words)
        assert outcome.code == 1
        assert re.fullmatch(rf"error: {s3.bucket}/.* the server {MISSING} does not answer .*\n", outcome.err), (
            outcome.err
        )


def test_a_server_that_never_answers_is_given_up() -> None:
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(8)
    script = (
        "import eupe.common.storage as p\n"
        "p.RETRIES = {'max_retries': 1, 'initial_delay': '10ms', 'max_delay': '10ms'}\n"
        "try: p.StoragePath.of('s3://bucket/x').read('a')\n"
        "except p.StorageError as error: print(error)"
    )
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{listening.getsockname()[1]}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "1",
        "no_proxy": "127.0.0.1",
    }
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=True)
    assert re.match(r"s3://bucket/x/a cannot be read: the server \S+ does not answer", done.stdout), done.stderr
    listening.close()


def test_waiting_is_bounded_unless_the_user_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"
    monkeypatch.delenv(name, raising=False)
    assert StoragePath.of("s3://bucket/x").spec()["s3_request_retries"]["max_retries"] < 10
    assert os.environ[name] == "20"
    monkeypatch.setenv(name, "5")
    StoragePath.of("gs://bucket/x").spec()
    assert os.environ[name] == "5"


@pytest.mark.parametrize(
    ("status", "code"), [(403, "AccessDenied"), (403, "InvalidAccessKeyId"), (401, "Unauthorized")]
)
def test_refused_credentials_are_a_sentence(s3: S3Server, status: int, code: str, run_eupe: Run) -> None:
    s3.fail(status, code)
    for words in (["store", "info", f"{s3.bucket}/s.zarr"], ["index", "--corpus", s3.bucket, "--out", "/x/i.parquet"]):
        outcome = run_eupe(*words)
        assert outcome.code == 1
        assert re.fullmatch(
            rf"error: {s3.bucket}\S* cannot be \w+: the server refuses access \({code}: as asked\); check the "
            r"credentials and their permissions\n",
            outcome.err,
        ), outcome.err


def test_a_bucket_or_store_that_is_not_there_is_a_sentence(s3: S3Server, case: Case, run_eupe: Run) -> None:
    outcome = run_eupe("store", "info", "s3://no-such-bucket/s.zarr")
    assert (outcome.code, outcome.err) == (
        1,
        "error: s3://no-such-bucket/s.zarr/ cannot be listed: the bucket does not exist\n",
    )
    outcome = run_eupe("store", "info", f"{s3.bucket}/s.zarr")
    assert outcome.code == 2
    assert f"store {s3.bucket}/s.zarr does not exist" in outcome.err
    with pytest.raises(StorageError, match="cannot be written: the bucket does not exist"):
        StoragePath.of("s3://no-such-bucket/x").write("a", b"")
    s3.bucket.write("s.zarr/photo.png", b"")
    with pytest.raises(StoreError, match="is not a feature store"):
        write_store(case, s3.bucket / "s.zarr")


# Pictures


def test_an_index_of_a_bucket_is_that_of_its_folder_without_times(s3: S3Server, tmp_path: Path) -> None:
    folder = make_corpus(tmp_path / "photos", count=9)
    (folder / "Ünï çödé").mkdir()
    (folder / "class0" / "0000.png").rename(folder / "Ünï çödé" / "a b+%41#?.PNG")
    for name in (".hidden.png", "notes.txt", ".folder/x.png", "class0/.y/z.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    place = upload(folder, s3.bucket / "photos")
    s3.client.put_object(Bucket=s3.bucket.name, Key="photos/class0/marker.png/", Body=b"")
    told: list[tuple[int, int]] = []
    ours = open_corpus(f"{s3.bucket}/photos/", progress=lambda *numbers: told.append(numbers))
    theirs = open_corpus(folder)
    assert ours.root == place
    assert ours.fingerprint == theirs.fingerprint
    columns = ["key", "sha256", "num_bytes", "label"]
    assert ours.samples.select(columns).equals(theirs.samples.select(columns))
    assert ours.samples["mtime_ns"].null_count == len(ours) == 9
    assert told == [(i, 9) for i in range(1, 10)]


def test_objects_are_hashed_anew_many_at_once_but_not_all(s3: S3Server, tmp_path: Path) -> None:
    place = upload(make_corpus(tmp_path, count=3 * READS_AT_ONCE), s3.bucket / "photos")
    before = index_folder(place)
    place.write("class0/0000.png", place.read("class1/0001.png"))
    s3.forget()
    s3.delay_seconds = 0.02
    after = index_folder(place, previous=before)
    assert len(s3.served("GET", "png$")) == 3 * READS_AT_ONCE
    assert 4 < s3.most_at_once <= READS_AT_ONCE
    assert after.fingerprint != before.fingerprint


def test_an_index_lies_in_a_bucket_or_on_disk(s3: S3Server, tmp_path: Path, run_eupe: Run) -> None:
    upload(make_corpus(tmp_path / "photos", count=3), s3.bucket / "photos")
    for out in (tmp_path / "i.parquet", f"{s3.bucket}/indexes/i.parquet"):
        outcome = run_eupe("index", "--corpus", f"{s3.bucket}/photos", "--out", out, "--json")
        assert outcome.code == 0, outcome.err
        again = open_corpus(out)
        assert (str(again.root), len(again)) == (f"{s3.bucket}/photos", 3)
        assert again.fingerprint == index_folder(tmp_path / "photos").fingerprint
    write_index(index_folder(tmp_path / "photos"), s3.bucket / "local.parquet")
    assert open_corpus(s3.bucket / "local.parquet").root == StoragePath.of(tmp_path / "photos")


def test_pictures_that_are_not_there_are_a_sentence(s3: S3Server, run_eupe: Run) -> None:
    with pytest.raises(CorpusError, match=rf"corpus {s3.bucket}/photos holds no picture"):
        open_corpus(s3.bucket / "photos")
    with pytest.raises(CorpusError, match=rf"index {s3.bucket}/i.parquet does not exist"):
        open_corpus(s3.bucket / "i.parquet")
    with pytest.raises(StorageError, match="the bucket does not exist"):
        open_corpus("s3://no-such-bucket/photos")
    s3.client.put_object(Bucket=s3.bucket.name, Key="odd/a\tb.png", Body=b"x")
    odd = open_corpus(s3.bucket / "odd")
    (key,) = odd.samples["key"].to_pylist()
    assert key == "a\uf009b.png" and read_picture(odd.root, key) == b"x"


def test_a_picture_that_is_gone_fails_a_silent_server_stops_the_part(s3: S3Server, impatient: None) -> None:
    sample = Sample("gone.png", None, None)
    loaded = load_sample(sample, s3.bucket, ViewSpec(), (32,))
    assert loaded.row.error == f"{s3.bucket}/gone.png does not exist"
    s3.fail(503, "SlowDown")
    with pytest.raises(StorageError, match="keeps failing"):
        load_sample(sample, s3.bucket, ViewSpec(), (32,))
    s3.faults.clear()
    s3.fail(403, "AccessDenied")
    with pytest.raises(StorageError, match="refuses access"):
        read_picture(s3.bucket, "gone.png")
