"""k-NN against scikit-learn, and on stores and runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import make_corpus, make_store
from sklearn.neighbors import KNeighborsClassifier

from eupe.corpus.index import index_folder
from eupe.corpus.views import ViewSpec
from eupe.encoder import build_encoder, load_encoder, save_encoder
from eupe.errors import ConfigError
from eupe.evaluate.knn import accuracy, embed, knn, stored_summaries
from eupe.store import Store


@pytest.mark.parametrize("k", [1, 5, 10])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_accuracy_equals_scikit_learns_leaving_one_picture_out(k: int, metric: Any) -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 60)
    groups = np.arange(60) // 2
    labels = labels[groups * 2]
    features = generator.normal(size=(60, 4)) + 0.8 * labels[:, None]
    correct = []
    for i in range(60):
        others = groups != groups[i]
        model = KNeighborsClassifier(k, metric="euclidean" if metric == "l2" else "cosine", algorithm="brute")
        model.fit(features[others], labels[others])
        near = model.kneighbors(features[i : i + 1])[1][0]
        votes = np.bincount(labels[others][near], minlength=3)
        tied = np.flatnonzero(votes == votes.max())
        correct.append(labels[i] == tied[0] if len(tied) == 1 else None)
    got = accuracy(torch.from_numpy(features), torch.from_numpy(labels), torch.from_numpy(groups), k=k, metric=metric)
    sure = [c for c in correct if c is not None]
    assert sum(sure) / 60 <= got <= (sum(sure) + correct.count(None)) / 60
    if k == 1:
        assert got == sum(sure) / 60


def test_a_store_is_judged_by_its_own_labels(tiny_store: Store) -> None:
    report = knn(tiny_store.path, k=3)
    assert (report.num_queries, report.num_labels, report.k) == (48, 3, 3)
    assert report.majority == pytest.approx(1 / 3)
    assert 0 <= report.accuracy <= 1
    assert report.untrained is None
    summaries, labels, keys = stored_summaries(tiny_store)
    assert [key.split("/")[0] for key in keys] == labels
    row = tiny_store.samples["key"].to_pylist().index(keys[7])
    expected = tiny_store.read([row], [1]).summary
    assert expected is not None
    assert np.array_equal(summaries[7].numpy(), expected[0].astype(np.float32))


def test_a_run_is_embedded_on_a_labelled_folder(tmp_path: Path, tiny_corpus: Path) -> None:
    """The student's summaries of centre views are those that extraction stores for it."""
    torch.manual_seed(3)
    save_encoder(build_encoder("test_vit", size=64), tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(
        '{"config": {"seed": 3}, "targets": [], "mix": [], "pictures": [], "total_steps": 1}'
    )
    store = make_store(
        tmp_path / "s.zarr",
        tiny_corpus,
        tmp_path / "run" / "student.safetensors",
        teacher=str(tmp_path / "run"),
        views=ViewSpec(),
    )
    ours = embed(load_encoder(tmp_path / "run"), index_folder(tiny_corpus))
    theirs, _, _ = stored_summaries(store)
    assert torch.nn.functional.cosine_similarity(ours, theirs).min() > 0.999
    report = knn(tmp_path / "run", corpus=tiny_corpus, k=3)
    assert report.untrained == report.accuracy
    assert report.num_queries == 24


def test_what_cannot_be_judged_is_refused(tmp_path: Path, tiny_store: Store, tiny_weights: Path) -> None:
    with pytest.raises(ConfigError, match="--k 47 does not fit"):
        knn(tiny_store.path, k=47)
    with pytest.raises(ConfigError, match="--metric"):
        knn(tiny_store.path, metric="dot")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="leave --corpus out"):
        knn(tiny_store.path, corpus=tmp_path)
    flat = make_corpus(tmp_path / "c", count=3) / "class0"
    store = make_store(tmp_path / "s.zarr", flat, tiny_weights)
    with pytest.raises(ConfigError, match="no class folders"):
        knn(store.path)


def test_real_features_know_digits(assets: Path, tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    """DINOv2 tells handwritten digits apart far better than guessing."""
    store = make_store(
        tmp_path / "d.zarr",
        assets / "digits",
        assets / "weights" / "dinov2-small",
        teacher="dinov2",
        views=ViewSpec(),
        sizes=(56,),
    )
    report = json.loads(run_eupe("eval", "knn", store.path, "--json").out)
    assert report["accuracy"] > 0.5
    assert report["majority"] == 0.1
