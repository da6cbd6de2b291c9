"""What a store holds against each library's own forward pass, written out here on pixels prepared here."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from awkward import save_awkward, save_broken
from making import TINY_TEACHER, make_corpus, make_store, picture, random_weights
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor
from transformers import Dinov2Model

from eupe.common.compute import Tokens
from eupe.corpus.index import index_folder
from eupe.corpus.views import ViewSpec
from eupe.errors import ConfigError, IncompleteError, TeacherError
from eupe.extract.calibrate import require_features
from eupe.extract.parts import plan_work_units, store_spec
from eupe.extract.worker import PartExtractor, Worker
from eupe.models.encoder import build_encoder, save_encoder
from eupe.store import Store, open_store
from eupe.store.writer import Part, Row, create_store, finish_store
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import load_teacher

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
CENTER = ViewSpec()

Forward = Callable[[NDArray[np.uint8]], tuple[Tensor, Tensor]]
"""Views uint8 [B, S, S, 3] to dense [B, h, w, D] and summary [B, Ds], by the library alone."""


def pillow_center_view(path: Path, size: int) -> NDArray[np.uint8]:
    """The centre view by plain Pillow: every awkward mode treated as the documentation says."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, "white")
        image.paste(rgba, mask=rgba.getchannel("A"))
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def normalised(views: NDArray[np.uint8], mean_std: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    scaled = (views / 255.0 - np.array(mean_std[0])) / np.array(mean_std[1])
    return torch.from_numpy(scaled.transpose(0, 3, 1, 2)).float()


def grid_of(tokens_BND: Tensor) -> Tensor:
    side = int(tokens_BND.shape[1] ** 0.5)
    return tokens_BND.unflatten(1, (side, side))


def dinov2(assets: Path, tmp_path: Path) -> tuple[str, Path, int, Forward]:
    weights = assets / "weights" / "dinov2-small"
    model = Dinov2Model.from_pretrained(weights).eval()

    def forward(views: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        out = model(normalised(views, IMAGENET))
        return grid_of(out.last_hidden_state[:, 1:]), out.pooler_output

    return "dinov2", weights, 112, forward


def efficientnet(assets: Path, tmp_path: Path) -> tuple[str, Path, int, Forward]:
    weights = assets / "weights" / "efficientnet_lite0" / "model.safetensors"
    model = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(weights)).eval()
    stages = timm.create_model("tf_efficientnet_lite0", features_only=True)
    stages.load_state_dict(model.state_dict(), strict=False)
    stages.eval()

    def forward(views: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        pixels = normalised(views, HALF)
        return stages(pixels)[-1].permute(0, 2, 3, 1), model.forward_head(model.forward_features(pixels), True)

    return "efficientnet-lite0", weights, 128, forward


def clip(assets: Path, tmp_path: Path) -> tuple[str, Path, int, Forward]:
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu").eval()
    weights = tmp_path / "clip.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, weights)
    projection, model.visual.proj = model.visual.proj, None
    assert projection is not None
    model.visual.output_tokens = True

    def forward(views: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        summary, tokens = model.visual(normalised(views, CLIP))
        return grid_of(tokens), summary

    return "open_clip:ViT-B-32-quickgelu@openai", weights, 224, forward


def student_run(assets: Path, tmp_path: Path) -> tuple[str, Path, int, Forward]:
    torch.manual_seed(1)
    save_encoder(build_encoder("vit_tiny_patch16_dinov3_qkvb", size=96), tmp_path / "run")
    model = timm.create_model("vit_tiny_patch16_dinov3_qkvb", num_classes=0).eval()
    weights = tmp_path / "run" / "student.safetensors"
    timm.models.load_checkpoint(model, str(weights))

    def forward(views: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        tokens = model.forward_features(normalised(views, IMAGENET))
        return grid_of(tokens[:, 5:]), tokens[:, 0]

    return str(tmp_path / "run"), weights, 96, forward


@pytest.mark.parametrize("backend", [dinov2, efficientnet, clip, student_run])
def test_stored_features_equal_the_librarys_forward_on_awkward_pictures(
    assets: Path, tmp_path: Path, backend: Callable[[Path, Path], tuple[str, Path, int, Forward]]
) -> None:
    teacher, weights, size, forward = backend(assets, tmp_path)
    pictures = save_awkward(tmp_path / "awkward")
    store = make_store(tmp_path / "s.zarr", tmp_path / "awkward", weights, teacher=teacher, views=CENTER, sizes=(size,))
    rows = store.samples.to_pylist()
    assert sorted(row["key"] for row in rows) == sorted(pictures)
    assert {row["status"] for row in rows} == {"ok"}
    stored = store.read([row["row"] for row in rows], [0] * len(rows))
    views = np.stack([pillow_center_view(pictures[row["key"]], size) for row in rows])
    with torch.inference_mode():
        dense, summary = forward(views)
    assert stored.dense is not None and stored.summary is not None
    assert cosines(stored.dense, dense).min() >= 0.9999
    assert cosines(stored.summary, summary).min() >= 0.9999
    np.testing.assert_allclose(stored.dense, dense.numpy(), rtol=2e-3, atol=2e-3 * float(dense.abs().max()))


def cosines(stored: NDArray[np.float16], expected: Tensor) -> Tensor:
    got = torch.from_numpy(stored).float()
    assert got.shape == expected.shape
    return torch.nn.functional.cosine_similarity(got, expected, dim=-1)


def test_unreadable_pictures_are_rows_with_reasons(tmp_path: Path, tiny_weights: Path) -> None:
    corpus = make_corpus(tmp_path / "c", count=5)
    save_broken(corpus / "broken")
    (corpus / "class0" / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    store = make_store(tmp_path / "s.zarr", corpus, tiny_weights)
    rows = {row["key"]: row for row in store.samples.to_pylist()}
    failed = {key for key, row in rows.items() if row["status"] != "ok"}
    assert failed == {f"broken/{name}" for name in ("truncated.jpg", "empty.png", "text.jpg", "bomb.png")} | {
        "class0/dangling.png"
    }
    assert all(len(rows[key]["error"]) > 10 for key in failed)
    assert store.stats(64, "dense").count == 5 * 2 * 16


def test_a_picture_changed_since_it_was_indexed_is_refused(tmp_path: Path, tiny_weights: Path) -> None:
    corpus = make_corpus(tmp_path / "c", count=3)
    index = index_folder(corpus)
    picture(77).save(corpus / "class1" / "0001.png")
    spec = resolve_teacher(TINY_TEACHER)
    plan = store_spec(spec, index, views=CENTER, sizes=(64,), tokens=("dense",), weights_sha256="", dtype="fp32")
    create_store(tmp_path / "s.zarr", plan)
    loaded = load_teacher(spec, weights=tiny_weights, device=torch.device("cpu"), dtype=torch.float32, sizes=(64,))
    worker = Worker(
        [PartExtractor(loaded, plan, corpus_root=index.root, views=CENTER, batch_size=2)],
        [tmp_path / "s.zarr"],
    )
    assert sum(worker.run(unit) for unit in plan_work_units([plan], index.samples, [()])) == 1
    rows = finish_store(tmp_path / "s.zarr").samples.to_pylist()
    assert [row["error"] for row in rows if row["status"] != "ok"] == ["the file has changed since it was indexed"]


class Broken:
    """A teacher whose features overflow fp16 on the first view of a batch and are NaN on the second."""

    device = torch.device("cpu")

    def __call__(self, views: Tensor, layers: Sequence[int] = ()) -> Tokens:
        dense = torch.ones(len(views), 4, 4, 64)
        dense[0] = 1e5
        dense[1:2, 0, 0, 0] = torch.nan
        return Tokens(summary=torch.zeros(len(views), 64), dense=dense)


def test_overflow_is_clipped_and_counted_and_nan_fails_the_sample(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    index = index_folder(make_corpus(tmp_path / "c", count=3))
    plan = store_spec(
        resolve_teacher(TINY_TEACHER),
        index,
        views=CENTER,
        sizes=(64,),
        tokens=("summary", "dense"),
        weights_sha256="",
        dtype="fp32",
    )
    create_store(tmp_path / "s.zarr", plan)
    worker = Worker(
        [PartExtractor(Broken(), plan, corpus_root=index.root, views=CENTER, batch_size=8)],  # type: ignore[arg-type]
        [tmp_path / "s.zarr"],
    )
    worker.run(next(plan_work_units([plan], index.samples, [()])))
    store = finish_store(tmp_path / "s.zarr")
    info = json.loads(run_eupe("store", "info", store.path, "--json").out)
    assert info["clipped_values"] == 4 * 4 * 64
    assert set(info["failed"]) == {"class1/0001.png"}
    dense = store.read([0], [0]).dense
    assert dense is not None and (dense == 65504).all()
    rows = store.samples.to_pylist()
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    assert "not finite" in rows[1]["error"]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_every_row_equals_its_single_picture_result(
    tmp_path: Path, tiny_corpus: Path, tiny_weights: Path, tiny_store: Store, batch_size: int
) -> None:
    """Batches that straddle samples and parts change nothing but rounding."""
    spec, index = resolve_teacher(TINY_TEACHER), index_folder(tiny_corpus)
    plan = tiny_store.spec
    create_store(tmp_path / "s.zarr", plan)
    loaded = load_teacher(spec, weights=tiny_weights, device=torch.device("cpu"), dtype=torch.float32, sizes=(64,))
    views = ViewSpec(policy="rrc", num_views=2)
    worker = Worker(
        [PartExtractor(loaded, plan, corpus_root=index.root, views=views, batch_size=batch_size)],
        [tmp_path / "s.zarr"],
    )
    for unit in plan_work_units([plan], index.samples, [()]):
        worker.run(unit)
    rows, numbers = np.repeat(np.arange(24), 2).tolist(), [0, 1] * 24
    ours, theirs = finish_store(tmp_path / "s.zarr").read(rows, numbers), tiny_store.read(rows, numbers)
    assert np.array_equal(ours.boxes, theirs.boxes)
    digests = (open_store(path).read_digests(rows, numbers) for path in (tmp_path / "s.zarr", tiny_store.path))
    assert np.array_equal(*digests)
    assert ours.dense is not None and theirs.dense is not None
    np.testing.assert_allclose(ours.dense.astype(float), theirs.dense.astype(float), rtol=2e-3, atol=2e-3)


def test_several_sizes_are_the_same_views(tmp_path: Path, tiny_corpus: Path, tiny_weights: Path) -> None:
    """Each size's features are those of a store made for that size alone."""
    both = make_store(tmp_path / "both.zarr", tiny_corpus, tiny_weights, sizes=(64, 96))
    alone = make_store(tmp_path / "alone.zarr", tiny_corpus, tiny_weights, sizes=(96,))
    first, second = both.read([0, 5, 9], [0, 1, 0], size=96), alone.read([0, 5, 9], [0, 1, 0])
    assert np.array_equal(first.boxes, second.boxes)
    assert first.dense is not None and second.dense is not None
    assert first.dense.shape[1:3] == (6, 6)
    np.testing.assert_allclose(first.dense.astype(float), second.dense.astype(float), rtol=2e-3, atol=2e-3)


def test_random_weights_of_another_seed_give_other_features(tmp_path: Path, tiny_corpus: Path) -> None:
    stores = [
        make_store(
            tmp_path / f"{seed}.zarr", tiny_corpus, random_weights("test_vit", tmp_path / f"{seed}.safetensors", seed)
        )
        for seed in (1, 2)
    ]
    a, b = (store.read([0], [0]).summary for store in stores)
    assert not np.array_equal(a, b)
    assert stores[0].spec.teacher["weights_sha256"] != stores[1].spec.teacher["weights_sha256"]


class SomeBad:
    """A teacher that gives a value for what a picture's first channel is: NaN, infinity in the summary alone, 1e5."""

    device = torch.device("cpu")

    def __init__(self, summaries: list[float], dense: list[float]) -> None:
        self._summaries, self._dense = summaries, dense

    def __call__(self, views: Tensor, layers: Sequence[int] = ()) -> Tokens:
        summary, dense = torch.zeros(len(views), 64), torch.ones(len(views), 4, 4, 64)
        summary[:, 7] = torch.tensor(self._summaries)
        dense[:, 1, 2, 3] = torch.tensor(self._dense)
        return Tokens(summary=summary, dense=dense)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("summaries", "dense", "failed", "clipped", "arrays"),
    [
        ([0, NAN, 0], [1, 1, 1], {1: "64/summary"}, 0, []),
        ([0, INF, 0], [1, 1, -INF], {1: "64/summary", 2: "64/dense"}, 0, []),
        ([0, 0, 0], [1, 1e5, 1], {}, 1, ["64/dense"]),
        ([-7e4, 0, NAN], [1, 6.5e4, 1], {2: "64/summary"}, 1, ["64/summary", "64/dense"]),
    ],
)
def test_what_fp16_cannot_hold_is_told(
    tmp_path: Path,
    run_eupe: Callable[..., Any],
    summaries: list[float],
    dense: list[float],
    failed: dict[int, str],
    clipped: int,
    arrays: list[str],
) -> None:
    store = store_of(tmp_path, SomeBad(summaries, dense))
    outcome = run_eupe("store", "info", store.path, "--json")
    info = json.loads(outcome.out)
    assert (info["clipped_values"], info["clipped_arrays"], info["not_finite"]) == (clipped, arrays, len(failed))
    errors = [row["error"] for row in store.samples.to_pylist()]
    reasons = {i: f"the teacher's features are not finite ({path})" for i, path in failed.items()}
    assert {i: error for i, error in enumerate(errors) if error} == reasons
    told = flat(run_eupe("store", "info", store.path).err)
    assert (f"{clipped:,} values of {' and '.join(arrays)} are beyond 65,504" in told) == bool(clipped)
    valid = store.valid["row"].to_pylist()
    read = store.read(valid, [0] * len(valid))
    assert np.isfinite(read.summary).all() and np.isfinite(read.dense).all()  # type: ignore[arg-type]


def test_a_run_without_features_for_some_pictures_ends_with_1_and_what_to_know_stands_last(
    tmp_path: Path, tiny_weights: Path, run_eupe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line takes up a finished store, without Ray."""
    bad: Any = SomeBad([0, NAN, 0], [1, 1, 1e5])
    words = ["extract", "--teacher", TINY_TEACHER, "--weights", tiny_weights, "--size", 64, "--dtype", "fp32"]
    words += ["--corpus", make_corpus(tmp_path / "c", count=3, classes=1), "--out", tmp_path / "s.zarr"]
    with monkeypatch.context() as patch:
        patch.setattr("making.load_teacher", lambda *_, **__: bad)
        store = make_store(tmp_path / "s.zarr", tmp_path / "c", tiny_weights, views=CENTER)
    assert [row["status"] for row in store.samples.to_pylist()] == ["ok", "failed", "ok"]

    outcome = run_eupe(*words, "--json")
    report = json.loads(outcome.out)
    assert outcome.code == 1 and report["cached"]
    assert (report["num_failed"], report["num_not_finite"], report["clipped_values"]) == (1, 1, 1)
    assert report["failures"] == {"the teacher's features are not finite (N/summary)": 1}
    said = flat(outcome.err).partition("error: ")[2]
    assert said.startswith("the teacher's features are not finite") and f": 1 in {store.path}; these have no" in said

    monkeypatch.setattr(sys, "stderr", sys.stdout)
    outcome = run_eupe(*words)
    order = ["store: ", "normalised by: ", "1 pictures have no features", "warning: ", "nothing to do", "error: "]
    places = [outcome.out.index(word) for word in order]
    assert outcome.code == 1 and places == sorted(places), outcome.out
    assert "can be read" not in outcome.out, "they can"


@pytest.mark.parametrize(
    ("dtype", "advice"), [("fp32", "checkpoint itself is likely damaged"), ("fp16", "--dtype fp32")]
)
def test_no_features_at_all_is_not_called_unreadable(tmp_path: Path, dtype: str, advice: str) -> None:
    with pytest.raises(IncompleteError, match=f"for 3 pictures the teacher's features are not finite.*{advice}"):
        store_of(tmp_path, SomeBad([NAN] * 3, [1] * 3), dtype)
    rows = [Row("a", None, None, error="the teacher's features are not finite (64/dense)")]
    part = Part(0, rows, np.zeros(0), np.zeros(0), np.zeros(0), {})
    spec = open_store(tmp_path / "s.zarr").spec
    with pytest.raises(TeacherError, match=f"for all pictures that were tried, .* not finite; .*{advice}"):
        require_features(spec, part)
    with pytest.raises(ConfigError, match="can be read"):
        require_features(spec, replace(part, rows=[Row("a", None, None, error="the file is empty")]))


def store_of(folder: Path, teacher: Any, dtype: str = "fp32") -> Store:
    """Make a finished store of three pictures, which are computed in one batch."""
    index = index_folder(make_corpus(folder / "c", count=3, classes=1))
    plan = store_spec(
        resolve_teacher(TINY_TEACHER),
        index,
        views=CENTER,
        sizes=(64,),
        tokens=("summary", "dense"),
        weights_sha256="",
        dtype=dtype,
    )
    create_store(folder / "s.zarr", plan)
    extractor = PartExtractor(teacher, plan, corpus_root=index.root, views=CENTER, batch_size=8)
    worker = Worker([extractor], [folder / "s.zarr"])
    for unit in plan_work_units([plan], index.samples, [()]):
        worker.run(unit)
    return finish_store(folder / "s.zarr")


def flat(text: str) -> str:
    return " ".join(text.split())
