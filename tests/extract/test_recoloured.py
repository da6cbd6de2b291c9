"""A store of recoloured views, made for real: everybody replays its parameters to the pixels of the teacher."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from making import make_corpus, make_store
from mending import BATCH, Crews, files
from PIL import Image

from eupe.corpus.pictures import decode_image
from eupe.corpus.views import Photometric, ViewSpec, apply_photometric, draw_view, view_digest
from eupe.errors import ConfigError, CorpusError
from eupe.extract.audit import AuditConfig, audit
from eupe.extract.repair import RepairConfig, repair
from eupe.store import Store, open_store
from eupe.store.catalogue import describe
from eupe.store.dataset import StoreDataset
from eupe.store.verify import verify
from eupe.store.writer import Part, Row, StoreWriter
from eupe.train.targets import Request, TargetSet, open_targets

VIEWS = ViewSpec(policy="rrc", num_views=2, photometric="eupe")
SIZES = (64, 96)
BROKEN = "class0/broken.png"
Run = Callable[..., Any]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures and one that is none. Not to be changed."""
    folder = make_corpus(tmp_path_factory.mktemp("pictures") / "c", count=10)
    (folder / BROKEN).write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tiny_weights: Path) -> Store:
    """Return a finished store of recoloured views of the corpus, with pixels; tests must not change it."""
    path = tmp_path_factory.mktemp("stores") / "s.zarr"
    return make_store(path, corpus, tiny_weights, views=VIEWS, sizes=SIZES, pixels=True)


@pytest.fixture
def store(whole: Store, tmp_path: Path) -> Store:
    """Return a copy of the store for a test to damage."""
    return open_store(shutil.copytree(whole.path.local, tmp_path / "s.zarr"))


def replayed(folder: Path, key: str, box: list[int], flip: bool, params: list[float], size: int) -> Pixels:
    """Return a view's pixels, replayed as FORMAT.md describes it, without the renderer."""
    view = decode_image((folder / key).read_bytes()).crop(tuple(box)).resize((size, size), Image.Resampling.BICUBIC)
    view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view
    return apply_photometric(np.asarray(view), Photometric(*params))


def all_views(targets: TargetSet, size: int) -> Pixels:
    with ThreadPoolExecutor(2) as pool:
        views = targets.views_of(np.ones(targets.num_joined, bool))
        return targets.load(Request(views=views, size=size), pool=pool).pixels.numpy()


def test_what_zarr_reads_replays_to_the_digests_and_the_pixels(corpus: Path, whole: Store) -> None:
    group = zarr.open_group(whole.path.local, mode="r")
    params = np.asarray(group["photometric"])
    assert params.shape == (11, 2, 8) and params.dtype == np.float32
    assert len(np.unique(params[~np.isnan(params).any(axis=(1, 2))].reshape(-1, 8), axis=0)) == 20
    for sample in whole.samples.to_pylist():
        row = sample["row"]
        if sample["key"] == BROKEN:
            assert np.isnan(params[row]).all() and not np.asarray(group["digests"])[row].any()
            continue
        for k in range(2):
            box, flip = (np.asarray(group[name])[row, k].tolist() for name in ("boxes", "flips"))
            for size in SIZES:
                view = replayed(corpus, sample["key"], box, flip, params[row, k].tolist(), size)
                assert np.array_equal(np.asarray(group[f"{size}/pixels"])[row, k], view)
                if size == SIZES[0]:
                    assert view_digest(view) == int(np.asarray(group["digests"])[row, k])


def test_what_is_stored_is_what_is_drawn(corpus: Path, whole: Store) -> None:
    for key, features in whole.items():
        with Image.open(corpus / key) as image:
            assert features.params == [draw_view(VIEWS, key, k, *image.size) for k in range(2)]
    item = StoreDataset(whole)[5]
    assert item["photometric"].shape == (8,)


@pytest.mark.parametrize("size", [*SIZES, 80])
def test_the_student_sees_the_teachers_pixels_at_any_size(corpus: Path, whole: Store, size: int) -> None:
    targets = open_targets([whole.path], corpus=corpus, holdout=0.1)
    targets.check_views()
    seen = all_views(targets, size)
    stored = whole.read(*zip(*[(row, k) for row in whole.rows(whole.keys) for k in range(2)], strict=True))
    assert stored.photometric is not None
    expected = [
        replayed(corpus, whole.keys[i // 2], box, flip, params, size)
        for i, (box, flip, params) in enumerate(
            zip(stored.boxes.tolist(), stored.flips.tolist(), stored.photometric.tolist(), strict=True)
        )
    ]
    assert np.array_equal(seen, np.stack(expected))
    if size in SIZES:
        kept = open_targets([whole.path], corpus=None, holdout=0.1)
        kept.check_views()
        assert np.array_equal(all_views(kept, size), seen)


def test_only_the_same_changes_join(tmp_path: Path, corpus: Path, whole: Store, tiny_weights: Path) -> None:
    plain = make_store(tmp_path / "plain.zarr", corpus, tiny_weights, views=replace(VIEWS, photometric="none"))
    assert "photometric" not in files(plain.path) and "photometric" not in plain.spec.views
    assert np.array_equal(plain.read([0], [0]).boxes, whole.read([0], [0]).boxes)
    with pytest.raises(ConfigError, match=r"different views \(rrc:2 photometric eupe seed 0 and rrc:2 seed 0\)"):
        open_targets([whole.path, plain.path], corpus=None, holdout=0.1)
    twin = make_store(tmp_path / "twin.zarr", corpus, tiny_weights, views=VIEWS)
    targets = open_targets([whole.path, twin.path], corpus=corpus, holdout=0.1)
    targets.check_views()
    assert len(all_views(targets, 64)) == 20
    assert describe(whole).views == "rrc:2 photometric eupe seed 0"


def recommit(store: Store, *, row: int, **changes: Any) -> None:
    """The only part with something changed about one sample."""
    n, k = store.spec.num_samples, store.spec.num_views
    places = np.repeat(np.arange(n), k).tolist(), np.tile(np.arange(k), n).tolist()
    features = {size: store.read(*places, size=size) for size in store.spec.sizes}
    stored = features[store.spec.sizes[0]]
    assert stored.photometric is not None
    params = stored.photometric.reshape(n, k, 8)
    rows = [{name: v for name, v in row.items() if name not in ("row", "status")} for row in store.samples.to_pylist()]
    rows[row] |= {name: value for name, value in changes.items() if name == "error"}
    params[row] = changes.get("photometric", params[row])
    part = Part(
        0,
        [Row(**row) for row in rows],
        stored.boxes.reshape(n, k, 4),
        stored.flips.reshape(n, k),
        store.read_digests(*places).reshape(n, k),
        {
            f"{size}/{kind}": values.reshape(n, k, *values.shape[1:])
            for size, f in features.items()
            for kind, values in (("summary", f.summary), ("dense", f.dense))
            if values is not None
        },
        {size: store.read_pixels(*places, size=size).reshape(n, k, size, size, 3) for size in store.spec.sizes},
        photometric=params,
    )
    StoreWriter(store.path).commit(part)


def test_other_parameters_under_the_same_specification_are_found(corpus: Path, whole: Store, store: Store) -> None:
    key = whole.keys[2]
    recommit(store, row=whole.rows([key])[0], photometric=np.array(Photometric(brightness=1.1), np.float32))
    targets = open_targets([whole.path, store.path], corpus=corpus, holdout=0.1)
    with pytest.raises(ConfigError, match=f"hold different views of {key}"):
        all_views(targets, 64)
    with pytest.raises(CorpusError, match=f"a view of {key} is not the one that the teacher"):
        open_targets([store.path], corpus=corpus, holdout=0.1).check_views()


def test_verify_reads_the_parameters(whole: Store, store: Store) -> None:
    assert verify(whole.path).whole
    good, failed = whole.rows(whole.keys[:1])[0], whole.samples["key"].to_pylist().index(BROKEN)
    recommit(store, row=good, photometric=np.nan)
    assert "photometric/c/0/0/0 holds photometric parameters that cannot be applied" in damages(store)
    recommit(store, row=failed, photometric=np.array(Photometric(), np.float32))
    assert "photometric/c/0/0/0 holds photometric parameters of samples that failed" in damages(store)


def damages(store: Store) -> str:
    return "; ".join(str(damage) for damage in verify(store.path).damages)


def test_repair_and_audit_draw_the_same_again(whole: Store, store: Store, tiny_weights: Path) -> None:
    before = files(store.path)
    (store.path.local / "photometric/c/0/0/0").unlink()
    assert damages(store) == "part 0, rows 0 to 10: photometric/c/0/0/0 is missing"
    repair(RepairConfig(store=store.path, weights=tiny_weights, batch_size=BATCH), open_crew=Crews())
    assert files(store.path) == before
    report = audit(AuditConfig(store=whole.path, weights=tiny_weights, samples=10))
    assert (report.num_views, report.changed_views) == (20, 0)


def test_centred_views_are_recoloured_by_the_seed(tmp_path: Path, corpus: Path, tiny_weights: Path) -> None:
    spec = ViewSpec(photometric="eupe")
    a, b = (
        make_store(tmp_path / f"{seed}.zarr", corpus, tiny_weights, views=replace(spec, seed=seed)) for seed in (0, 1)
    )
    rows = a.rows(a.keys)
    ours, theirs = a.read(rows, [0] * 10), b.read(rows, [0] * 10)
    assert np.array_equal(ours.boxes, theirs.boxes) and ours.first_difference(theirs) == 0
    assert ours.summary is not None and theirs.summary is not None
    assert not np.array_equal(ours.summary, theirs.summary)


@pytest.mark.slow
@pytest.mark.usefixtures("joined")
def test_the_command_makes_the_store_that_one_process_makes(
    tmp_path: Path, corpus: Path, tiny_weights: Path, whole: Store, run_eupe: Run
) -> None:
    words = ["extract", "--teacher", "timm:test_vit", "--weights", tiny_weights, "--corpus", corpus]
    words += ["--out", tmp_path / "s.zarr", "--size", 64, "--size", 96, "--views", "rrc:2", "--dtype", "fp32"]
    words += ["--pixels", "--batch-size", 8, "--json"]
    done = run_eupe(*words, "--photometric", "eupe")
    assert done.code == 0, done.err
    assert json.loads(done.out)["num_failed"] == 1
    assert files(tmp_path / "s.zarr") == files(whole.path)
    refused = run_eupe(*words)
    assert refused.code == 2
    assert "views.photometric: stored eupe, requested nothing" in " ".join(refused.err.split())
