"""What is committed comes back bit for bit, and nothing exists before its commit file does."""

from __future__ import annotations

import pickle
import random
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from store_cases import (
    Case,
    as_arrays,
    assert_same_bits,
    every_view,
    make_case,
    make_spec,
    tree_digest,
    with_error,
    write_store,
)

from eupe.common.storage import StoragePath
from eupe.errors import PartCorruptError, SpecMismatchError, StorageError, StoreError
from eupe.store import open_store
from eupe.store.layout import arrays
from eupe.store.precision import decode
from eupe.store.reader import committed_parts, read_part_metadata
from eupe.store.writer import StoreWriter, create_store, extend_store, finish_store

# Round trips


def check_reads(case: Case, path: Path, seed: int = 0) -> None:
    """Reads in random order with repeats, at every size, and by plain zarr-python, against the oracle."""
    store = open_store(path)
    rng = random.Random(seed)
    samples = [rng.randrange(len(case.rows)) for _ in range(40)]
    rows = [case.places[sample] for sample in samples]
    views = [rng.randrange(case.spec.num_views) for _ in range(40)]
    for size in case.spec.sizes:
        got = as_arrays(store.read(rows, views, size=size))
        assert_same_bits(got, case.expected(rows, views, size))
        if "summary" in case.spec.tokens:
            summaries = store.read_summaries(rows, views, size=size)
            assert summaries.tobytes() == got["summary"].tobytes()
    np.testing.assert_array_equal(store.read_digests(rows, views), case.arrays["digests"][samples, views])
    group = zarr.open_group(path, mode="r")
    for name, values in case.kept.items():
        array = group[name]
        stored = array[:]
        precision = case.spec.precision.get(name.rpartition("/")[2], "fp16")
        assert_same_bits(
            {name: decode(stored[case.places], precision, case.spec.array_calibration(name))}, {name: values}
        )
        empty = np.delete(stored, case.places, axis=0)
        assert ((empty == array.fill_value) | (np.isnan(empty) & np.isnan(array.fill_value))).all()


def test_reads_equal_the_naive_arrays(case: Case, whole: Path) -> None:
    check_reads(case, whole)


def test_the_first_size_is_read_where_none_is_given(case: Case, whole: Path) -> None:
    got = as_arrays(open_store(whole).read([4, 0], [2, 1]))
    assert_same_bits(got, case.expected([4, 0], [2, 1], 32))


def test_reads_begun_together_do_not_mix(case: Case, whole: Path) -> None:
    store = open_store(whole)
    pending = [(i, store.read_async([i, 10 - i], [i % 3, 0], size=48)) for i in range(11)]
    for i, features in reversed(pending):
        assert_same_bits(as_arrays(features.result()), case.expected([i, 10 - i], [i % 3, 0], 48))


PRECISIONS = ["fp16", "int8", *(f"bitround:{bits}" for bits in (1, 5, 9))]


@settings(max_examples=25, deadline=None)
@given(
    segments=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    num_views=st.integers(1, 3),
    per_part=st.sampled_from([1, 2, 4, 8, 16]),
    grids=st.dictionaries(st.integers(1, 99), st.integers(1, 3), min_size=1, max_size=2),
    dims=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    tokens=st.sampled_from([("summary",), ("dense",), ("summary", "dense")]),
    precision=st.fixed_dictionaries({kind: st.sampled_from(PRECISIONS) for kind in ("summary", "dense")}),
    at_once=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_small_store_round_trips(
    segments: list[int],
    num_views: int,
    per_part: int,
    grids: dict[int, int],
    dims: tuple[int, int],
    tokens: tuple[str, ...],
    precision: dict[str, str],
    at_once: bool,
    seed: int,
) -> None:
    """Made with all its segments, or with the first and extended by the others, parts in any order each time."""
    spec = make_spec(
        segments=segments,
        precision=precision,
        num_views=num_views,
        samples_per_part=per_part,
        grids=grids,
        tokens=tokens,
        summary_dim=dims[0],
        dense_dim=dims[1],
    )
    rng = random.Random(seed)
    num_samples = spec.num_samples
    case = make_case(spec, failed=rng.sample(range(1, num_samples), rng.randrange(num_samples)), seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "any.zarr")
        first = segments if at_once else segments[:1]
        store = create_store(path, replace(spec, corpus={**spec.corpus, "segments": first}))
        for more in [None] if at_once else [None, *segments[1:]]:
            if more is not None:
                store = extend_store(store, fingerprint="cd" * 32, num_new=more)
            missing = store.missing_parts()
            for part in rng.sample(missing, len(missing)):
                StoreWriter(path).commit(case.part(part))
            store = finish_store(path)
        assert store.spec == spec
        check_reads(case, path, seed)
        assert open_store(path).samples["key"].to_pylist() == [row.key for row in case.rows]
        assert open_store(path).samples["row"].to_pylist() == case.places


def test_values_equal_to_the_fill_value_are_stored_all_the_same(tmp_path: Path) -> None:
    """Centre crops are never flipped and a part may fail as a whole: both are content, not absence."""
    case = make_case(make_spec(), failed=[4, 5, 6, 7])
    case.arrays["flips"][:] = False
    case.arrays["boxes"][:4] = 0
    case.arrays["digests"][8:] = 0
    case.arrays["32/summary"][:4] = 0
    write_store(case, tmp_path / "zeros.zarr")
    check_reads(case, tmp_path / "zeros.zarr")


def test_samples_are_the_rows_in_order(case: Case, whole: Path) -> None:
    samples = open_store(whole).samples
    assert samples.column_names == [
        "row",
        "key",
        "sha256",
        "width",
        "height",
        "label",
        "status",
        "error",
    ]
    assert samples["row"].to_pylist() == list(range(11))
    for got, row in zip(samples.to_pylist(), case.rows, strict=True):
        assert {name: got[name] for name in ("key", "sha256", "width", "height", "label", "error")} == vars(row)
        assert got["status"] == ("ok" if row.error is None else "failed")
    assert samples["status"].to_pylist().count("failed") == 1


def test_a_failed_sample_reads_as_nan_without_a_box(whole: Path) -> None:
    features = open_store(whole).read([5, 5, 5], [0, 1, 2], size=48)
    assert features.summary is not None and features.dense is not None
    assert np.isnan(features.summary).all() and np.isnan(features.dense).all()
    assert not features.boxes.any() and not features.flips.any()
    assert not open_store(whole).read_digests([5, 5, 5], [0, 1, 2]).any()


def test_an_opened_store_travels_to_another_process(case: Case, whole: Path) -> None:
    store = open_store(whole)
    store.read([0], [0])
    again = pickle.loads(pickle.dumps(store))
    assert_same_bits(as_arrays(again.read([4], [2])), case.expected([4], [2], 32))


# Extension


def test_an_extension_begins_a_part_and_leaves_rows_empty(tmp_path: Path) -> None:
    """Five samples, four more, one more, in parts of four: rows 0-4, 8-11 and 12."""
    grown = make_case(make_spec(segments=[5, 4, 1]), failed={6})
    path = tmp_path / "s.zarr"
    create_store(path, make_spec(num_samples=5))
    StoreWriter(path).commit(grown.part(0))
    StoreWriter(path).commit(grown.part(1))
    before = tree_digest(finish_store(path).path)
    store = extend_store(open_store(path), fingerprint="ef" * 32, num_new=4)
    assert (store.spec.num_samples, store.spec.num_parts, store.spec.num_rows) == (9, 3, 12)
    assert store.missing_parts() == [2] and not store.finished
    with pytest.raises(StoreError, match="1 of 3 parts are missing"):
        store.stats(32, "dense")
    store = extend_store(store, fingerprint="0f" * 32, num_new=1)
    assert store.spec.corpus == {"fingerprint": "0f" * 32, "segments": [5, 4, 1], "root": "/pictures"}
    assert (store.spec.num_parts, store.spec.num_rows, store.missing_parts()) == (4, 13, [2, 3])
    for part in (3, 2):
        StoreWriter(path).commit(grown.part(part))
    store = finish_store(path)
    assert store.samples["row"].to_pylist() == [0, 1, 2, 3, 4, 8, 9, 10, 11, 12]
    assert store.samples["key"].to_pylist() == [row.key for row in grown.rows]
    check_reads(grown, path)
    for row in (5, 6, 7):
        with pytest.raises(PartCorruptError):
            store.read([row], [0])
    with pytest.raises(IndexError, match="rows 0 to 12"):
        store.read([13], [0])
    after = tree_digest(path)
    assert not {name for name, digest in before.items() if after[name] != digest and not name.endswith("zarr.json")
                and not name.startswith("stats/")}, "nothing of what was there is written again"  # fmt: skip


def test_a_store_that_was_open_before_an_extension_reads_on(tmp_path: Path) -> None:
    grown = make_case(make_spec(segments=[5, 4]))
    path = tmp_path / "s.zarr"
    create_store(path, make_spec(num_samples=5))
    for part in (0, 1):
        StoreWriter(path).commit(grown.part(part))
    old = finish_store(path)
    rows, views = every_view(old.spec, range(5))
    old.read([0], [0])
    extend_store(open_store(path), fingerprint="ef" * 32, num_new=4)
    StoreWriter(path).commit(grown.part(2))
    assert_same_bits(as_arrays(old.read(rows, views)), grown.expected(rows, views, 32))
    with pytest.raises(IndexError):
        old.read([8], [0])


# Statistics


def test_statistics_are_exact_over_the_samples_with_features(case: Case, whole: Path) -> None:
    """Tolerance: float64 rounding, relative to the largest value."""
    store = open_store(whole)
    for path, values in case.features.items():
        size, kind = path.split("/")
        stats = store.stats(int(size), kind)
        vectors = values[case.ok].reshape(-1, values.shape[-1]).astype(np.float64)
        scale = np.abs(vectors).max()
        assert stats.count == len(vectors)
        np.testing.assert_allclose(stats.mean, vectors.mean(axis=0), rtol=1e-12, atol=1e-12 * scale)
        np.testing.assert_allclose(stats.std, vectors.std(axis=0), rtol=1e-12, atol=1e-12 * scale)


def test_a_part_keeps_its_own_statistics(case: Case, whole: Path) -> None:
    metadata = read_part_metadata(StoragePath.of(whole), 1)
    assert metadata["norms"].keys() == case.features.keys()
    assert sum(metadata["norms"]["48/dense"]) == 3 * 3 * 9, "samples 4, 6, 7; three views; 3x3 cells"
    assert np.shape(metadata["outliers"]["48/dense"]) == (3, 3)
    assert (metadata["num_clipped"], metadata["num_nonfinite"], metadata["versions"]) == (1, 2, {"eupe": "0"})


def test_a_part_records_its_objects(case: Case, tmp_path: Path) -> None:
    """Every one that it wrote, before its own file, as zlib and the file system see them."""
    path = tmp_path / "s.zarr"
    create_store(path, case.spec)
    before = tree_digest(path)
    StoreWriter(path).commit(case.part(1))
    written = tree_digest(path).keys() - before.keys() - {"parts/00001.parquet"}
    recorded = read_part_metadata(StoragePath.of(path), 1)["objects"]
    assert recorded.keys() == written
    for name, facts in recorded.items():
        data = (path / name).read_bytes()
        assert facts == {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
    assert open_store(path).stored_bytes == sum(
        (path / name).stat().st_size for name in written if not name.endswith(".moments")
    )


def test_an_unfinished_store_has_no_statistics(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    create_store(path, case.spec)
    StoreWriter(path).commit(case.part(1))
    with pytest.raises(StoreError, match="2 of 3 parts are missing"):
        open_store(path).stats(32, "dense")
    with pytest.raises(StoreError, match="lacks 2 of 3 parts"):
        finish_store(path)
    assert not open_store(path).finished


def test_a_corpus_without_a_readable_picture_cannot_be_finished(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    with pytest.raises(StoreError, match="no picture of the corpus could be read"):
        write_store(with_error(case, "gone"), path)
    assert open_store(path).missing_parts() == [] and not open_store(path).finished
    assert not (path / "stats").exists()


# One content, one set of bytes


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_store_made_twice_has_the_same_bytes(case: Case, whole: Path, tmp_path: Path, order: tuple[int, ...]) -> None:
    write_store(case, tmp_path / "again.zarr", order=order)
    assert tree_digest(tmp_path / "again.zarr") == tree_digest(whole)


def test_committing_and_finishing_again_changes_nothing(case: Case, copy: Path) -> None:
    before = tree_digest(copy)
    StoreWriter(copy).commit(case.part(2))
    finish_store(copy)
    assert tree_digest(copy) == before


def test_a_part_is_one_object_of_each_array(case: Case, whole: Path) -> None:
    for array in arrays(case.spec):
        objects = [file for file in (whole / array.path / "c").rglob("*") if file.is_file()]
        zeros = "/".join("0" * (len(array.shape) - 1))
        assert {o.relative_to(whole / array.path).as_posix() for o in objects} == {
            f"c/{part}/{zeros}" for part in range(3)
        }


@pytest.mark.parametrize("tokens", [("summary",), ("dense",)])
def test_large_arrays_have_the_same_bytes_whoever_codes_them(tmp_path: Path, tokens: tuple[str, ...]) -> None:
    """Blosc's own threads would lay a chunk's blocks down in the order in which they end."""
    spec = make_spec(num_samples=16_384, samples_per_part=16_384, num_views=8, grids={32: 1}, tokens=tokens)
    if tokens == ("dense",):
        spec = make_spec(num_samples=2, samples_per_part=2, num_views=1, grids={32: 64}, dense_dim=384, tokens=tokens)
    case = make_case(spec)
    case.arrays["boxes"].sort(axis=0)
    digests = []
    for attempt in range(3):
        path = tmp_path / str(attempt)
        create_store(path, spec)
        part = case.part(0)
        commit = threading.Thread(target=StoreWriter(path).commit, args=(part,)) if attempt == 2 else None
        if commit is None:
            StoreWriter(path).commit(part)
        else:
            commit.start()
            commit.join()
        digests.append(tree_digest(path))
    assert digests[0] == digests[1] == digests[2]


# A part without its commit file does not exist


def assert_only_committed(path: Path | StoragePath, parts: list[int]) -> None:
    store = open_store(path)
    assert committed_parts(store.path) == parts
    assert store.missing_parts() == sorted({0, 1, 2} - set(parts))
    assert not store.finished
    rows = [row for part in parts for row in range(11)[store.spec.part_rows(part)]]
    assert store.samples["row"].to_pylist() == rows


def test_parts_appear_as_they_are_committed(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    assert_only_committed(create_store(path, case.spec).path, [])
    writer = StoreWriter(path)
    writer.commit(case.part(2))
    assert_only_committed(path, [2])
    writer.commit(case.part(0))
    assert_only_committed(path, [0, 2])
    writer.commit(case.part(1))
    assert open_store(path).missing_parts() == [] and not open_store(path).finished
    assert finish_store(path).finished


def test_a_part_whose_file_is_removed_is_missing_and_can_be_redone(case: Case, whole: Path, copy: Path) -> None:
    (copy / "parts/00001.parquet").unlink()
    assert_only_committed(copy, [0, 2])
    StoreWriter(copy).commit(case.part(1))
    assert tree_digest(finish_store(copy).path) == tree_digest(whole)


def keys_of_a_commit(part: int) -> list[str]:
    """Return the keys of the objects of a part, in the order in which they are written."""
    objects = ["/".join([array.path, "c", str(part), *"0" * (len(array.shape) - 1)]) for array in arrays(make_spec())]
    return [*objects, f"parts/{part:05d}.moments", f"parts/{part:05d}.parquet"]


def test_every_object_is_on_disk_before_the_commit_file(
    case: Case, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    write = StoragePath.write_blocks

    def refuse(place: StoragePath, name: str, blocks: Iterable[bytes]) -> None:
        written.append(name)
        if name.endswith(".parquet"):
            raise StorageError("stopped before the commit file")
        write(place, name, blocks)

    path = tmp_path / "store.zarr"
    create_store(path, case.spec)
    monkeypatch.setattr(StoragePath, "write_blocks", refuse)
    with pytest.raises(StorageError, match="stopped before the commit file"):
        StoreWriter(path).commit(case.part(1))
    assert_only_committed(path, [])
    assert sorted(written) == sorted(keys_of_a_commit(1)) and written[-1] == "parts/00001.parquet"
    whole_digest, digest = tree_digest(whole), tree_digest(path)
    for name in keys_of_a_commit(1)[:-2]:
        assert digest[name] == whole_digest[name]
    assert "parts/00001.moments" in digest


@pytest.mark.parametrize("key", keys_of_a_commit(1))
def test_a_part_with_a_failed_write_does_not_exist(
    case: Case, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    write = StoragePath.write_blocks

    def refuse(place: StoragePath, name: str, blocks: Iterable[bytes]) -> None:
        if name == key:
            raise StorageError(f"no space left while writing {place}")
        write(place, name, blocks)

    path = tmp_path / "store.zarr"
    create_store(path, case.spec)
    writer = StoreWriter(path)
    writer.commit(case.part(0))
    with monkeypatch.context() as patch:
        patch.setattr(StoragePath, "write_blocks", refuse)
        with pytest.raises(StorageError, match=r"no space left while writing .*store\.zarr"):
            writer.commit(case.part(1))
    assert_only_committed(path, [0])
    writer.commit(case.part(1))
    writer.commit(case.part(2))
    assert tree_digest(finish_store(path).path) == tree_digest(whole)


@pytest.mark.parametrize("name", ["boxes", "48/dense", "parts"])
def test_a_write_that_the_storage_refuses_is_one_sentence(case: Case, tmp_path: Path, name: str) -> None:
    """A file stands where a folder would be."""
    path = tmp_path / "store.zarr"
    create_store(path, case.spec)
    (path / name / ("c" if name != "parts" else "")).write_text("")
    with pytest.raises(StorageError, match=r"store\.zarr cannot be written: "):
        StoreWriter(path).commit(case.part(1))
    (path / name / ("c" if name != "parts" else "")).unlink()
    assert_only_committed(path, [])


# Making and opening


def test_the_same_spec_opens_the_store_and_touches_nothing(case: Case, copy: Path) -> None:
    before = tree_digest(copy)
    corpus = {**case.spec.corpus, "root": "/moved"}
    store = create_store(copy, replace(case.spec, corpus=corpus, versions={"eupe": "later"}))
    assert store.finished and store.spec == case.spec
    assert tree_digest(copy) == before


def test_another_spec_is_refused_with_the_differences(case: Case, copy: Path) -> None:
    before = tree_digest(copy)
    other = replace(case.spec, sizes=(32, 64), views={**case.spec.views, "seed": 7})
    with pytest.raises(SpecMismatchError) as refused:
        create_store(copy, other)
    assert "(sizes: stored [32, 48], requested [32, 64]; views.seed: stored 0, requested 7)" in str(refused.value)
    assert "give another --out" in str(refused.value)
    assert tree_digest(copy) == before


def make_folder_of_files(path: Path) -> None:
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")


def make_file(path: Path) -> None:
    path.write_text("years of work")


def make_foreign_group(path: Path) -> None:
    zarr.open_group(path, mode="w", zarr_format=3)


@pytest.mark.parametrize("make", [make_folder_of_files, make_file, make_foreign_group])
def test_what_is_no_store_is_left_alone(case: Case, tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "precious")
    before = tree_digest(tmp_path)
    with pytest.raises(StoreError, match="feature store"):
        create_store(tmp_path / "precious", case.spec)
    assert tree_digest(tmp_path) == before


def test_an_empty_folder_becomes_a_store(case: Case, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert create_store(tmp_path / "empty", case.spec).spec == case.spec


def test_a_disk_that_fails_while_a_store_is_made_is_one_sentence(
    case: Case, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files written before the failure open as an unfinished store; making the store again completes it."""
    create = StoragePath.create

    def refuse(place: StoragePath, name: str, data: bytes) -> bool:
        if name == "48/dense/zarr.json":
            raise StorageError("no space left")
        return create(place, name, data)

    path = tmp_path / "store.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(StoragePath, "create", refuse)
        with pytest.raises(StorageError, match="no space left"):
            create_store(path, case.spec)
    assert open_store(path).missing_parts() == [0, 1, 2]
    write_store(case, path)
    assert tree_digest(path) == tree_digest(whole)


def test_a_store_can_be_moved(case: Case, copy: Path, tmp_path: Path) -> None:
    moved = shutil.move(copy, tmp_path / "moved.zarr")
    check_reads(case, moved)


@pytest.mark.parametrize(("rows", "views"), [([-1], [0]), ([0, 10_000], [0, 0]), ([0], [99])])
def test_places_outside_the_store_are_refused(tmp_path: Path, rows: list[int], views: list[int]) -> None:
    case = make_case(make_spec())
    store = write_store(case, tmp_path / "s.zarr")
    for read in (store.read, store.read_summaries):
        with pytest.raises(IndexError, match=r"s\.zarr has (row|view)s 0 to"):
            read(rows, views)


def test_a_stray_file_among_the_parts_is_no_part(tmp_path: Path) -> None:
    case = make_case(make_spec())
    store = write_store(case, tmp_path / "s.zarr")
    for stray in ("00000.copy.parquet", "0.parquet", "00007.parquet.__lock", "x00001.parquet"):
        (store.path.local / "parts" / stray).write_bytes(b"stray")
    (store.path.local / "parts/more").mkdir()
    (store.path.local / "parts/more/00008.parquet").write_bytes(b"stray")
    assert open_store(store.path).finished
    assert open_store(store.path).samples.equals(store.samples)


def test_of_many_writers_that_make_one_store_the_slower_join(case: Case, whole: Path, tmp_path: Path) -> None:
    barrier = threading.Barrier(4)
    made = []

    def make() -> None:
        barrier.wait()
        made.append(create_store(tmp_path / "s.zarr", case.spec).spec)

    makers = [threading.Thread(target=make) for _ in range(4)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert made == [case.spec] * 4
    write_store(case, tmp_path / "s.zarr")
    assert tree_digest(tmp_path / "s.zarr") == tree_digest(whole)


def test_of_two_writers_with_different_specs_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the other claims the root between a look and a claim."""
    create = StoragePath.create
    ours, theirs = make_spec(), make_spec(num_views=2)

    def overtaken(place: StoragePath, name: str, data: bytes) -> bool:
        monkeypatch.setattr(StoragePath, "create", create)
        create_store(tmp_path / "s.zarr", theirs)
        return create(place, name, data)

    monkeypatch.setattr(StoragePath, "create", overtaken)
    with pytest.raises(SpecMismatchError, match=r"views\.num_views: stored 2, requested 3"):
        create_store(tmp_path / "s.zarr", ours)
    write_store(make_case(theirs), tmp_path / "s.zarr")


def test_two_writers_of_one_part_do_no_harm(case: Case, whole: Path, tmp_path: Path) -> None:
    create_store(tmp_path / "s.zarr", case.spec)

    def commit_all() -> None:
        writer = StoreWriter(tmp_path / "s.zarr")
        for part in range(3):
            writer.commit(case.part(part))

    writers = [threading.Thread(target=commit_all) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert tree_digest(finish_store(tmp_path / "s.zarr").path) == tree_digest(whole)
