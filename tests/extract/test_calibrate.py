"""Precision from the command's words to the values that are read: chosen, measured, recorded, pooled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from making import TWO_CROPS, make_corpus, make_store
from numpy.typing import NDArray

from eupe.corpus.index import index_folder
from eupe.errors import ConfigError
from eupe.extract.calibrate import sample_task
from eupe.extract.parts import store_spec
from eupe.store import Store
from eupe.store.precision import CANDIDATES
from eupe.teachers.resolve import resolve_teacher


def every_dense(store: Store) -> NDArray[np.float64]:
    rows, views = np.repeat(np.arange(24), 2).tolist(), [0, 1] * 24
    dense = store.read(rows, views).dense
    assert dense is not None
    return dense.astype(np.float64)


def standardised_cosines(kept: Store, exact: Store) -> NDArray[np.float64]:
    """Return the cosine of each dense token in both stores, standardised by the statistics of the exact store."""
    stats = exact.stats(64, "dense")
    a, b = ((every_dense(store) - stats.mean) / stats.std for store in (kept, exact))
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.fixture(scope="module")
def int8_store(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, tiny_weights: Path) -> Store:
    return make_store(tmp_path_factory.mktemp("int8") / "s.zarr", tiny_corpus, tiny_weights, precision="int8")


def test_int8_is_near_in_half_the_bytes_and_says_how_near(int8_store: Store, tiny_store: Store) -> None:
    measured = int8_store.spec.fidelity["measured"]["64/dense"]["int8"]
    kept = standardised_cosines(int8_store, tiny_store)
    assert kept.mean() > 0.9999
    assert abs(measured["mean"] - kept.mean()) < 1e-5 and abs(measured["p5"] - np.percentile(kept, 5)) < 2e-5
    assert int8_store.stored_bytes < 0.65 * tiny_store.stored_bytes
    stats, exact = int8_store.stats(64, "dense"), tiny_store.stats(64, "dense")
    values = every_dense(int8_store).reshape(-1, 64)
    np.testing.assert_allclose(stats.mean, values.mean(axis=0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(stats.std, exact.std, rtol=1e-2)


@pytest.mark.parametrize("fidelity", [0.999, 0.99999])
def test_fidelity_takes_the_cheapest_that_keeps_it(
    tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, tiny_store: Store, fidelity: float
) -> None:
    store = make_store(tmp_path / "s.zarr", tiny_corpus, tiny_weights, fidelity=fidelity)
    measured = store.spec.fidelity["measured"]
    assert store.spec.fidelity["asked"] == fidelity
    assert np.percentile(standardised_cosines(store, tiny_store), 5) > 1 - 1.1 * (1 - fidelity)
    for kind in ("dense", "summary"):
        tried = measured[f"64/{kind}"]
        assert set(tried) == set(CANDIDATES)
        chosen = tried[store.spec.precision[kind]]
        cheaper = [p for p in tried if tried[p]["share"] < chosen["share"]]
        assert cheaper and all(tried[p]["p5"] < fidelity for p in cheaper)


def test_a_lower_fidelity_costs_fewer_bytes(tmp_path: Path, tiny_corpus: Path, tiny_weights: Path) -> None:
    sizes = [
        make_store(tmp_path / f"{i}.zarr", tiny_corpus, tiny_weights, fidelity=fidelity).stored_bytes
        for i, fidelity in enumerate((0.99, 0.999, 0.999999))
    ]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3


def test_kinds_have_precisions_of_their_own(
    tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, tiny_store: Store
) -> None:
    store = make_store(tmp_path / "s.zarr", tiny_corpus, tiny_weights, precision="dense=bitround:5")
    assert store.spec.precision == {"summary": "fp16", "dense": "bitround:5"}
    ours, exact = store.read([3, 9], [0, 1]), tiny_store.read([3, 9], [0, 1])
    assert np.array_equal(ours.summary, exact.summary)
    assert ours.dense is not None and exact.dense is not None
    assert not (ours.dense.view(np.uint16) & 0b11111).any(), "of 10 mantissa bits, 5 are zero"
    np.testing.assert_allclose(ours.dense, exact.dense, rtol=2**-6, atol=1e-7)


def test_a_smaller_grid_is_the_mean_of_the_cells(
    tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, tiny_store: Store
) -> None:
    store = make_store(tmp_path / "s.zarr", tiny_corpus, tiny_weights, grid=2)
    pooled, whole = every_dense(store), every_dense(tiny_store)
    assert (pooled.shape, whole.shape) == ((48, 2, 2, 64), (48, 4, 4, 64))
    expected = np.stack([whole[:, r : r + 2, c : c + 2].mean(axis=(1, 2)) for r in (0, 2) for c in (0, 2)], axis=1)
    np.testing.assert_allclose(pooled, expected.reshape(pooled.shape), rtol=2e-3, atol=2e-3)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    corpus = index_folder(make_corpus(tmp_path / "c", count=3))

    def spec(**options: object) -> None:
        store_spec(
            resolve_teacher("timm:test_vit"),
            corpus,
            sizes=(64,),
            tokens=("summary", "dense"),
            weights_sha256="",
            dtype="fp32",
            **{"views": TWO_CROPS, **options},  # type: ignore[arg-type]
        )

    for precision in ("int4", "bitround:0", "bitround:10", "bitround", "patch=int8", "dense=int8,summary=half"):
        with pytest.raises(ConfigError, match="precision"):
            spec(precision=precision)
    with pytest.raises(ConfigError, match=r"--grid 3 does not divide the 4x4 map .* one of 1, 2, 4"):
        spec(grid=3)


def test_the_calibration_sample_spreads_over_the_corpus(tmp_path: Path) -> None:
    corpus = index_folder(make_corpus(tmp_path / "c", count=150))
    spec = store_spec(
        resolve_teacher("timm:test_vit"),
        corpus,
        views=TWO_CROPS,
        sizes=(64,),
        tokens=("dense",),
        weights_sha256="",
        dtype="fp32",
    )
    keys = [sample.key for sample in sample_task(spec, corpus).samples]
    everything = corpus.samples["key"].to_pylist()
    assert len(keys) == len(set(keys)) == 64
    assert keys[0] == everything[0] and keys[-1] == everything[-1]
