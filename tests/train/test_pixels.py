"""A store that keeps its views trains alone, on the very pixels that the pictures would give."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from making import TINY_STUDENT, make_corpus, make_store, picture

from eupe.errors import CorpusError, StoreError
from eupe.store import Store
from eupe.train.config import TrainConfig
from eupe.train.loop import train
from eupe.train.targets import Request, TargetSet, open_targets


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return make_corpus(tmp_path / "c", count=8)


@pytest.fixture
def store(tmp_path: Path, corpus: Path, tiny_weights: Path) -> Store:
    (corpus / "class0" / "bad.png").write_bytes(b"no picture")
    return make_store(tmp_path / "s.zarr", corpus, tiny_weights, sizes=(64, 96), pixels=True)


def pixels(targets: TargetSet, size: int) -> np.ndarray:  # type: ignore[type-arg]
    with ThreadPoolExecutor(2) as pool:
        return targets.load(Request(views=targets.views_of(np.ones(8, bool)), size=size), pool=pool).pixels.numpy()


@pytest.mark.parametrize("size", [64, 96])
def test_kept_views_are_the_rendered_ones(tmp_path: Path, corpus: Path, store: Store, size: int) -> None:
    rendered = pixels(open_targets([store.path], corpus=corpus, holdout=0.2), size)
    corpus.rename(tmp_path / "gone")
    alone = open_targets([store.path], corpus=None, holdout=0.2)
    alone.check_views()
    assert np.array_equal(pixels(alone, size), rendered)
    assert np.array_equal(rendered, store.read_pixels(*zip(*views_of(store), strict=True), size=size))
    with_zarr = zarr.open_array(store.path.local / f"{size}/pixels", mode="r")
    assert np.array_equal(np.asarray(with_zarr[store.rows(store.keys)]).reshape(rendered.shape), rendered)


def views_of(store: Store) -> list[tuple[int, int]]:
    return [(row, view) for row in store.rows(store.keys) for view in range(2)]


def test_a_run_without_the_corpus_equals_the_one_with_it(tmp_path: Path, corpus: Path, store: Store) -> None:
    def loss(out: str, given: Path | None) -> float:
        config = TrainConfig(
            targets=(store.path,),
            student=TINY_STUDENT,
            out=tmp_path / out,
            steps=3,
            batch_size=4,
            holdout=0.5,
            corpus=given,
        )
        return train(config).validation["timm:test_vit"]["dense"]["raw"]

    with_corpus = loss("with", corpus)
    corpus.rename(tmp_path / "gone")
    assert loss("alone", None) == with_corpus


def test_a_size_that_is_not_kept_needs_the_pictures(tmp_path: Path, corpus: Path, store: Store) -> None:
    targets = open_targets([store.path], corpus=None, holdout=0.2)
    assert pixels(targets, 32).shape == (16, 32, 32, 3)
    corpus.rename(tmp_path / "gone")
    with pytest.raises(CorpusError, match=r"keep pixels at 64, 96 px, not at 32, .* give --size 64, or its location"):
        open_targets([store.path], corpus=None, holdout=0.2).require_pictures(32)


def test_pictures_that_are_given_are_the_ones_that_are_used(tmp_path: Path, corpus: Path, store: Store) -> None:
    picture(91).save(corpus / "class0" / "0000.png")
    open_targets([store.path], corpus=None, holdout=0.2).check_views()
    with pytest.raises(CorpusError, match=r"class0/0000\.png is not the one"):
        open_targets([store.path], corpus=corpus, holdout=0.2).check_views()


def test_a_store_without_pixels_says_so(tiny_store: Store) -> None:
    with pytest.raises(StoreError, match="keeps no pixels; extract with --pixels"):
        tiny_store.read_pixels([0], [0])
