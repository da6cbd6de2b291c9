"""A corpus that gained pictures is extended by exactly those; one that lost or changed some is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from making import TINY_STUDENT, make_corpus, make_store, picture

from eupe.store import open_store
from eupe.train.targets import open_targets

Run = Callable[..., Any]


def words(corpus: Path, weights: Path, *more: object) -> list[object]:
    given = ["extract", "--teacher", "timm:test_vit", "--weights", weights, "--corpus", corpus, "--size", 64]
    return [*given, "--views", "rrc:2", "--dtype", "fp32", "--json", *more]


@pytest.mark.usefixtures("joined")
def test_a_corpus_grows_and_only_what_is_new_is_computed(tmp_path: Path, tiny_weights: Path, run_eupe: Run) -> None:
    corpus, out = make_corpus(tmp_path / "c", count=7), tmp_path / "s.zarr"
    options = ("--precision", "dense=int8", "--grid", 2, "--pixels")
    make_store(out, corpus, tiny_weights, precision="dense=int8", grid=2, pixels=True)
    before = {file: file.stat().st_mtime_ns for file in out.glob("[!s]*/**/c/0/**/*") if file.is_file()}
    assert len(before) == 6
    stats = open_store(out).stats(64, "summary")

    for i in (30, 31, 32):
        picture(i).save(corpus / "class1" / f"000{i - 30}a.png")
    again = run_eupe(*words(corpus, tiny_weights, "--out", out, *options))
    assert again.code == 0, again.err
    assert not json.loads(again.out)["cached"]
    store = open_store(out)
    assert store.finished and store.spec.corpus["segments"] == [7, 3]
    assert {file: file.stat().st_mtime_ns for file in before} == before, "what was there was written again"
    new = [f"class1/000{i}a.png" for i in range(3)]
    assert store.keys[7:] == new

    whole = make_store(tmp_path / "whole.zarr", corpus, tiny_weights)
    assert set(store.keys) == set(whole.keys)
    a, b = store.read(store.rows(new), [1, 0, 1]), whole.read(whole.rows(new), [1, 0, 1])
    assert np.array_equal(a.boxes, b.boxes)
    np.testing.assert_allclose(a.summary, b.summary, rtol=1e-2, atol=1e-2)  # type: ignore[arg-type]
    grown, exact = store.stats(64, "summary"), whole.stats(64, "summary")
    assert (stats.count, grown.count, exact.count) == (14, 20, 20)
    np.testing.assert_allclose(grown.mean, exact.mean, atol=1e-3)
    np.testing.assert_allclose(grown.std, exact.std, rtol=1e-2)
    assert open_targets([store.path, whole.path], corpus=None, holdout=0.3).num_joined == 10

    cached = run_eupe(*words(corpus, tiny_weights, "--out", out, *options))
    assert json.loads(cached.out)["cached"]


@pytest.mark.parametrize("loss", ["gone", "changed"])
def test_a_corpus_that_lost_or_changed_pictures_is_refused_by_name(
    tmp_path: Path, tiny_weights: Path, run_eupe: Run, loss: str
) -> None:
    corpus = make_corpus(tmp_path / "c", count=4)
    store = make_store(tmp_path / "s.zarr", corpus, tiny_weights)
    picture(50).save(corpus / "class0" / "new.png")
    (corpus / "class2" / "0002.png").unlink()
    if loss == "changed":
        picture(51).save(corpus / "class2" / "0002.png")
    outcome = run_eupe(*words(corpus, tiny_weights, "--out", store.path))
    assert outcome.code == 2
    assert f"1 {loss} (class2/0002.png); restore them, or give another --out" in " ".join(outcome.err.split())
    assert open_store(store.path).spec == store.spec and open_store(store.path).finished


def test_other_options_never_extend(tmp_path: Path, tiny_weights: Path, run_eupe: Run) -> None:
    corpus = make_corpus(tmp_path / "c", count=4)
    store = make_store(tmp_path / "s.zarr", corpus, tiny_weights)
    picture(50).save(corpus / "class0" / "new.png")
    outcome = run_eupe(*words(corpus, tiny_weights, "--out", store.path, "--precision", "int8"))
    assert outcome.code == 2
    assert "precision.dense: stored fp16, requested int8" in " ".join(outcome.err.split())


def test_the_same_store_is_found_under_any_name(
    tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, run_eupe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory of stores is searched for the same store first when no --out is given."""
    monkeypatch.chdir(tmp_path)
    make_store(tmp_path / "store" / "my-old-name.zarr", tiny_corpus, tiny_weights)
    make_store(tmp_path / "store" / "other.zarr", tiny_corpus, tiny_weights, fidelity=0.999)
    (tmp_path / "store" / "broken.zarr").mkdir()
    (tmp_path / "store" / "broken.zarr" / "zarr.json").write_text("{")
    report = json.loads(run_eupe(*words(tiny_corpus, tiny_weights)).out)
    assert report["cached"] and report["store"].endswith("my-old-name.zarr")
    report = json.loads(run_eupe(*words(tiny_corpus, tiny_weights, "--fidelity", 0.999)).out)
    assert report["cached"] and report["store"].endswith("other.zarr")
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == ["broken.zarr", "my-old-name.zarr", "other.zarr"]

    listed = json.loads(run_eupe("store", "ls", "store", "--json").out)
    assert [(e["name"], e["teacher"], e["views"], e["sizes"], e["complete"]) for e in listed] == [
        ("my-old-name.zarr", "timm:test_vit", "rrc:2 seed 0", [64], 1.0),
        ("other.zarr", "timm:test_vit", "rrc:2 seed 0", [64], 1.0),
    ]
    assert listed[0]["precision"] == "summary=fp16,dense=fp16" != listed[1]["precision"]
    (tmp_path / "store" / "my-old-name.zarr" / "parts" / "00000.parquet").unlink()
    assert "0.0%" in run_eupe("store", "ls", "store").out
    missing = run_eupe("store", "ls", "nowhere")
    assert missing.code == 2 and "does not exist" in missing.err


def test_training_takes_int8_targets(tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, run_eupe: Run) -> None:
    losses = []
    for precision in ("fp16", "int8"):
        store = make_store(tmp_path / f"{precision}.zarr", tiny_corpus, tiny_weights, precision=precision)
        run = tmp_path / precision
        given = ["train", "--targets", store.path, "--student", TINY_STUDENT, "--out", run, "--steps", 4]
        outcome = run_eupe(*given, "--batch-size", 8, "--holdout", 0.3, "--dtype", "fp32", "--json")
        assert outcome.code == 0, outcome.err
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-3)
