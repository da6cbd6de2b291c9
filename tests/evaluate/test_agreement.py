"""Agreement against slow references, and on a tiny run."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from making import TINY_STUDENT, make_store, random_weights
from torch import Tensor

from eupe.errors import ConfigError, RunError
from eupe.evaluate.agreement import agreement, mutual_neighbours
from eupe.evaluate.run import open_run
from eupe.store import Store
from eupe.train.config import TrainConfig
from eupe.train.loop import train
from eupe.train.targets import open_targets


def slow_mutual_neighbours(a: Tensor, b: Tensor, k: int) -> float:
    def nearest(x: Tensor, i: int) -> set[int]:
        cosine = [float(x[i] @ x[j] / (x[i].norm() * x[j].norm())) for j in range(len(x))]
        return set(sorted((j for j in range(len(x)) if j != i), key=lambda j: -cosine[j])[:k])

    return float(np.mean([len(nearest(a, i) & nearest(b, i)) / k for i in range(len(a))]))


@pytest.mark.parametrize("k", [1, 3, 8])
def test_mutual_neighbours_equal_a_slow_count(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    a, b = torch.randn(12, 5, generator=generator), torch.randn(12, 3, generator=generator)
    assert mutual_neighbours(a, b, k=k) == pytest.approx(slow_mutual_neighbours(a, b, k))
    assert mutual_neighbours(a, 5 * a, k=k) == 1.0


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
