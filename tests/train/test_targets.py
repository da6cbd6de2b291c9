"""The stream: what a student is given is what the teachers saw, joined by key."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from making import make_corpus, make_store, picture

from eupe.corpus.views import ViewSpec, view_digest
from eupe.errors import ConfigError, CorpusError, StoreError
from eupe.store import Store
from eupe.store.precision import Calibration, decode, encode
from eupe.store.reader import Tokens
from eupe.train.batch import Request, TargetTokens
from eupe.train.targets import TargetSet, is_held_out, open_targets


def load(targets: TargetSet, views: Sequence[tuple[int, int]], size: int = 64):  # type: ignore[no-untyped-def]
    with ThreadPoolExecutor(2) as pool:
        return targets.load(Request(views=np.array(views), size=size), pool=pool)


def test_replayed_views_equal_the_teachers_pixel_for_pixel(tiny_store: Store) -> None:
    """The digest was taken from the array that the teacher was given."""
    targets = open_targets([tiny_store.path], corpus=None, holdout=0.2)
    views = targets.views_of(np.ones(24, dtype=bool))
    batch = load(targets, views.tolist())
    rows = [tiny_store.samples["key"].to_pylist().index(key) for key in batch.keys]
    stored = tiny_store.read(rows, views[:, 1].tolist())
    assert [view_digest(view.numpy()) for view in batch.pixels] == tiny_store.read_digests(
        rows, views[:, 1].tolist()
    ).tolist()
    assert batch.targets[0].dense is not None
    assert np.array_equal(batch.targets[0].dense.decode().numpy(), stored.dense)


@pytest.mark.parametrize("precision", ["fp16", "bitround:4", "int8"])
def test_tokens_are_decoded_and_standardised_as_by_hand(precision: str) -> None:
    """Dense maps lie channel by channel, as a store gives them."""
    rng = np.random.default_rng(0)
    for cells in ((), (3, 5)):
        values = rng.normal(2, 9, (4, *cells, 7)).astype(np.float16)
        calibration = Calibration.of(values) if precision == "int8" else None
        coded = np.moveaxis(np.moveaxis(encode(values, precision, calibration), -1, 1).copy(), 1, -1)
        mean, std = rng.normal(0, 3, 7).astype(np.float32), rng.uniform(0.5, 2, 7).astype(np.float32)
        tokens, plain = Tokens(coded, precision, calibration), decode(coded, precision, calibration).astype(np.float64)
        kept = coded.copy()
        target = TargetTokens.of(tokens)
        for got, expected in (
            (target.standardised(torch.from_numpy(mean), torch.from_numpy(std)), (plain - mean) / std),
            (target.decode(), plain),
        ):
            assert got.dtype == torch.float32 and got.shape == values.shape
            np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-5)
        assert np.array_equal(coded, kept), "what was read is not changed"


def test_stores_are_joined_by_key_never_by_order(tmp_path: Path, tiny_weights: Path) -> None:
    """One store lacks pictures and has others in their rows; every target still belongs to its picture."""
    corpus = make_corpus(tmp_path / "c", count=10)
    full = make_store(tmp_path / "full.zarr", corpus, tiny_weights)
    (corpus / "class0" / "0000.png").rename(tmp_path / "aside.png")
    (corpus / "class2" / "0005.png").write_bytes(b"no longer a picture")
    partial = make_store(tmp_path / "partial.zarr", corpus, tiny_weights)
    (corpus / "class2" / "0005.png").unlink()
    picture(5).save(corpus / "class2" / "0005.png")
    targets = open_targets([full.path, partial.path], corpus=corpus, holdout=0.3)
    assert targets.num_joined == 8
    assert not {"class0/0000.png", "class2/0005.png"} & set(targets.keys)
    batch = load(targets, [(i, 1) for i in (7, 0, 3)])
    for target, store in zip(batch.targets, (full, partial), strict=True):
        keys = store.samples["key"].to_pylist()
        rows = store.samples["row"].to_pylist()
        expected = store.read([rows[keys.index(key)] for key in batch.keys], [1] * 3)
        assert target.summary is not None
        assert np.array_equal(target.summary.decode().numpy(), expected.summary)
    assert batch.targets[0].dense is not None and batch.targets[1].dense is not None
    np.testing.assert_allclose(batch.targets[0].dense.decode(), batch.targets[1].dense.decode(), atol=2e-3)


def test_targets_of_different_corpora_are_refused(tmp_path: Path, tiny_store: Store, tiny_weights: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    picture(1).save(other / "elsewhere.png")
    store = make_store(tmp_path / "a.zarr", other, tiny_weights)
    with pytest.raises(ConfigError, match="different corpora: they share no picture"):
        open_targets([tiny_store.path, store.path], corpus=None, holdout=0.1)
    twin = make_corpus(tmp_path / "twin", count=4)
    picture(99).save(twin / "class1" / "0001.png")
    store = make_store(tmp_path / "b.zarr", twin, tiny_weights)
    with pytest.raises(ConfigError, match=r"class1/0001.png is another picture"):
        open_targets([tiny_store.path, store.path], corpus=None, holdout=0.1)


def test_other_views_are_refused(tmp_path: Path, tiny_corpus: Path, tiny_store: Store, tiny_weights: Path) -> None:
    views = ViewSpec(policy="rrc", num_views=2, seed=1)
    store = make_store(tmp_path / "s.zarr", tiny_corpus, tiny_weights, views=views)
    with pytest.raises(ConfigError, match=r"different views \(rrc:2 seed 0 against rrc:2 seed 1\)"):
        open_targets([tiny_store.path, store.path], corpus=None, holdout=0.1)


def test_a_changed_picture_stops_training_before_it_starts(tmp_path: Path, tiny_weights: Path) -> None:
    corpus = make_corpus(tmp_path / "c", count=6)
    store = make_store(tmp_path / "s.zarr", corpus, tiny_weights)
    targets = open_targets([store.path], corpus=None, holdout=0.2)
    targets.check_views()
    picture(70).save(corpus / "class2" / "0002.png")
    with pytest.raises(CorpusError, match=r"class2/0002.png is not the one that the teacher"):
        targets.check_views()


def test_a_picture_that_is_gone_is_named(tmp_path: Path, tiny_weights: Path) -> None:
    corpus = make_corpus(tmp_path / "c", count=3)
    store = make_store(tmp_path / "s.zarr", corpus, tiny_weights)
    targets = open_targets([store.path], corpus=None, holdout=0.2)
    (corpus / "class1" / "0001.png").unlink()
    with pytest.raises(CorpusError, match=r"class1/0001.png .* --corpus"):
        load(targets, [(1, 0)])
    moved = corpus.rename(tmp_path / "moved")
    with pytest.raises(CorpusError, match="does not exist; give its place with --corpus"):
        open_targets([store.path], corpus=None, holdout=0.2)
    assert len(load(open_targets([store.path], corpus=moved, holdout=0.2), [(0, 0)]).pixels) == 1


def test_an_unfinished_store_is_refused(tmp_path: Path, tiny_corpus: Path, tiny_weights: Path) -> None:
    store = make_store(tmp_path / "s.zarr", tiny_corpus, tiny_weights)
    next((store.path.local / "parts").iterdir()).unlink()
    with pytest.raises(StoreError, match="1 of 1 parts are missing"):
        open_targets([store.path], corpus=None, holdout=0.2)


def test_holding_out_depends_on_the_key_alone_and_nests() -> None:
    keys = [f"folder/{i}.jpg" for i in range(4000)]
    small, large = ({key for key in keys if is_held_out(key, share)} for share in (0.1, 0.3))
    assert small < large
    assert abs(len(small) / 4000 - 0.1) < 0.02
    assert abs(len(large) / 4000 - 0.3) < 0.03
