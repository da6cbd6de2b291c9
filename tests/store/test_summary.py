"""A store's summary against numpy over everything that is read back from it.

Tolerance: both sides work in float64; sums of up to thousands of terms differ by far less than 1e-9 of their magnitude.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from store_cases import Case, every_view, make_case, make_spec, write_store

from eupe.errors import StoreError
from eupe.store import Store, open_store
from eupe.store.summary import StoreSummary, TokenSummary, summarise
from eupe.store.writer import StoreWriter, create_store

RTOL = 1e-9
DEAD = [1, 7]
CELL = (2, 1)
FAILED = {5}
GRID, CHANNELS, SAMPLES, VIEWS = 4, 120, 30, 2


@pytest.fixture(scope="module")
def planted() -> Case:
    """Normal tokens of falling spread; two dense channels never change, a cell is loud in every view but the failed."""
    spec = make_spec(
        num_samples=SAMPLES, num_views=VIEWS, samples_per_part=8, grids={64: GRID}, summary_dim=3, dense_dim=CHANNELS
    )
    case = make_case(spec, failed=FAILED)
    rng = np.random.default_rng(0)
    scale = np.geomspace(4, 0.1, CHANNELS)
    dense = rng.normal(0.5, 1, (SAMPLES, VIEWS, GRID, GRID, CHANNELS)) * scale
    dense[..., DEAD] = 0.3
    dense[:, :, *CELL] *= 20
    dense[..., DEAD] = 0.3
    summary = rng.normal(3, 1, (SAMPLES, VIEWS, 3))
    features = {"64/dense": dense.astype(np.float16), "64/summary": summary.astype(np.float16)}
    for values in features.values():
        values[list(FAILED)] = np.nan
    return replace(case, arrays={**case.arrays, **features})


@pytest.fixture(scope="module")
def store(planted: Case, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """`planted` on disk. Not to be changed."""
    return write_store(planted, tmp_path_factory.mktemp("summary") / "planted.zarr")


@pytest.fixture(scope="module")
def summary(store: Store) -> StoreSummary:
    return summarise(store)


def token(summary: StoreSummary, kind: str) -> TokenSummary:
    return next(t for t in summary.tokens if t.kind == kind)


def read_back(store: Store, size: int, kind: str) -> NDArray[np.float64]:
    """Every valid view's tokens, [views, ..., D]."""
    valid = [i for i in range(store.spec.num_samples) if i not in FAILED]
    features = store.read(*every_view(store.spec, valid), size=size)
    values = getattr(features, kind)
    return np.asarray(values, np.float64)


@pytest.mark.parametrize("kind", ["dense", "summary"])
def test_channels_and_directions_are_those_of_numpy(store: Store, summary: StoreSummary, kind: str) -> None:
    got, vectors = token(summary, kind), read_back(store, 64, kind)
    vectors = vectors.reshape(-1, vectors.shape[-1])
    std = vectors.std(axis=0)
    assert (got.count, got.num_channels) == vectors.shape
    np.testing.assert_allclose(got.std_range, (std.min(), np.median(std), std.max()), rtol=RTOL, atol=RTOL)
    values = np.linalg.svd(vectors - vectors.mean(axis=0), compute_uv=False) ** 2 / len(vectors)
    np.testing.assert_allclose(got.eigenvalues, values, rtol=RTOL, atol=RTOL * values[0])
    assert got.effective_rank == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=RTOL)
    for first in (1, 10, 100):
        assert got.explained(first) == pytest.approx(values[:first].sum() / values.sum(), rel=RTOL)


@pytest.mark.parametrize("kind", ["dense", "summary"])
def test_norms_are_as_exact_as_their_bins(store: Store, summary: StoreSummary, kind: str) -> None:
    """A bin's geometric middle is within an eighth of an octave of what is in it; the median lies in its bin."""
    got, vectors = token(summary, kind), read_back(store, 64, kind)
    norms = np.linalg.norm(vectors, axis=-1).ravel()
    np.testing.assert_array_equal(got.norms, np.histogram(norms, got.norm_edges)[0])
    assert 2**-0.125 <= got.mean_norm / norms.mean() <= 2**0.125
    assert 2**-0.25 <= got.median_norm / np.median(norms) <= 2**0.25


def test_the_median_is_interpolated_within_its_bin(summary: StoreSummary) -> None:
    edges = summary.tokens[0].norm_edges
    middle = np.flatnonzero(np.isclose(edges, 16.0))[0]
    norms = np.zeros(len(edges) - 1, np.int64)
    norms[middle] = 10
    only = replace(summary.tokens[0], norms=norms)
    assert only.median_norm == pytest.approx(16 * 2**0.125)
    assert only.mean_norm == pytest.approx(16 * 2**0.125)
    norms[middle + 4] = 30
    assert only.median_norm == pytest.approx(32 * 2 ** (0.25 / 3))
    assert only.mean_norm == pytest.approx((10 * 16 + 30 * 32) / 40 * 2**0.125)


def test_dead_channels_are_found(summary: StoreSummary) -> None:
    assert list(token(summary, "dense").dead_channels) == DEAD
    assert token(summary, "summary").dead_channels == ()


def test_outliers_are_counted_where_they_are(store: Store, summary: StoreSummary) -> None:
    got = token(summary, "dense")
    norms = np.linalg.norm(read_back(store, 64, "dense"), axis=-1)
    outlying = np.stack([view > 3 * np.median(view) for view in norms])
    assert got.outlier_rates is not None
    np.testing.assert_allclose(got.outlier_rates, outlying.mean(axis=0), rtol=RTOL)
    assert got.outlier_share == pytest.approx(outlying.mean(), rel=RTOL)
    assert got.outlier_cell == CELL
    assert got.outlier_rates[CELL] == 1
    without = token(summary, "summary")
    assert (without.outliers, without.outlier_rates, without.outlier_share, without.outlier_cell) == (None,) * 4


def test_no_outlier_has_no_cell(summary: StoreSummary) -> None:
    none = replace(token(summary, "dense"), outliers=np.zeros((GRID, GRID), np.int64))
    assert none.outlier_cell is None
    assert none.outlier_share == 0


def test_the_stores_own_numbers(store: Store, summary: StoreSummary) -> None:
    assert summary.num_failed == len(FAILED)
    assert summary.num_clipped == sum(range(store.spec.num_parts))
    assert summary.stored_bytes == store.stored_bytes
    raw = 2 * (SAMPLES - 1) * VIEWS * (GRID * GRID * CHANNELS + 3)
    assert summary.stored_share == pytest.approx(store.stored_bytes / raw)


def test_where_nothing_varies_there_is_no_direction(tmp_path: Path) -> None:
    case = make_case(make_spec(num_samples=3, tokens=("summary",), grids={32: 2}))
    still = np.ones_like(case.arrays["32/summary"])
    got = summarise(write_store(replace(case, arrays={**case.arrays, "32/summary": still}), tmp_path / "s.zarr"))
    assert got.tokens[0].effective_rank == 0
    assert got.tokens[0].explained(1) == 0
    assert got.tokens[0].dead_channels == (0, 1, 2, 3, 4)


def test_every_size_and_kind_has_its_turn(whole: Path) -> None:
    tokens = summarise(open_store(whole)).tokens
    assert [t.path for t in tokens] == ["32/summary", "32/dense", "48/summary", "48/dense"]


def test_the_fidelity_is_that_of_the_precision_chosen(summary: StoreSummary, store: Store) -> None:
    assert token(summary, "dense").fidelity is None
    numbers = {p: {"mean": m, "p5": m, "share": m} for p, m in (("fp16", 1.0), ("int8", 0.9))}
    spec = replace(store.spec, fidelity={"num_views": 8, "measured": {"64/dense": numbers}})
    measured = summarise(Store(store.path, spec))
    assert token(measured, "dense").fidelity == numbers["fp16"]
    assert token(measured, "summary").fidelity is None


def test_json_holds_the_numbers_without_the_matrix(summary: StoreSummary) -> None:
    plain = json.loads(json.dumps(summary.to_json(), allow_nan=False))
    dense, got = plain["tokens"]["64/dense"], token(summary, "dense")
    assert dense["dead_channels"] == DEAD
    assert dense["outlier_cell"] == list(CELL)
    assert dense["explained"] == {str(k): got.explained(k) for k in (1, 10, 100)}
    assert sum(dense["norms"]) == dense["count"] == got.count
    assert len(dense["norm_edges"]) == len(dense["norms"]) + 1
    assert 0 not in (dense["norms"][0], dense["norms"][-1])
    assert len(dense["std"]) == len(dense["eigenvalues"]) == CHANNELS
    assert plain["num_clipped"] == summary.num_clipped


def test_an_unfinished_store_says_so(planted: Case, tmp_path: Path) -> None:
    create_store(tmp_path / "s.zarr", planted.spec)
    StoreWriter(tmp_path / "s.zarr").commit(planted.part(0))
    with pytest.raises(StoreError, match="is not finished: 3 of 4 parts are missing"):
        summarise(open_store(tmp_path / "s.zarr"))
