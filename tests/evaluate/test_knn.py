"""k-NN against scikit-learn, and on stores, runs and folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import make_corpus, make_store
from PIL import Image
from planted import ade20k
from sklearn.neighbors import KNeighborsClassifier

from eupe.corpus.views import ViewSpec
from eupe.errors import ConfigError
from eupe.evaluate import neighbours as module
from eupe.evaluate.knn import accuracy, knn, summaries_of
from eupe.evaluate.neighbours import nearest
from eupe.evaluate.subject import Subject, open_subjects
from eupe.models.encoder import build_encoder, save_encoder
from eupe.store import Store


def subject_of(path: object, *, untrained: bool = False) -> Subject:
    return open_subjects([str(path)], {}, untrained=untrained)[-1]


def clusters(seed: int, count: int) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, count)
    return generator.normal(size=(count, 4)) + 0.8 * labels[:, None], labels


@pytest.mark.parametrize("k", [1, 5, 10])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_accuracy_equals_scikit_learns_leaving_one_picture_out(k: int, metric: Any) -> None:
    features, labels = clusters(0, 60)
    groups = np.arange(60) // 2
    labels = labels[groups * 2]
    correct = []
    for i in range(60):
        others = groups != groups[i]
        model = KNeighborsClassifier(k, metric="euclidean" if metric == "l2" else "cosine", algorithm="brute")
        model.fit(features[others], labels[others])
        near = model.kneighbors(features[i : i + 1])[1][0]
        votes = np.bincount(labels[others][near], minlength=3)
        tied = np.flatnonzero(votes == votes.max())
        correct.append(labels[i] == tied[0] if len(tied) == 1 else None)
    own, said = torch.from_numpy(features), torch.from_numpy(labels)
    got = accuracy(own, said, own, said, k=k, metric=metric, num_labels=3, groups_N=torch.from_numpy(groups))
    sure = [c for c in correct if c is not None]
    assert sum(sure) / 60 <= got <= (sum(sure) + correct.count(None)) / 60
    if k == 1:
        assert got == sum(sure) / 60


def test_a_training_split_votes_as_in_scikit_learn_however_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of the bank are merged into the same neighbours."""
    (bank, bank_labels), (queries, labels) = clusters(1, 101), clusters(2, 40)
    model = KNeighborsClassifier(3, algorithm="brute").fit(bank, bank_labels)
    tensors = [torch.from_numpy(x) for x in (queries, labels, bank, bank_labels)]
    expected = float((model.predict(queries) == labels).mean())
    near = model.kneighbors(queries)[1]
    untied = [len(set(bank_labels[row])) < 3 for row in near]
    expected_untied = [model.predict(queries[i : i + 1])[0] == labels[i] for i in range(40) if untied[i]]
    for rows, block in ((1024, 65536), (7, 10), (1, 2)):
        monkeypatch.setattr(module, "QUERIES", rows)
        monkeypatch.setattr(module, "BANK", block)
        got = accuracy(*tensors, k=3, metric="l2", num_labels=3)
        assert sum(expected_untied) <= round(got * 40) <= sum(expected_untied) + untied.count(False)
    assert abs(got - expected) < 0.2


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_single_precision_finds_the_same_neighbours_far_from_the_origin(metric: Any) -> None:
    """Distances are float32, as on a GPU; the mean of an encoder's features is longer than what tells them apart."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(300, 64)) + 300 * generator.normal(size=64) / 8
    near = nearest(*[torch.from_numpy(features).float()] * 2, None, k=10, metric=metric, exact=torch.float32)
    lengths = np.linalg.norm(features, axis=1, keepdims=True) if metric == "cosine" else 1.0
    scaled = features.astype(np.float32).astype(np.float64) / lengths
    expected = np.linalg.norm(scaled[:, None] - scaled[None], axis=-1).argsort(axis=1, kind="stable")[:, :10]
    shared = [len(set(ours.tolist()) & set(theirs.tolist())) for ours, theirs in zip(near, expected, strict=True)]
    assert np.mean(shared) > 9.99


def test_options_of_the_verb_decide(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    """Pictures of one colour each: dark and light ones have one direction, but are far apart."""
    for split, shades in (("train", (40, 200)), ("val", (60, 180))):
        for label, shade in zip(("dark", "light"), shades, strict=True):
            for i in range(4 if label == "light" else 3):
                place = tmp_path / split / label / f"{i}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), (shade + i, shade + 2 * i, shade)).save(place)
    words = ["eval", "knn", "pixels", "--data", tmp_path, "--json"]

    def judged(*more: object) -> Any:
        (result,) = json.loads(run_eupe(*words, *more).out)["results"]
        return result

    assert judged("--k", 3)["scores"]["accuracy"] == 1.0
    assert judged("--k", 7)["scores"]["accuracy"] == pytest.approx(4 / 7), "all vote, and most are light"
    assert judged("--k", 3, "--metric", "cosine")["scores"]["accuracy"] < 1.0
    assert judged("--k", 3, "--size", 16)["protocol"]["size"] == 16


def test_a_store_is_judged_by_its_own_labels(tiny_store: Store) -> None:
    result = knn(subject_of(tiny_store.path), k=3)
    assert result.data == {"path": str(tiny_store.path), "train": 48, "val": 48, "labels": 3}
    assert result.scores["majority"] == pytest.approx(1 / 3)
    assert 0 <= result.scores["accuracy"] <= 1
    val = summaries_of(subject_of(tiny_store.path), None, size=None).val
    assert [key.split("/")[0] for key in val.pictures] == list(val.labels)
    row = tiny_store.samples["key"].to_pylist().index(val.pictures[7])
    expected = tiny_store.read([row], [1]).summary
    assert expected is not None
    assert np.array_equal(val.features[7].numpy(), expected[0].astype(np.float32))


def test_a_run_is_judged_on_labelled_pictures_as_its_own_store_is(tmp_path: Path, tiny_corpus: Path) -> None:
    """The student's summaries of centre views are those that extraction stores for it, found by content."""
    torch.manual_seed(3)
    run = tmp_path / "run"
    save_encoder(build_encoder("test_vit", size=64), run)
    (run / "config.json").write_text(
        '{"config": {"seed": 3}, "targets": [], "mix": [], "pictures": [], "total_steps": 1}'
    )
    store = make_store(
        tmp_path / "s.zarr", tiny_corpus, run / "student.safetensors", teacher=str(run), views=ViewSpec()
    )
    ours = summaries_of(subject_of(run), tiny_corpus, size=64).val
    theirs = summaries_of(subject_of(store.path), tiny_corpus, size=None).val
    assert ours.labels == theirs.labels
    assert torch.nn.functional.cosine_similarity(ours.features, theirs.features).min() > 0.999
    trained, untrained = (
        knn(subject_of(run, untrained=fresh), data=tiny_corpus, k=3, size=64) for fresh in (False, True)
    )
    assert untrained.scores == trained.scores
    assert (trained.name, untrained.name) == (str(run), f"{run}, untrained")


def test_splits_of_a_folder_are_train_and_val(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    make_corpus(tmp_path / "data" / "train", count=12)
    make_corpus(tmp_path / "data" / "val", count=6)
    report = json.loads(
        run_eupe("eval", "knn", "pixels", "--data", tmp_path / "data", "--k", 1, "--size", 32, "--json").out
    )
    (result,) = report["results"]
    assert (result["data"]["train"], result["data"]["val"]) == (12, 6)
    assert result["scores"]["accuracy"] == 1.0, "the val pictures are the first of the train pictures"
    assert result["protocol"]["judged_by"] == "the training split"


def test_what_cannot_be_judged_is_refused(
    tmp_path: Path, tiny_store: Store, tiny_weights: Path, tiny_corpus: Path
) -> None:
    with pytest.raises(ConfigError, match="--k 47 does not fit"):
        knn(subject_of(tiny_store.path), k=47)
    with pytest.raises(ConfigError, match="--metric"):
        knn(subject_of(tiny_store.path), metric="dot")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no features at 32 px, only at 64"):
        knn(subject_of(tiny_store.path), size=32)
    with pytest.raises(ConfigError, match="pixels is not a store; give labelled pictures"):
        knn(subject_of("pixels"))
    with pytest.raises(ConfigError, match="holds pictures with annotations, which are not labels"):
        knn(subject_of("pixels"), data=ade20k(tmp_path / "ade"))
    flat = make_corpus(tmp_path / "c", count=3) / "class0"
    store = make_store(tmp_path / "s.zarr", flat, tiny_weights)
    with pytest.raises(ConfigError, match="no class folders"):
        knn(subject_of(store.path))


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
    (result,) = json.loads(run_eupe("eval", "knn", store.path, "--json").out)["results"]
    assert result["scores"]["accuracy"] > 0.5
    assert result["scores"]["majority"] == 0.1
