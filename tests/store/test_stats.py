"""Statistics that merge, against numpy over everything at once.

Tolerance: both sides work in float64, whose rounding error over n values stays far below 1e-12 of their magnitude.
Norms are taken in float32, so a norm within 1e-5 of a bin's edge or of the outliers' bound may count on either side.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from store_cases import CODED, Case, every_view, make_case, make_spec, tree_digest, write_store

from eupe.common.storage import StoragePath
from eupe.errors import PartCorruptError
from eupe.store import Store, open_store, writer
from eupe.store.reader import read_part_metadata
from eupe.store.stats import (
    BLOCK_ROWS,
    NORM_BINS,
    FullStats,
    Moments,
    merge_all,
    norm_bin_edges,
    norm_histogram,
    outliers_by_position,
)
from eupe.store.writer import StoreWriter, create_store, extend_store, finish_store

RTOL = 1e-12
NEAR = 1e-5

# Moments


def check(moments: Moments, vectors: NDArray[np.floating]) -> None:
    exact = vectors.astype(np.float64)
    scale = np.abs(exact).max()
    assert moments.count == len(exact)
    assert moments.mean.dtype == moments.scatter.dtype == np.float64
    np.testing.assert_allclose(moments.mean, exact.mean(axis=0), rtol=RTOL, atol=RTOL * scale)
    np.testing.assert_allclose(moments.std, exact.std(axis=0), rtol=RTOL, atol=RTOL * scale)
    covariance = np.atleast_2d(np.cov(exact.T, bias=True))
    np.testing.assert_allclose(moments.covariance, covariance, rtol=RTOL, atol=RTOL * scale**2)
    np.testing.assert_array_equal(moments.scatter, moments.scatter.T)


@pytest.mark.parametrize("num_rows", [1, 2, BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1, 3 * BLOCK_ROWS + 7])
def test_of_equals_numpy_across_blocks(num_rows: int) -> None:
    vectors = np.random.default_rng(num_rows).normal(3, 2, (num_rows, 3)).astype(np.float32)
    check(Moments.of(vectors), vectors)


@pytest.mark.parametrize("offset", [0, 300, -60_000])
def test_fp16_far_from_zero_loses_nothing(offset: int) -> None:
    """Squares of 60,000 overflow fp16 and leave fp32 seven digits: only centred float64 sums get this right."""
    step = float(np.spacing(np.float16(abs(offset))))
    steps = np.random.default_rng(0).integers(-8, 9, (20_000, 4))
    vectors = (offset + step * steps).astype(np.float16)
    moments = Moments.of(vectors)
    check(moments, vectors)
    np.testing.assert_allclose(moments.std, step * steps.std(axis=0), rtol=1e-9)
    np.testing.assert_allclose(moments.covariance, step**2 * np.cov(steps.T, bias=True), rtol=1e-9)


def test_a_constant_channel_has_no_deviation() -> None:
    vectors = np.full((BLOCK_ROWS + 5, 2), 0.1, np.float16)
    np.testing.assert_array_equal(Moments.of(vectors).std, 0)


@given(
    values=hnp.arrays(np.float16, st.tuples(st.integers(1, 60), st.integers(1, 4)), elements={"min_value": -6e4}),
    cuts=st.lists(st.integers(0, 60), max_size=5),
)
def test_merging_equals_numpy_over_the_whole(values: NDArray[np.float16], cuts: list[int]) -> None:
    values = np.nan_to_num(values, posinf=65504)
    pieces = np.split(values, sorted(min(cut, len(values)) for cut in cuts))
    check(merge_all(Moments.of(piece) for piece in pieces), values)


def test_any_order_of_merging_agrees_and_the_same_order_gives_the_same_bits() -> None:
    rng = np.random.default_rng(1)
    pieces = [rng.normal(10.0**i, 1, (5 + i, 3)) for i in range(4)]
    whole = np.concatenate(pieces)
    for order in permutations(map(Moments.of, pieces)):
        first, second = merge_all(order), merge_all(order)
        check(first, whole)
        assert (first.mean.tobytes(), first.scatter.tobytes()) == (second.mean.tobytes(), second.scatter.tobytes())


def test_merging_is_a_tree_or_a_chain() -> None:
    rng = np.random.default_rng(2)
    a, b, c, d = (Moments.of(rng.normal(size=(n, 2))) for n in (3, 50, 1, 8))
    chain, tree = a.merge(b).merge(c).merge(d), a.merge(b).merge(c.merge(d))
    np.testing.assert_allclose(chain.covariance, tree.covariance, rtol=RTOL)
    np.testing.assert_allclose(chain.mean, tree.mean, rtol=RTOL)


def test_nothing_merged_changes_nothing() -> None:
    moments = Moments.of(np.random.default_rng(3).normal(size=(9, 2)))
    empty = Moments.of(np.empty((0, 2), np.float16))
    for merged in (moments.merge(empty), empty.merge(moments)):
        assert merged.count == 9
        assert merged.mean.tobytes() == moments.mean.tobytes()
        assert merged.scatter.tobytes() == moments.scatter.tobytes()
    assert empty.merge(empty).count == 0


# Norms and outliers


def naive_histogram(norms: NDArray[np.floating]) -> list[int]:
    counts = [0] * 128
    for norm in norms.ravel().tolist():
        place = 0
        while place < 127 and norm >= 2.0 ** ((place + 1 - 40) / 4):
            place += 1
        counts[place] += 1
    return counts


def test_the_bins_are_quarter_octaves() -> None:
    edges = norm_bin_edges()
    assert (len(edges), edges[0], edges[40], edges[44], edges[-1]) == (NORM_BINS + 1, 2.0**-10, 1, 2, 2.0**22)


@given(hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(0, 2.0**30, width=32)))
def test_a_histogram_is_the_naive_one(norms: NDArray[np.float32]) -> None:
    """Zero and what is beyond the bins count in the outermost; so do exact edges in the bin that they begin."""
    assert norm_histogram(norms).tolist() == naive_histogram(norms)


def test_edges_begin_their_bins() -> None:
    norms = np.array([0, 2.0**-30, 2.0**-10, 1, 2, 4, 2.0**22, 2.0**40])
    assert np.flatnonzero(norm_histogram(norms)).tolist() == [0, 40, 44, 48, 127]
    assert norm_histogram(norms)[[0, 127]].tolist() == [3, 2]


@given(hnp.arrays(np.float32, st.tuples(*[st.integers(1, 5)] * 3), elements=st.floats(0, 1e6, width=32) | st.just(0.0)))
def test_outliers_are_the_naive_ones(norms: NDArray[np.float32]) -> None:
    counts = np.zeros(norms.shape[1:], np.int64)
    for view in norms:
        ordered = sorted(view.ravel().tolist())
        middle = len(ordered) // 2
        median = ordered[middle] if len(ordered) % 2 else float(np.mean(np.float32(ordered[middle - 1 : middle + 1])))
        for i, j in np.ndindex(view.shape):
            counts[i, j] += view[i, j] > np.float32(3.0 * np.float32(median))
    np.testing.assert_array_equal(outliers_by_position(norms), counts)


# Of stores


def with_outliers(case: Case) -> Case:
    """Tamed features, so that norms differ little, and one cell in eight ten times as long; the failed stay NaN."""
    rng = np.random.default_rng(7)
    for values in case.features.values():
        tamed = rng.normal(0.2, 1, values.shape)
        tamed[rng.random(values.shape[:-1]) < 1 / 8] *= 10
        values[:] = np.where(np.isnan(values), values, tamed)
    return case


def check_statistics(store: Store, case: Case) -> None:
    """Against numpy over all that is read back."""
    rows, views = every_view(case.spec, [place for place, ok in zip(case.places, case.ok, strict=True) if ok])
    for size in case.spec.sizes:
        for kind in case.spec.tokens:
            values = getattr(store.read(rows, views, size=size), kind).astype(np.float64)
            check_kind(store.full_stats(size, kind), values)
            simple = store.stats(size, kind)
            assert simple.mean.tobytes() == store.full_stats(size, kind).mean.tobytes()


def check_kind(stats: FullStats, values: NDArray[np.float64]) -> None:
    vectors = values.reshape(-1, values.shape[-1])
    scale = np.abs(vectors).max()
    assert stats.count == len(vectors)
    np.testing.assert_allclose(stats.mean, vectors.mean(axis=0), rtol=RTOL, atol=RTOL * scale)
    np.testing.assert_allclose(stats.std, vectors.std(axis=0), rtol=RTOL, atol=RTOL * scale)
    np.testing.assert_allclose(stats.cov, np.cov(vectors.T, bias=True), rtol=RTOL, atol=RTOL * scale**2)
    norms = np.linalg.norm(values, axis=-1)
    assert stats.norms.sum() == norms.size
    below = np.concatenate([[0], stats.norms.cumsum()])
    inner = stats.norm_edges[1:-1, None]
    assert ((norms.ravel() * (1 + NEAR) < inner).sum(axis=1) <= below[1:-1]).all()
    assert (below[1:-1] <= (norms.ravel() * (1 - NEAR) < inner).sum(axis=1)).all()
    if values.ndim == 2:
        assert stats.outliers is None
        return
    bound = 3 * np.median(norms.reshape(len(norms), -1), axis=1)[:, None, None]
    assert stats.outliers is not None
    assert ((norms > bound * (1 + NEAR)).sum(axis=0) <= stats.outliers).all()
    assert (stats.outliers <= (norms > bound * (1 - NEAR)).sum(axis=0)).all()


PRECISIONS = [None, CODED, {"summary": "int8", "dense": "bitround:6"}]


@pytest.mark.parametrize("precision", PRECISIONS, ids=["fp16", "coded", "coded the other way"])
@pytest.mark.parametrize("tamed", [True, False])
def test_statistics_are_those_of_everything_read_back(
    tmp_path: Path, precision: dict[str, str] | None, tamed: bool
) -> None:
    case = make_case(make_spec(precision=precision), failed={0, 5, 8, 9, 10})
    store = write_store(with_outliers(case) if tamed else case, tmp_path / "s.zarr")
    check_statistics(store, case)
    outliers = store.full_stats(48, "dense").outliers
    assert outliers is not None and outliers.any()
    assert (store.totals["num_clipped"], store.totals["num_nonfinite"]) == (0 + 1 + 2, 0 + 2 + 4)


def test_the_order_of_commits_changes_no_bit(coded: Case, coded_store: Path, tmp_path: Path) -> None:
    for order in permutations(range(3)):
        path = tmp_path / "".join(map(str, order))
        write_store(coded, path, order=order)
        assert tree_digest(path) == tree_digest(coded_store)


def test_dead_channels(tmp_path: Path) -> None:
    case = make_case(make_spec())
    for values in case.features.values():
        values[..., 1] = 0.1
    store = write_store(case, tmp_path / "s.zarr")
    assert store.full_stats(32, "dense").dead_channels == [1] == store.full_stats(48, "summary").dead_channels


# Moments of parts


def remove(file: Path) -> None:
    file.unlink()


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def make_unfinished(case: Case, path: Path) -> Path:
    create_store(path, case.spec)
    writer = StoreWriter(path)
    for part in range(case.spec.num_parts):
        writer.commit(case.part(part))
    return path


@pytest.mark.parametrize("lose", [remove, flip, cut])
@pytest.mark.parametrize("precision", PRECISIONS, ids=["fp16", "coded", "coded the other way"])
@pytest.mark.parametrize("vectors_per_job", [8192, 20, 1])
def test_lost_moments_are_taken_from_the_features_to_the_last_bit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: dict[str, str] | None,
    lose: Callable[[Path], None],
    vectors_per_job: int,
) -> None:
    """Summaries and dense maps, in one group or many."""
    monkeypatch.setattr(writer, "VECTORS_PER_JOB", vectors_per_job)
    case = make_case(make_spec(precision=precision), failed={5})
    path = make_unfinished(case, tmp_path / "lost.zarr")
    whole = finish_store(shutil.copytree(path, tmp_path / "whole.zarr"))
    for part in (0, 2):
        lose(path / f"parts/{part:05d}.moments")
    assert tree_digest(finish_store(path).path) == tree_digest(whole.path)
    assert not list(path.glob("parts/*.moments")), "merged and removed"


@pytest.mark.parametrize(
    "spec",
    [
        make_spec(num_samples=2500, samples_per_part=4096, summary_dim=64, tokens=("summary",), grids={32: 1}),
        make_spec(num_samples=30, samples_per_part=32, num_views=2, tokens=("dense",), grids={32: 16}, dense_dim=40),
    ],
    ids=["summary", "dense"],
)
def test_lost_moments_of_a_large_part(tmp_path: Path, spec: writer.StoreSpec) -> None:
    """More vectors than one thread takes at a time, and a last chunk that is cut short."""
    case = with_outliers(make_case(spec, failed={7}))
    path = make_unfinished(case, tmp_path / "lost.zarr")
    whole = finish_store(shutil.copytree(path, tmp_path / "whole.zarr"))
    remove(path / "parts/00000.moments")
    assert tree_digest(finish_store(path).path) == tree_digest(whole.path)
    check_statistics(whole, case)


def test_moments_are_not_taken_from_damaged_features(case: Case, tmp_path: Path) -> None:
    path = make_unfinished(case, tmp_path / "s.zarr")
    remove(path / "parts/00001.moments")
    flip(path / "48/dense/c/1/0/0/0/0")
    with pytest.raises(PartCorruptError, match="eupe store repair"):
        finish_store(path)
    assert not open_store(path).finished


def test_threads_change_no_bit(case: Case, whole: Path, tmp_path: Path) -> None:
    create_store(tmp_path / "s.zarr", case.spec)
    for part, threads in enumerate((1, 2, 7)):
        StoreWriter(tmp_path / "s.zarr", threads=threads).commit(case.part(part))
    assert tree_digest(finish_store(tmp_path / "s.zarr").path) == tree_digest(whole)


# After an extension


def first_of(grown: Case, num_samples: int) -> Case:
    """Return the store as it was before it grew: its first samples."""
    spec = make_spec(num_samples=num_samples, precision=grown.spec.precision)
    arrays = {path: values[:num_samples] for path, values in grown.arrays.items()}
    return Case(spec, grown.rows[:num_samples], arrays)


@pytest.mark.parametrize("precision", PRECISIONS[:2], ids=["fp16", "coded"])
def test_statistics_after_an_extension_are_those_of_everything(
    tmp_path: Path, precision: dict[str, str] | None
) -> None:
    grown = with_outliers(make_case(make_spec(segments=[6, 5], precision=precision), failed={5, 7}))
    first = first_of(grown, 6)
    store = write_store(first, tmp_path / "s.zarr")
    check_statistics(store, first)
    store = extend_store(store, fingerprint="ef" * 32, num_new=5)
    assert not store.finished
    for part in (3, 2):
        StoreWriter(store.path).commit(grown.part(part))
    store = finish_store(store.path)
    check_statistics(store, grown)
    assert store.totals["num_parts"] == 4


def test_an_extension_does_not_read_the_features_from_before(tmp_path: Path) -> None:
    """Their statistics stand; a store of years takes in a day's pictures in no time."""
    grown = make_case(make_spec(segments=[6, 5]))
    store = write_store(first_of(grown, 6), tmp_path / "s.zarr")
    shutil.move(tmp_path / "s.zarr/32", tmp_path / "hidden")
    store = extend_store(store, fingerprint="ef" * 32, num_new=5)
    for part in (2, 3):
        StoreWriter(store.path).commit(grown.part(part))
    finish_store(store.path)
    shutil.copytree(tmp_path / "hidden", tmp_path / "s.zarr/32", dirs_exist_ok=True)
    for name in ("summary", "dense"):
        shutil.copytree(tmp_path / "hidden" / name / "c", tmp_path / "s.zarr/32" / name / "c", dirs_exist_ok=True)
    assert open_store(store.path).full_stats(32, "dense").count == 11 * 3 * 4


def test_a_part_records_its_own_norms_and_outliers(tmp_path: Path) -> None:
    case = with_outliers(make_case(make_spec(), failed={5}))
    store = write_store(case, tmp_path / "s.zarr")
    facts = [read_part_metadata(StoragePath.of(tmp_path / "s.zarr"), part) for part in range(3)]
    for path in case.features:
        assert facts[1]["norms"][path] == pytest.approx(
            naive_histogram(np.linalg.norm(case.arrays[path][[4, 6, 7]].astype(np.float64), axis=-1))
        )
        group = zarr.open_group(tmp_path / "s.zarr/stats" / path, mode="r")
        np.testing.assert_array_equal(group["norms"][:], np.sum([part["norms"][path] for part in facts], axis=0))
    assert facts[0]["outliers"].keys() == {"32/dense", "48/dense"}
    total = np.sum([part["outliers"]["48/dense"] for part in facts], axis=0)
    np.testing.assert_array_equal(store.full_stats(48, "dense").outliers, total)
