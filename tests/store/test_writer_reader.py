"""What is committed comes back bit for bit, and nothing exists before its commit file does."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from store_cases import (
    Case,
    as_arrays,
    assert_same_bits,
    make_case,
    make_spec,
    tree_digest,
    with_error,
    write_store,
)

from eupe.errors import SpecMismatchError, StorageError, StoreError
from eupe.store import open_store
from eupe.store.layout import arrays
from eupe.store.reader import committed_parts, read_part_metadata
from eupe.store.writer import StoreWriter, create_store, finish_store

# Round trips


def check_reads(case: Case, path: Path, seed: int = 0) -> None:
    """Reads in random order with repeats, at every size, and by plain zarr-python, against the oracle."""
    store = open_store(path)
    rng = random.Random(seed)
    rows = [rng.randrange(case.spec.num_samples) for _ in range(40)]
    views = [rng.randrange(case.spec.num_views) for _ in range(40)]
    for size in case.spec.sizes:
        got = as_arrays(store.read(rows, views, size=size))
        assert_same_bits(got, case.expected(rows, views, size))
        if "summary" in case.spec.tokens:
            summaries = store.read_summaries(rows, views, size=size)
            assert summaries.tobytes() == got["summary"].tobytes()
    group = zarr.open_group(path, mode="r")
    assert_same_bits({name: group[name][:] for name in case.arrays}, case.arrays)


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


@settings(max_examples=15, deadline=None)
@given(
    num_samples=st.integers(1, 12),
    num_views=st.integers(1, 3),
    per_part=st.sampled_from([1, 2, 4, 8, 16]),
    grids=st.dictionaries(st.integers(1, 99), st.integers(1, 3), min_size=1, max_size=2),
    dims=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    tokens=st.sampled_from([("summary",), ("dense",), ("summary", "dense")]),
    seed=st.integers(0, 2**16),
)
def test_any_small_store_round_trips(
    num_samples: int,
    num_views: int,
    per_part: int,
    grids: dict[int, int],
    dims: tuple[int, int],
    tokens: tuple[str, ...],
    seed: int,
) -> None:
    spec = make_spec(
        num_samples=num_samples,
        num_views=num_views,
        samples_per_part=per_part,
        grids=grids,
        tokens=tokens,
        summary_dim=dims[0],
        dense_dim=dims[1],
    )
    rng = random.Random(seed)
    case = make_case(spec, failed=rng.sample(range(num_samples), rng.randrange(num_samples)), seed=seed)
    order = rng.sample(range(spec.num_parts), spec.num_parts)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "any.zarr")
        write_store(case, path, order=order)
        check_reads(case, path, seed)
        assert open_store(path).samples["key"].to_pylist() == [row.key for row in case.rows]


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
    assert not features.boxes.any() and not features.flips.any() and not features.digests.any()


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
    metadata = read_part_metadata(whole, 1)
    assert metadata["moments"].keys() == case.features.keys()
    assert metadata["moments"]["48/dense"]["count"] == 3 * 3 * 9, "samples 4, 6, 7; three views; 3x3 cells"
    assert (metadata["num_clipped"], metadata["versions"]) == (1, {"eupe": "0"})


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
    assert not list(path.glob(".*")), "temporary names are left"


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


# A part without its commit file does not exist


def assert_only_committed(path: Path, parts: list[int]) -> None:
    store = open_store(path)
    assert committed_parts(path) == parts
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


def test_every_array_is_on_disk_before_the_commit_file(
    case: Case, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("stopped before the commit file")

    path = tmp_path / "store.zarr"
    create_store(path, case.spec)
    monkeypatch.setattr(StoreWriter, "_commit_rows", refuse)
    with pytest.raises(StorageError, match="stopped before the commit file"):
        StoreWriter(path).commit(case.part(1))
    assert_only_committed(path, [])
    whole_digest, digest = tree_digest(whole), tree_digest(path)
    for array in arrays(case.spec):
        name = "/".join([array.path, "c", "1", *"0" * (len(array.shape) - 1)])
        assert digest[name] == whole_digest[name]


class RefusingArray:
    """A tensorstore handle whose writes fail: at once, or when waited for."""

    def __init__(self, error: Exception, *, at_once: bool) -> None:
        self._error = error
        self._at_once = at_once

    def __getitem__(self, rows: slice) -> RefusingArray:
        return self

    def write(self, values: object) -> RefusingArray:
        if self._at_once:
            raise self._error
        return self

    def result(self) -> None:
        raise self._error


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("name", [array.path for array in arrays(make_spec())])
def test_a_part_with_a_failed_write_does_not_exist(
    case: Case, whole: Path, tmp_path: Path, name: str, at_once: bool
) -> None:
    path = tmp_path / "store.zarr"
    create_store(path, case.spec)
    writer = StoreWriter(path)
    writer.commit(case.part(0))
    arrays_of_writer = dict(writer._arrays)
    writer._arrays[name] = RefusingArray(ValueError("RESOURCE_EXHAUSTED: no"), at_once=at_once)
    with pytest.raises(StorageError, match=r"no space left while writing .*store\.zarr"):
        writer.commit(case.part(1))
    assert_only_committed(path, [0])
    writer._arrays = arrays_of_writer
    writer.commit(case.part(1))
    writer.commit(case.part(2))
    assert tree_digest(finish_store(path).path) == tree_digest(whole)


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
    assert "(sizes: stored [32, 48], asked [32, 64]; views.seed: stored 0, asked 7)" in str(refused.value)
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


def test_a_store_appears_whole_or_not_at_all(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails at the last array leaves neither the store nor its temporary folder."""

    def refuse(group: zarr.Group, layout: Any) -> None:
        if layout.path == "48/dense":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("eupe.store.writer._create_array", refuse)
    with pytest.raises(StorageError, match="no space left"):
        create_store(tmp_path / "store.zarr", case.spec)
    assert list(tmp_path.iterdir()) == []


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
    (store.path / "parts" / "00000.copy.parquet").write_bytes(b"stray")
    assert open_store(store.path).samples.equals(store.samples)


def test_of_two_writers_that_make_one_store_the_slower_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec()
    rename = Path.rename

    def overtaken(source: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        create_store(tmp_path / "elsewhere.zarr", spec)
        rename(tmp_path / "elsewhere.zarr", target)
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    store = create_store(tmp_path / "s.zarr", spec)
    assert store.spec == spec
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]
