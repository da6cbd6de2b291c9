"""Logistic regression against scikit-learn's."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import make_corpus
from sklearn.linear_model import LogisticRegression

from eupe.errors import ConfigError
from eupe.evaluate.knn import summaries_of
from eupe.evaluate.linear import PENALTIES, few_labels, fit_logistic, linear
from eupe.evaluate.subject import open_subjects
from eupe.store import Store


def data(seed: int, count: int = 120, labels: int = 4, width: int = 6) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    codes = np.arange(count) % labels
    centres = generator.normal(size=(labels, width))
    return centres[codes] + generator.normal(size=(count, width)), codes


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0])
def test_weights_equal_scikit_learns(penalty: float) -> None:
    features, codes = data(0)
    fitted = fit_logistic(torch.from_numpy(features), torch.from_numpy(codes), penalty=penalty, num_labels=4)
    theirs = LogisticRegression(C=1 / (penalty * len(codes)), tol=1e-12, max_iter=10_000).fit(features, codes)
    ours = torch.softmax(fitted.logits(torch.from_numpy(features)), dim=1).numpy()
    assert np.abs(ours - theirs.predict_proba(features)).max() < 1e-6
    assert np.abs(fitted.weight_CD.numpy() - theirs.coef_).max() < 1e-5


def test_a_stores_summaries_are_split_by_picture(tiny_store: Store) -> None:
    """All views of a picture are on one side; the accuracy is that of scikit-learn on the same split."""
    (subject,) = open_subjects([str(tiny_store.path)], {})
    result = linear(subject, penalties=(1e-2,))
    assert result.data["train"] + result.data["val"] == 48
    assert result.data["val"] % 2 == 0
    assert result.scores["penalty"] == 1e-2
    from eupe.train.targets import is_held_out

    whole = summaries_of(subject, None, size=None).val
    held_out = np.array([is_held_out(key, 0.2) for key in whole.pictures])
    features, labels = whole.features.double().numpy(), np.array(whole.labels)
    mean, std = features[~held_out].mean(axis=0), features[~held_out].std(axis=0)
    scaled = (features - mean) / std
    count = int((~held_out).sum())
    model = LogisticRegression(C=1 / (1e-2 * count), tol=1e-12, max_iter=10_000)
    model.fit(scaled[~held_out], labels[~held_out])
    assert result.scores["accuracy"] == pytest.approx(model.score(scaled[held_out], labels[held_out]), abs=1e-12)


def test_the_best_penalty_of_several_is_taken(tmp_path: Path) -> None:
    make_corpus(tmp_path / "train", count=60)
    make_corpus(tmp_path / "val", count=30)
    (subject,) = open_subjects(["pixels"], {})
    swept = linear(subject, data=tmp_path, size=32)
    assert swept.scores["penalty"] in PENALTIES
    assert swept.protocol["judged_on"] == "the val split"
    fixed = linear(subject, data=tmp_path, penalties=(swept.scores["penalty"],), size=32)
    assert fixed.scores == swept.scores
    assert swept.scores["accuracy"] > 0.9, "half of the val pictures are train pictures, and few colours tell the rest"


def test_without_splits_a_penalty_is_chosen_among_the_pictures_that_are_not_judged(tmp_path: Path) -> None:
    (subject,) = open_subjects(["pixels"], {})
    swept = linear(subject, data=make_corpus(tmp_path, count=60), size=32)
    assert swept.scores["penalty"] in PENALTIES
    assert swept.protocol["judged_on"] == "20% of the pictures"


def test_what_cannot_be_learnt_is_refused(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    (subject,) = open_subjects(["pixels"], {})
    one = make_corpus(tmp_path / "one", count=6, classes=1)
    with pytest.raises(ConfigError, match=r"labelled pictures of .*one are of one class, class0"):
        linear(subject, data=one, size=32)
    few = make_corpus(tmp_path / "few", count=3)
    outcome = run_eupe("eval", "linear", "pixels", "--data", few, "--size", 32)
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    with pytest.raises(ConfigError, match="--penalty must be above 0"):
        linear(subject, data=few, penalties=(0.0,))


def test_the_size_of_the_views_decides(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    words = ["eval", "linear", "pixels", "--data", make_corpus(tmp_path, count=24), "--penalty", 1, "--json"]
    small, large = (json.loads(run_eupe(*words, "--size", size).out)["results"][0] for size in (16, 64))
    assert (small["protocol"]["size"], large["protocol"]["size"]) == (16, 64)
    refused = run_eupe(*words[:-3], "--penalty", "nan")
    assert refused.code == 2 and "--penalty must be above 0, and finite" in refused.err


def test_penalties_of_the_verb_decide(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    corpus = make_corpus(tmp_path / "c", count=40)
    words = ["eval", "linear", "pixels", "--data", corpus, "--size", 32, "--json"]
    weak, strong = (json.loads(run_eupe(*words, "--penalty", p).out)["results"][0] for p in (1e-3, 1000.0))
    assert (weak["scores"]["penalty"], strong["scores"]["penalty"]) == (1e-3, 1000.0)
    assert weak["scores"]["accuracy"] > strong["scores"]["accuracy"]


def test_a_share_of_the_labels_is_of_each_class_and_within_a_larger_share(tiny_store: Store) -> None:
    (subject,) = open_subjects([str(tiny_store.path)], {})
    whole = summaries_of(subject, None, size=None).val
    shares = {share: few_labels(whole, share, seed=0) for share in (1e-9, 0.3, 0.7, 1.0)}
    assert shares[1.0].pictures == whole.pictures
    for smaller, larger in pairwise(shares.values()):
        assert set(smaller.pictures) < set(larger.pictures)
    assert sorted(set(shares[1e-9].labels)) == sorted(set(whole.labels)), "at least one of each"
    for label in set(whole.labels):
        keys = {key for key, named in zip(whole.pictures, whole.labels, strict=True) if named == label}
        kept = [key for key, named in zip(shares[0.3].pictures, shares[0.3].labels, strict=True) if named == label]
        assert len(set(kept)) == round(0.3 * len(keys)) and len(kept) == 2 * len(set(kept)), "all views of each"
    assert few_labels(whole, 0.3, seed=1).pictures != shares[0.3].pictures


def test_fewer_labels_and_their_seed_decide_and_are_recorded(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    corpus = make_corpus(tmp_path / "c", count=60)
    words = ["eval", "linear", "pixels", "--data", corpus, "--size", 32, "--penalty", 0.01, "--json"]
    whole, few, other = (
        json.loads(run_eupe(*words, *more).out)["results"][0]
        for more in ((), ("--label-share", 0.1), ("--label-share", 0.1, "--seed", 1))
    )
    assert whole["data"]["train"] > few["data"]["train"] == other["data"]["train"]
    assert whole["scores"]["accuracy"] > few["scores"]["accuracy"]
    assert few["protocol"]["label_share"] == 0.1 and "label_share" not in whole["protocol"]
    assert (few["protocol"]["label_seed"], other["protocol"]["label_seed"]) == (0, 1)
    assert any("learned from the labels of" in note for note in few["notes"])
    for share in ("0", "1.5", "nan"):
        refused = run_eupe(*words, "--label-share", share)
        assert refused.code == 2 and f"--label-share must be above 0 and at most 1, got {share}" in refused.err
    refused = run_eupe(*words, "--seed", 1)
    assert refused.code == 2 and "--seed 1 chooses the pictures of --label-share" in refused.err
