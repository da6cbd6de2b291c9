"""The stream: what a student is given is what the teachers saw, joined by key."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from making import make_corpus, make_store, picture

from eupe.corpus.views import ViewSpec, view_digest
from eupe.errors import ConfigError, CorpusError, StoreError
from eupe.evaluate.conflict import conflict
from eupe.store import Store
from eupe.store.precision import Calibration, Tokens, decode, encode
from eupe.train.targets import Request, TargetSet, TargetTokens, is_held_out, moved_keys, open_targets


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
    apart = (
        r"different corpora: they have no picture key in common \(a key of the first is class0/0000.png, one of the "
        r"second is elsewhere.png"
    )
    with pytest.raises(ConfigError, match=apart):
        open_targets([tiny_store.path, store.path], corpus=None, holdout=0.1)
    twin = make_corpus(tmp_path / "twin", count=4)
    picture(99).save(twin / "class1" / "0001.png")
    store = make_store(tmp_path / "b.zarr", twin, tiny_weights)
    with pytest.raises(ConfigError, match=r"class1/0001.png is a different picture"):
        open_targets([tiny_store.path, store.path], corpus=None, holdout=0.1)


def test_keys_that_differ_by_a_leading_folder_are_told_with_an_example_of_each(
    tmp_path: Path, tiny_weights: Path
) -> None:
    make_corpus(tmp_path / "c" / "inner", count=2)
    roots = tmp_path / "c", tmp_path / "c" / "inner"
    stores = [make_store(tmp_path / f"{i}.zarr", root, tiny_weights).path for i, root in enumerate(roots)]
    words = (
        r"have no picture key in common: the same picture is inner/class0/0000.png in the first and class0/0000.png .*"
        rf"\(inner/ and none\), .* \({roots[0]} and {roots[1]}\); extract .* the other's --corpus"
    )
    with pytest.raises(ConfigError, match=words):
        open_targets(stores, corpus=None, holdout=0.1)
    with pytest.raises(ConfigError, match=words):
        conflict(stores)


@pytest.mark.parametrize(
    ("first", "other", "folders"),
    [
        ({"a/x.png": "1", "a/y.png": "2"}, {"y.png": "2", "x.png": "1"}, "a/ and none"),
        ({"x.png": "1"}, {"data/t.parquet/x.png": "1"}, "none and data/t.parquet/"),
        ({"a/k/x.png": "1"}, {"b/c/k/x.png": "1"}, "a/ and b/c/"),
        ({"0/x.png": "1", "0/0/x.png": "2"}, {"x.png": "1", "0/x.png": "2"}, "0/ and none"),
        ({"a/x.png": "1", "b/x.png": "1", "b/y.png": "3"}, {"x.png": "1", "y.png": "3"}, "b/ and none"),
        ({"x.png": "1", "y.png": "1"}, {"x.png": "1", "y.png": "2"}, None),
        ({"a/x.png": "1"}, {"b/y.png": "1"}, None),
        ({"a/x.png": "1"}, {"x.png": "2"}, None),
    ],
)
def test_leading_folders_are_those_of_the_same_pictures(
    first: dict[str, str], other: dict[str, str], folders: str | None
) -> None:
    tables = [pa.table({"key": list(each), "sha256": list(each.values())}) for each in (first, other)]
    said = moved_keys(*tables)
    assert said is None if folders is None else said is not None and said.endswith(f"({folders})")


def test_other_views_are_refused(tmp_path: Path, tiny_corpus: Path, tiny_store: Store, tiny_weights: Path) -> None:
    views = ViewSpec(policy="rrc", num_views=2, seed=1)
    store = make_store(tmp_path / "s.zarr", tiny_corpus, tiny_weights, views=views)
    with pytest.raises(ConfigError, match=r"different views \(rrc:2 seed 0 and rrc:2 seed 1\)"):
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
    with pytest.raises(CorpusError, match="does not exist; give its location with --corpus"):
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
