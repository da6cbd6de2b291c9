"""An audit tells a store that its teacher still makes from one that it does not."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from awkward import save_broken
from making import make_corpus, make_store, picture, random_weights
from mending import make_parts

from eupe.errors import ConfigError, CorpusError, DriftError, EupeError, StoreError, TeacherError
from eupe.extract.audit import AuditConfig, AuditReport, Cosines, Drift, audit, pick_samples, require_agreement
from eupe.store import Store, open_store
from eupe.store.writer import Part, Row, StoreWriter

Run = Callable[..., Any]


@pytest.mark.parametrize("precision", ["fp16", "bitround:4", "int8"])
def test_the_same_teacher_gives_the_same_features(
    tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, precision: str
) -> None:
    store = make_parts(tmp_path / "s.zarr", tiny_corpus, tiny_weights, precision=precision)
    calls: list[tuple[int, int]] = []
    config = AuditConfig(store=store.path, weights=tiny_weights, samples=20)
    report = audit(config, progress=lambda done, of: calls.append((done, of)))
    assert (report.num_samples, report.num_views, report.changed_views) == (20, 40, 0)
    assert (report.stored_dtype, report.computed_dtype) == ("fp32", "fp32")
    assert calls[-1] == (40, 40)
    assert [(d.path, d.precision, d.num_tokens) for d in report.drifts] == [
        ("64/summary", precision, 40),
        ("64/dense", precision, 40 * 16),
    ]
    for drift in report.drifts:
        assert drift.standardised.p5 > 0.9999
        assert drift.plain.p5 > 0.9999
    require_agreement(report, 0.999)


def test_pooled_maps_and_the_runs_of_another_arithmetic_are_compared(
    tmp_path: Path, tiny_corpus: Path, tiny_weights: Path
) -> None:
    store = make_store(tmp_path / "s.zarr", tiny_corpus, tiny_weights, grid=2)
    same = audit(AuditConfig(store=store.path, weights=tiny_weights, samples=4))
    other = audit(AuditConfig(store=store.path, weights=tiny_weights, samples=4, dtype="bf16"))
    assert same.drifts[1].num_tokens == 4 * 2 * 4
    assert other.computed_dtype == "bf16"
    assert other.drifts[1].standardised.mean < same.drifts[1].standardised.mean


def recommit(store: Store, **changes: Any) -> None:
    """The only part, with something of it changed; the statistics stay."""
    rows, views = np.repeat(np.arange(24), 2).tolist(), [0, 1] * 24
    stored = store.read(rows, views)
    arrays = {
        name: values.reshape(24, 2, *values.shape[1:])
        for name, values in vars(stored).items()
        if name != "layers" and values is not None
    }
    part = Part(
        0,
        [row_of(row) for row in store.samples.to_pylist()],
        arrays["boxes"],
        arrays["flips"],
        store.read_digests(rows, views).reshape(24, 2),
        {"64/summary": arrays["summary"], "64/dense": arrays["dense"]},
    )
    StoreWriter(store.path).commit(replace(part, **{name: change(part) for name, change in changes.items()}))


def row_of(row: dict[str, Any]) -> Row:
    return Row(*(row[name] for name in ("key", "sha256", "label", "width", "height", "error")))


@pytest.fixture
def store(tmp_path: Path, tiny_store: Store) -> Store:
    """Return a copy of the tiny store, which has one part, for a test to change."""
    shutil.copytree(Path(tiny_store.path), tmp_path / "s.zarr")
    return open_store(tmp_path / "s.zarr")


def test_features_that_drifted_are_told_from_those_that_did_not(store: Store, tiny_weights: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.2, (24, 2, 4, 4, 64))
    std = store.stats(64, "dense").std
    recommit(
        store,
        features=lambda part: {
            **part.features,
            "64/dense": (part.features["64/dense"] + noise * std).astype(np.float16),
        },
    )
    report = audit(AuditConfig(store=store.path, weights=tiny_weights))
    summary, dense = report.drifts
    assert summary.standardised.least > 0.9999
    expected = 1 / np.sqrt(1 + 0.2**2)
    assert dense.standardised.mean == pytest.approx(expected, abs=0.01)
    assert dense.standardised.least <= dense.standardised.p5 <= dense.standardised.mean
    with pytest.raises(DriftError, match="64/dense"):
        require_agreement(report, 0.999)
    require_agreement(report, 0.9)


def test_views_of_other_pixels_are_counted(store: Store, tiny_weights: Path) -> None:
    def changed(part: Part) -> Any:
        digests = part.digests.copy()
        digests[3, 1] += 1
        digests[7] += 1
        return digests

    recommit(store, digests=changed)
    assert audit(AuditConfig(store=store.path, weights=tiny_weights, samples=24)).changed_views == 3


def test_samples_are_always_the_same_and_never_failed_ones(tmp_path: Path, tiny_weights: Path) -> None:
    corpus = make_corpus(tmp_path / "c", count=6)
    save_broken(corpus)
    store = make_store(tmp_path / "s.zarr", corpus, tiny_weights)
    three, all_of_them = pick_samples(store, 3), pick_samples(store, 99)
    assert len(three) == 3
    assert three.equals(pick_samples(open_store(store.path), 3))
    assert set(three["key"].to_pylist()) < set(all_of_them["key"].to_pylist())
    assert all_of_them["status"].to_pylist() == ["ok"] * 6


def test_what_an_audit_takes_must_be_there(tmp_path: Path, tiny_weights: Path) -> None:
    corpus = make_corpus(tmp_path / "c", count=6)
    store = make_store(tmp_path / "s.zarr", corpus, tiny_weights)
    other = random_weights("test_vit", tmp_path / "other.safetensors", seed=5)
    refused(store, TeacherError, "give the original file with --weights", weights=other)
    refused(store, EupeError, "made by a different teacher", weights=tiny_weights, teacher="timm:test_vit2")
    refused(store, ConfigError, "--samples must be at least 1", weights=tiny_weights, samples=0)
    refused(store, ConfigError, "--dtype fp8 is unknown", weights=tiny_weights, dtype="fp8")
    shutil.move(corpus, tmp_path / "moved")
    refused(store, CorpusError, "give their folder with --corpus", weights=tiny_weights)
    moved = AuditConfig(store=store.path, weights=tiny_weights, corpus=tmp_path / "moved")
    assert audit(moved).changed_views == 0
    picture(99).save(tmp_path / "moved" / "class0" / "0000.png")
    refused(store, CorpusError, "1 pictures .* have changed", weights=tiny_weights, corpus=tmp_path / "moved")
    (Path(store.path) / "parts/00000.parquet").unlink()
    refused(store, StoreError, "is not finished", weights=tiny_weights)


def refused(store: Store, error: type[EupeError], words: str, **config: Any) -> None:
    with pytest.raises(error, match=words):
        audit(AuditConfig(store=store.path, **config))


def test_the_verb_prints_a_table_and_leaves_with_1_on_drift(
    tiny_store: Store, tiny_weights: Path, run_eupe: Run
) -> None:
    words = ["store", "audit", tiny_store.path, "--weights", tiny_weights, "--samples", 5]
    outcome = run_eupe(*words)
    assert outcome.code == 0, outcome.err
    assert "stored in fp32, computed in fp32" in outcome.out
    assert [line.split()[3] for line in outcome.out.splitlines()[1:5]] == ["standardised", "plain"] * 2
    drifted = run_eupe(*words, "--dtype", "bf16", "--least", "0.99999", "--json")
    assert drifted.code == 1
    assert "differs from what its teacher computes here" in " ".join(drifted.err.split())
    report = json.loads(drifted.out)
    assert (report["num_samples"], report["computed_dtype"]) == (5, "bf16")
    assert run_eupe(*words, "--dtype", "bf16", "--least", "0.9").code == 0
    assert run_eupe(*words, "--least", "2").code == 2


def test_a_cosine_that_is_no_number_is_drift() -> None:
    none = Cosines(float("nan"), float("nan"), float("nan"))
    report = AuditReport("s", 1, 1, "fp32", "fp32", 0, (Drift("64/dense", "fp16", 1, none, none),))
    with pytest.raises(DriftError):
        require_agreement(report, 0.5)
