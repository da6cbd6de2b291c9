"""Every byte of a store is vouched for: what is damaged is found and named, what is whole is left alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import make_corpus
from mending import announce, extend, files, flip, make_parts
from object_store import S3Server, upload
from store_cases import as_arrays

from eupe.errors import EupeError
from eupe.store import open_store
from eupe.store.layout import moments_name, segment_name
from eupe.store.verify import verify
from eupe.store.writer import Part, Row, StoreWriter, create_store

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_weights: Path) -> Path:
    """Three parts of eight samples. Not to be changed."""
    return Path(make_parts(tmp_path_factory.mktemp("whole") / "s.zarr", tiny_corpus, tiny_weights).path)


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of the store for a test to damage."""
    return shutil.copytree(whole, tmp_path / "s.zarr")


def only_damage(path: Path) -> str:
    report = verify(path)
    assert len(report.damages) == 1, report.damages
    assert not report.whole
    return str(report.damages[0])


@pytest.mark.parametrize("precision", ["fp16", "bitround:4", "int8"])
def test_a_store_is_whole_at_any_precision_and_when_extended(
    tmp_path: Path, tiny_weights: Path, precision: str
) -> None:
    corpus = make_corpus(tmp_path / "c", count=11)
    made = make_parts(tmp_path / "s.zarr", corpus, tiny_weights, precision=precision)
    calls: list[tuple[int, int]] = []
    report = verify(made.path, progress=lambda done, of: calls.append((done, of)))
    assert (report.whole, report.num_parts, report.strays) == (True, 2, ())
    assert report.num_objects == 2 * 5
    assert report.num_bytes == made.stored_bytes
    assert calls[-1] == (10, 10)
    extended = extend(made, corpus, tiny_weights, count=3)
    report = verify(extended.path)
    assert (report.whole, report.num_parts, report.strays) == (True, 3, ())


def test_each_of_120_flipped_bits_is_found_and_none_is_read(store: Path) -> None:
    rng = np.random.default_rng(0)
    candidates = sorted(name for name in files(store) if name != "zarr.json")
    rows, views = list(range(24)) * 2, [0] * 24 + [1] * 24
    expected = open_store(store).read(rows, views)
    for i in range(120):
        name = candidates[i % len(candidates)]
        data = (store / name).read_bytes()
        place, bit = int(rng.integers(len(data))), int(rng.integers(8))
        (store / name).write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        report = verify(store)
        assert not report.whole, f"bit {bit} of byte {place} of {name}"
        if name.startswith("parts/") or ("/c/" in name and not name.startswith("stats/")):
            assert [damage.what for damage in report.damages] == [name]
        try:
            got = open_store(store).read(rows, views)
        except EupeError:
            pass
        else:
            assert all(np.array_equal(vars(got)[field], vars(expected)[field]) for field in vars(expected))
        (store / name).write_bytes(data)
    assert verify(store).whole


def test_damage_is_named_by_part_object_and_rows(store: Path) -> None:
    shard = store / "64/dense/c/1/0/0/0/0"
    assert open_store(store).spec.part_rows(1) == slice(8, 16)
    flip(shard, 0.55)
    assert only_damage(store) == ("part 1, rows 12 to 15: 64/dense/c/1/0/0/0/0 holds a chunk that fails its checksum")
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "cut short" in only_damage(store)
    assert "were committed)" in only_damage(store)
    shard.write_bytes(b"")
    assert "cut short" in only_damage(store)
    shard.unlink()
    assert only_damage(store) == "part 1, rows 8 to 15: 64/dense/c/1/0/0/0/0 is missing"


@pytest.mark.parametrize("name", ["64/dense/c/{}/0/0/0/0", "64/summary/c/{}/0/0", "boxes/c/{}/0/0"])
def test_a_whole_object_in_anothers_place_is_found(store: Path, name: str) -> None:
    a, b = store / name.format(0), store / name.format(1)
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)
    report = verify(store)
    assert [damage.part for damage in report.damages] == [0, 1]
    assert all("not the object that was committed" in damage.reason for damage in report.damages)


def test_a_part_without_its_commit_file_is_missing(store: Path) -> None:
    (store / "parts/00001.parquet").unlink()
    report = verify(store)
    assert (report.missing, report.damages, report.strays) == ((1,), (), ())
    assert not report.whole


def test_the_commit_file_of_another_part_is_found(store: Path) -> None:
    shutil.copy(store / "parts/00001.parquet", store / "parts/00000.parquet")
    assert "parts/00000.parquet has another key than the index lists" in only_damage(store)


def test_metadata_that_is_not_the_specifications_is_found(store: Path) -> None:
    document = store / "boxes/zarr.json"
    plain = json.loads(document.read_text())
    document.write_text(json.dumps(plain))
    assert verify(store).whole
    document.write_text(json.dumps({**plain, "dimension_names": ["sample", "view", "side"]}))
    assert only_damage(store) == "boxes/zarr.json differs from what the store's specification says"
    document.unlink()
    assert only_damage(store) == "boxes/zarr.json is missing"


def test_an_index_that_is_not_the_corpus_is_found(store: Path, tmp_path: Path) -> None:
    name = segment_name(0)
    other = open_store(store)
    announce(other, make_corpus(tmp_path / "c", count=8), count=1)
    shutil.rmtree(store / "parts")
    shutil.copy(store / name, tmp_path / "index")
    report = verify(store)
    assert [damage.what for damage in report.damages] == ["corpus"]
    (store / name).write_bytes((tmp_path / "index").read_bytes()[:-9])
    assert any(str(damage).startswith(f"{name} is damaged") for damage in verify(store).damages)
    shutil.copy(store / segment_name(1), store / name)
    assert any("lists 1 pictures, the specification says 24" in str(d) for d in verify(store).damages)
    (store / name).unlink()
    assert any(str(damage) == f"{name} is missing" for damage in verify(store).damages)


def test_boxes_that_no_view_can_have_are_found(store: Path) -> None:
    part = whole_part(store, 1)
    outside = part.boxes.copy()
    outside[3, 1, 2] = 5000
    reversed_ = part.boxes.copy()
    reversed_[0, 0] = reversed_[0, 0][[2, 1, 0, 3]]
    for boxes in (outside, reversed_, np.zeros_like(part.boxes)):
        StoreWriter(store).commit(Part(**{**vars(part), "boxes": boxes}))
        assert "boxes/c/1/0/0 holds boxes that do not lie in their pictures" in str(verify(store).damages[0])


def test_boxes_of_a_sample_that_failed_are_found(store: Path) -> None:
    part = whole_part(store, 1)
    rows = [Row(part.rows[0].key, part.rows[0].sha256, part.rows[0].label, error="gone"), *part.rows[1:]]
    StoreWriter(store).commit(Part(**{**vars(part), "rows": rows}))
    assert any("holds boxes of samples that failed" in damage.reason for damage in verify(store).damages)


def whole_part(path: Path, index: int) -> Part:
    """A part as it was committed."""
    store = open_store(path)
    rows = store.spec.part_rows(index)
    n, k = rows.stop - rows.start, store.spec.num_views
    places, views = np.repeat(np.arange(rows.start, rows.stop), k).tolist(), np.tile(np.arange(k), n).tolist()
    stored = store.read(places, views)
    arrays = {name: values.reshape(n, k, *values.shape[1:]) for name, values in as_arrays(stored).items()}
    listed = store.samples.slice(rows.start, n).drop_columns(["row", "status"]).to_pylist()
    return Part(
        index,
        [Row(**row) for row in listed],
        arrays["boxes"],
        arrays["flips"],
        store.read_digests(places, views).reshape(n, k),
        {"64/summary": arrays["summary"], "64/dense": arrays["dense"]},
        photometric=arrays.get("photometric"),
    )


def test_strays_are_told_and_do_no_harm(store: Path) -> None:
    (store / "notes.txt").write_text("mine")
    shutil.copytree(store / "64/dense/c/1", store / "64/dense/c/7")
    report = verify(store)
    assert report.whole
    assert report.strays == ("64/dense/c/7/0/0/0/0", "notes.txt")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("stats/64/dense/mean/c/0", "fails its checksum"),
        ("stats/64/dense/norms/c/0", "fails its checksum"),
        ("stats/64/summary/cov/c/0/0", "fails its checksum"),
        ("stats/64/dense/std/zarr.json", "differs"),
    ],
)
def test_damaged_statistics_are_found(store: Path, name: str, said: str) -> None:
    flip(store / name, 0.4)
    assert only_damage(store).startswith(f"{name} {said}")
    (store / name).unlink()
    assert only_damage(store) == f"{name} is missing"


def test_statistics_that_are_not_of_the_parts_are_found(store: Path) -> None:
    mark = store / "stats/zarr.json"
    good = mark.read_text()
    mark.write_text(good.replace('"num_clipped": 0', '"num_clipped": 4'))
    assert only_damage(store) == "stats/zarr.json counts otherwise than its parts"
    mark.write_text(good.replace('"num_parts": 3', '"num_parts": 2'))
    assert only_damage(store) == "stats is of 2 of 3 parts"
    mark.write_text("{}")
    assert only_damage(store).startswith("stats/zarr.json is damaged")
    mark.write_text(good)
    std, mean = store / "stats/64/dense/std/c/0", store / "stats/64/dense/mean/c/0"
    right = std.read_bytes()
    std.write_bytes(mean.read_bytes())
    assert only_damage(store) == "stats/64/dense has a standard deviation that is not that of its covariance"
    std.write_bytes(right)
    shutil.copy(store / "stats/64/summary/norms/c/0", store / "stats/64/dense/norms/c/0")
    assert only_damage(store) == "stats/64/dense counts otherwise than its parts"
    shutil.rmtree(store / "stats")
    assert only_damage(store) == "stats is missing"


def test_while_parts_are_missing_their_moments_are_proven_and_no_statistics_asked_for(
    whole: Path, tmp_path: Path
) -> None:
    spec = open_store(whole).spec
    path = tmp_path / "s.zarr"
    create_store(path, spec)
    assert verify(path).missing == (0, 1, 2)
    shutil.copytree(whole / "corpus", path / "corpus")
    StoreWriter(path).commit(whole_part(whole, 1))
    report = verify(path)
    assert (report.missing, report.damages, report.num_objects) == ((0, 2), (), 6)
    moments = path / "parts" / moments_name(1)
    flip(moments, 0.7)
    assert only_damage(path) == f"part 1: parts/{moments_name(1)} fails its checksum"
    moments.unlink()
    assert verify(path).damages == ()


def test_a_store_in_a_bucket_is_proven_too(whole: Path, s3: S3Server) -> None:
    place = upload(whole, s3.bucket / "s.zarr")
    on_disk, in_bucket = verify(whole), verify(place)
    assert in_bucket.whole
    assert (in_bucket.num_objects, in_bucket.num_bytes) == (on_disk.num_objects, on_disk.num_bytes)
    data = bytearray(place.read("64/dense/c/1/0/0/0/0"))
    data[len(data) // 2] ^= 1
    place.write("64/dense/c/1/0/0/0/0", bytes(data))
    place.delete("flips/c/0/0")
    assert {(damage.part, damage.what) for damage in verify(place).damages} == {
        (0, "flips/c/0/0"),
        (1, "64/dense/c/1/0/0/0/0"),
    }


def test_the_verb_names_the_damage_and_leaves_with_1(store: Path, run_eupe: Run) -> None:
    outcome = run_eupe("store", "verify", store)
    assert (outcome.code, outcome.out.splitlines()[-1]) == (0, f"{store} is whole")
    assert json.loads(run_eupe("store", "verify", store, "--json").out)["whole"]
    flip(store / "digests/c/2/0", 0.5)
    (store / "parts/00000.parquet").unlink()
    outcome = run_eupe("store", "verify", store)
    assert outcome.code == 1
    assert outcome.out.splitlines()[:2] == [
        "part 0 is missing",
        "part 2, rows 16 to 23: digests/c/2/0 fails its checksum",
    ]
    assert "1 of 3 parts are missing, 1 objects are damaged; `eupe store repair" in " ".join(outcome.err.split())
    outcome = run_eupe("store", "verify", store, "--json")
    assert outcome.code == 1
    report = json.loads(outcome.out)
    assert (report["whole"], report["missing"], report["damages"][0]["part"]) == (False, [0], 2)
    outcome = run_eupe("store", "verify", store / "boxes" / "c")
    assert outcome.code == 2
    assert "is not a feature store" in " ".join(outcome.err.split())
