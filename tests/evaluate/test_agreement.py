"""Agreement against slow references, and on a tiny run."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import TINY_STUDENT, make_store, random_weights
from torch import Tensor

from eupe.common.compute import normalise
from eupe.errors import ConfigError, RunError
from eupe.evaluate import agreement as module
from eupe.evaluate.agreement import agreement, agreement_results
from eupe.evaluate.open_run import open_run
from eupe.store import Store
from eupe.train.config import TrainConfig
from eupe.train.loop import train
from eupe.train.targets import open_targets


@pytest.fixture(scope="module")
def run(tiny_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    config = TrainConfig(targets=(tiny_store.path,), student=TINY_STUDENT, out=out, steps=60, batch_size=16)
    train(replace(config, head_width=64, holdout=0.3, lr=3e-3, dtype="fp32"))
    return out


def test_cosines_equal_a_slow_computation_on_held_out_views_alone(run: Path, tiny_store: Store) -> None:
    report = agreement(run)
    opened = open_run(run)
    targets = open_targets([tiny_store.path], corpus=None, holdout=0.3)
    views = targets.views_of(targets.held_out)
    assert report.num_views == len(views) > 0
    stats = tiny_store.stats(64, "summary")
    predicted, truth = predicted_and_stored(opened, targets, tiny_store, views)
    trained_on, trained_truth = predicted_and_stored(opened, targets, tiny_store, targets.views_of(~targets.held_out))
    wanted = (trained_truth - stats.mean) / stats.std
    gain = (trained_on * wanted).sum() / (trained_on**2).sum()
    said = gain * predicted * stats.std + stats.mean

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)))

    measured = report.targets[0].kinds["summary"]
    assert measured.cosine == pytest.approx(cosine(said, truth), abs=1e-5)
    assert measured.cosine_mean == pytest.approx(cosine(np.broadcast_to(stats.mean, truth.shape), truth), abs=1e-5)
    normalised = cosine(predicted, (truth - stats.mean) / stats.std)
    assert measured.normalised_cosine == pytest.approx(normalised, abs=1e-5)


def gram_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased linear CKA (Song et al. 2012, equation 5) with whole matrices."""

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        k, m = (side @ side.T * (1 - np.eye(len(side))) for side in (a, b))
        n = len(a)
        cross = (k.sum(axis=0) * m.sum(axis=0)).sum()
        return float(((k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * cross) / (n * (n - 3)))

    x, y = (np.asarray(side, np.float64) for side in (x, y))
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))


def test_cka_is_of_the_prediction_and_of_the_students_own_tokens(run: Path, tiny_store: Store) -> None:
    opened = open_run(run)
    targets = open_targets([tiny_store.path], corpus=None, holdout=0.3)
    views = targets.views_of(targets.held_out)
    stored = tiny_store.read(tiny_store.rows([targets.keys[i] for i in views[:, 0]]), views[:, 1].tolist())
    pixels = torch.stack([opened_view(targets, *view, stored, i) for i, view in enumerate(views.tolist())])
    spec = opened.distiller.encoder.spec
    with torch.inference_mode():
        summary, dense = opened.distiller.predict(pixels)[0]
        own = opened.distiller.encoder(normalise(pixels, spec.mean, spec.std))
    width = dense.shape[-1]
    std = tiny_store.stats(64, "dense").std
    kinds = agreement(run).targets[0].kinds
    summaries = (summary.numpy() * tiny_store.stats(64, "summary").std, own.summary.numpy())
    for said, measured in zip(summaries, (kinds["summary"].cka, kinds["summary"].cka_own), strict=True):
        assert measured == pytest.approx(gram_cka(said, stored.summary), abs=1e-4)
    tokens = (dense.reshape(-1, width).numpy() * std, own.dense.reshape(-1, own.dense.shape[-1]).numpy())
    truth = stored.dense.reshape(-1, width)
    for said, measured in zip(tokens, (kinds["dense"].cka, kinds["dense"].cka_own), strict=True):
        assert measured == pytest.approx(gram_cka(said, truth), abs=1e-4)
    assert kinds["summary"].cka > kinds["summary"].cka_untrained


def test_dense_cka_is_of_some_tokens_of_each_view_where_there_are_many(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_tokens = agreement(run).targets[0].kinds["dense"]
    monkeypatch.setattr(module, "MOST_TOKENS", 4 * agreement(run).num_views)
    some = agreement(run).targets[0].kinds["dense"]
    assert some.cka != all_tokens.cka
    assert some.cka == pytest.approx(all_tokens.cka, abs=0.1)
    assert some.cosine == all_tokens.cosine


def test_each_target_leaves_a_result_for_the_run_and_one_untrained(
    run: Path, tiny_store: Store, tmp_path: Path, run_eupe: Callable[..., Any]
) -> None:
    kept = tmp_path / "results.jsonl"
    report = json.loads(run_eupe("eval", "agreement", run, "--k", 4, "--results", kept, "--json").out)
    (target,) = report["targets"]
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()][-2:] == lines
    assert lines == [result.to_json() for result in agreement_results(agreement(run, neighbours=4))]
    trained, untrained = lines
    assert (trained["subject"], trained["kind"], trained["untrained"]) == (str(run), "run", False)
    assert untrained["untrained"]
    for kind, a in target["kinds"].items():
        assert trained["scores"][f"cosine/{kind}"] == a["cosine"]
        assert trained["scores"][f"cka_own/{kind}"] == a["cka_own"]
        assert untrained["scores"][f"normalised/{kind}"] == a["normalised_untrained"]
        assert untrained["scores"][f"cka/{kind}"] == a["cka_untrained"]
    normalised = [a["normalised_cosine"] for a in target["kinds"].values()]
    assert trained["scores"]["normalised"] == pytest.approx(np.mean(normalised))
    assert trained["scores"]["mutual_neighbours"] == target["mutual_neighbours"]
    assert trained["protocol"]["dtype"] == "fp32"
    assert trained["protocol"]["k"] == 4 and trained["protocol"]["holdout"] == 0.3
    assert trained["data"]["views"] == report["num_views"] and trained["data"]["path"] == str(tiny_store.path)


def predicted_and_stored(opened, targets, store, views):  # type: ignore[no-untyped-def]
    """The student's normalised summaries and the stored ones, float64, view by view."""
    rows = [store.samples["key"].to_pylist().index(targets.keys[i]) for i in views[:, 0]]
    stored = store.read(rows, views[:, 1].tolist())
    pixels = torch.stack([opened_view(targets, *view, stored, i) for i, view in enumerate(views.tolist())])
    with torch.inference_mode():
        summary, _ = opened.distiller.predict(pixels)[0]
    return summary.double().numpy(), stored.summary.astype(float)


def opened_view(targets, sample: int, number: int, stored, i: int) -> Tensor:  # type: ignore[no-untyped-def]
    """A held-out view by plain Pillow."""
    image = targets.read_image(sample).crop(tuple(stored.boxes[i].tolist())).resize((64, 64), 3)
    pixels = np.asarray(image)
    return torch.from_numpy((pixels[:, ::-1] if stored.flips[i] else pixels).copy())


def test_few_views_have_as_many_neighbours_as_there_are(run: Path, tiny_store: Store, run_eupe: Any) -> None:
    """Unless more are asked for in so many words."""
    few = json.loads((run / "config.json").read_text())
    few["config"]["holdout"] = 0.12
    held_out = int(open_targets([tiny_store.path], corpus=None, holdout=0.12).held_out.sum())
    whole = (run / "config.json").read_text()
    try:
        (run / "config.json").write_text(json.dumps(few))
        views = 2 * held_out
        assert 1 < views <= 10
        report = agreement(run)
        assert report.neighbours == views - 2, "two views of each picture"
        assert report.targets[0].mutual_neighbours == 1.0, "all are neighbours of all"
        refused = run_eupe("eval", "agreement", run, "--k", 10)
        assert refused.code == 2 and f"--k 10 does not fit {views} views" in refused.err
    finally:
        (run / "config.json").write_text(whole)


def test_training_shows_against_the_untrained_and_the_mean(run: Path) -> None:
    for kind in agreement(run).targets[0].kinds.values():
        assert kind.normalised_cosine > kind.normalised_untrained + 0.1
        assert kind.cosine > kind.cosine_untrained
        assert kind.cosine > kind.cosine_mean


def test_no_neighbours_are_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="--k must be at least 1"):
        agreement(run, neighbours=0)


def test_a_store_made_anew_is_not_what_the_run_learned_from(
    tmp_path: Path, tiny_corpus: Path, tiny_weights: Path
) -> None:
    store = make_store(tmp_path / "s.zarr", tiny_corpus, tiny_weights)
    out = tmp_path / "run"
    train(TrainConfig(targets=(store.path,), student=TINY_STUDENT, out=out, steps=1, batch_size=4, holdout=0.3))
    shutil.rmtree(store.path)
    make_store(tmp_path / "s.zarr", tiny_corpus, random_weights("test_vit", tmp_path / "o.safetensors", seed=8))
    with pytest.raises(RunError, match="is not the store that"):
        agreement(out)


def test_an_unfinished_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a training run"):
        agreement(tmp_path)
