"""Segmentation: its numbers against scikit-learn, its protocol against the paper, its layouts on tiny files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import make_store
from planted import COLOURS, SIDE, ade20k, blocks, masks, save
from sklearn.metrics import accuracy_score, jaccard_score

from eupe.corpus.views import NEUTRAL, ViewParams, ViewSpec, render_view
from eupe.errors import ConfigError, CorpusError, StoreError
from eupe.evaluate.dense_probe import Training, predictions, view_of
from eupe.evaluate.encode import EncodedViews
from eupe.evaluate.judged_pictures import windows
from eupe.evaluate.segment import (
    IGNORED,
    SIZE,
    TRAINING,
    LinearSegmenter,
    confusion_of,
    mean_iou,
    pixel_accuracy,
    segment,
    segmentation_loss,
)
from eupe.evaluate.subject import PixelSubject, open_subjects

FAST = Training(steps=60, lr=0.05, warmup=0.1, batch_size=4)


def pixels_subject() -> Any:
    (subject,) = open_subjects(["pixels"], {})
    return subject


def test_the_protocol_is_the_papers() -> None:
    assert SIZE == 512
    assert (TRAINING.steps, TRAINING.batch_size, TRAINING.lr, TRAINING.weight_decay) == (40_000, 16, 1e-3, 1e-3)
    head = LinearSegmenter(6, 4)
    assert sum(parameter.numel() for parameter in head.parameters()) == 6 * 4 + 4
    tokens = torch.randn(2, 3, 3, 6) * 5 + 3
    normed = (tokens - tokens.mean(-1, keepdim=True)) / tokens.var(-1, correction=0, keepdim=True).sqrt()
    assert torch.allclose(head(tokens), head.linear(normed).permute(0, 3, 1, 2), atol=1e-4)


def test_iou_and_accuracy_equal_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(-1, 5, (3, 20, 30)).astype(np.int32)
    labels[labels == 4] = 2
    predicted = np.where(generator.random(labels.shape) < 0.6, labels.clip(0), generator.integers(0, 4, labels.shape))
    confusion = sum(confusion_of(*pair, 6) for pair in zip(predicted.astype(np.int64), labels, strict=True))
    judged = labels != IGNORED
    assert mean_iou(confusion) == pytest.approx(
        jaccard_score(labels[judged], predicted[judged], average="macro"), abs=1e-12
    ), "classes that occur nowhere do not count"
    assert pixel_accuracy(confusion) == pytest.approx(accuracy_score(labels[judged], predicted[judged]), abs=1e-12)


def test_the_loss_is_the_mean_over_pixels_that_have_a_class() -> None:
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    labels = torch.randint(-1, 3, (2, 4, 4))
    naive = [
        -float(torch.log_softmax(logits[b, :, y, x], dim=0)[labels[b, y, x]])
        for b in range(2)
        for y in range(4)
        for x in range(4)
        if labels[b, y, x] != IGNORED
    ]
    assert float(segmentation_loss(logits, labels)) == pytest.approx(np.mean(naive), abs=1e-9)
    assert float(segmentation_loss(logits, torch.full((2, 4, 4), IGNORED))) == 0


@pytest.mark.parametrize(("width", "height"), [(48, 48), (60, 48), (90, 30), (31, 100)])
def test_windows_are_squares_of_the_shorter_side_that_cover_the_picture(width: int, height: int) -> None:
    side = min(width, height)
    covered = np.zeros((height, width), dtype=int)
    for params in windows(width, height):
        x0, y0, x1, y1 = params.box
        assert x1 - x0 == y1 - y0 == side
        covered[y0:y1, x0:x1] += 1
    assert covered.min() == 1 if width != height else covered.min() == covered.max() == 1
    assert len(windows(width, height)) == 1 + int(np.ceil((max(width, height) - side) / round(side * 2 / 3)))


def test_a_views_truth_shows_what_its_pixels_show() -> None:
    """Crop and mirroring of a mask are those of its picture."""
    pixels, labels = blocks(3, 64, 48)
    from PIL import Image

    for flip in (False, True):
        params = ViewParams((16, 0, 64, 48), flip, NEUTRAL)
        shown = render_view(Image.fromarray(pixels), params, 96)
        truth = view_of(labels.astype(np.int32), params, 96)
        middle = (slice(16, None, 32), slice(16, None, 32))
        assert np.array_equal(COLOURS[truth[middle]], shown[middle])
        small, nearest = view_of(labels.astype(np.int32), params, 20), ((np.arange(20) + 0.5) * 48 / 20).astype(int)
        naive = labels[:, 16:][nearest[:, None], nearest[None]]
        assert np.array_equal(small, naive[:, ::-1] if flip else naive), "classes are never mixed"


def test_overlapping_windows_are_averaged_where_they_overlap_and_mirrored_back() -> None:
    dense = torch.arange(8, dtype=torch.float16).reshape(2, 1, 2, 2)[..., None].reshape(2, 1, 4, 1)[:, :, :2]
    dense = torch.tensor([[[[1.0]]], [[[3.0]]], [[[5.0]]]], dtype=torch.float16)
    params = [
        ViewParams((0, 0, 2, 2), False, NEUTRAL),
        ViewParams((1, 0, 3, 2), False, NEUTRAL),
        ViewParams((0, 0, 2, 2), True, NEUTRAL),
    ]
    encoded = EncodedViews(np.array([0, 0, 1]), params, 2, dense=dense)

    class AsIs(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens.permute(0, 3, 1, 2)

    said = {float(truth[0, 0]): logits for logits, truth in predictions(AsIs(), encoded, lambda i: np.full((2, 4), i))}
    assert said[0.0][0, 0].tolist()[:3] == [1.0, 2.0, 3.0]
    assert torch.isnan(said[0.0][0, :, 3]).all(), "no view shows the last column"
    wide = torch.tensor([[[[1.0], [2.0]], [[1.0], [2.0]]]], dtype=torch.float16)
    encoded = EncodedViews(np.array([0]), [ViewParams((0, 0, 2, 2), True, NEUTRAL)], 2, dense=wide)
    ((logits, _),) = predictions(AsIs(), encoded, lambda i: np.zeros((2, 2)))
    assert logits[0].tolist() == [[2.0, 1.0], [2.0, 1.0]]


@pytest.mark.parametrize("make", [ade20k, masks])
def test_both_layouts_are_learnt_from_colours(make: Callable[[Path], Path], tmp_path: Path) -> None:
    data = make(tmp_path)
    result = segment(pixels_subject(), data=data, size=2 * SIDE, training=FAST)
    assert result.scores["miou"] > 0.95
    assert result.scores["pixel_accuracy"] > 0.95
    assert result.data == {"path": str(data), "train": 6, "val": 3, "classes": 3}
    assert (result.protocol["steps"], result.protocol["size"]) == (60, 2 * SIDE)


def test_wide_pictures_are_judged_in_windows(tmp_path: Path) -> None:
    result = segment(pixels_subject(), data=ade20k(tmp_path, width=80), size=SIDE, training=FAST)
    assert result.scores["miou"] > 0.9


def test_each_option_changes_the_result(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    data = ade20k(tmp_path)
    base = ["eval", "segment", "pixels", "--data", data, "--size", 48, "--steps", 3, "--json"]

    def scores(*more: object) -> Any:
        (result,) = json.loads(run_eupe(*base, *more).out)["results"]
        return result["scores"], result["data"], result["protocol"]

    first = scores()
    assert scores() == first
    for more in (["--steps", 9], ["--batch-size", 2], ["--lr", 0.5], ["--seed", 1], ["--limit", 2], ["--size", 32]):
        assert scores(*more) != first


def test_a_store_of_the_same_pictures_is_judged_by_content(tmp_path: Path, tiny_weights: Path) -> None:
    """Cached features and the teacher run anew give the same head; names of files do not matter."""
    data = ade20k(tmp_path / "data")
    corpus = tmp_path / "corpus"
    for i, path in enumerate(sorted((data / "images").rglob("*.png"))):
        (corpus / "a").mkdir(parents=True, exist_ok=True)
        (corpus / "a" / f"other{i}.png").write_bytes(path.read_bytes())
    store = make_store(tmp_path / "s.zarr", corpus, tiny_weights, views=ViewSpec(policy="squash"))
    cached, anew = open_subjects([str(store.path), "timm:test_vit"], {"timm:test_vit": tiny_weights})
    ours, theirs = (segment(s, data=data, size=64, training=FAST).scores for s in (cached, anew))
    assert ours["miou"] == pytest.approx(theirs["miou"], abs=0.02)
    (corpus / "a" / "other0.png").unlink()
    smaller = make_store(tmp_path / "t.zarr", corpus, tiny_weights, views=ViewSpec(policy="squash"))
    with pytest.raises(StoreError, match="features of 5 of the 6 pictures"):
        segment(open_subjects([str(smaller.path)], {})[0], data=data, training=FAST)


def test_masks_that_cannot_be_true_get_a_sentence(tmp_path: Path) -> None:
    def refused(data: Path, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            segment(pixels_subject(), data=data, size=SIDE, training=FAST)

    refused(tmp_path / "nothing", CorpusError, "is not a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", CorpusError, "holds no masks")
    data = ade20k(tmp_path / "missing")
    (data / "annotations" / "training" / "2.png").unlink()
    refused(data, CorpusError, r"2\.png has no 2\.png \(or \.tif")
    data = ade20k(tmp_path / "sides")
    save(np.ones((10, 20), dtype=np.uint8), data / "annotations" / "validation" / "100.png")
    refused(data, CorpusError, "has 20x10 pixels, but its picture images/validation/100.png has 48x48")
    data = ade20k(tmp_path / "range")
    (data / "classes.txt").write_text("red\ngreen\n")
    refused(data, CorpusError, r"holds class 3, but there are 2 classes \(1 to 2, and 0 for none\)")
    data = ade20k(tmp_path / "colours")
    save(blocks(0)[0], data / "annotations" / "training" / "0.png")
    refused(data, ConfigError, "hold 3 colours")
    data = ade20k(tmp_path / "none")
    for path in (data / "annotations").rglob("*.png"):
        save(np.zeros((48, 48), dtype=np.uint8), path)
    refused(data, CorpusError, "hold no class at all")
    data = ade20k(tmp_path / "torn")
    (data / "annotations" / "training" / "1.png").write_bytes(b"\x89PNG")
    refused(data, CorpusError, "cannot be read")
    with pytest.raises(ConfigError, match="--steps"):
        Training(steps=0, lr=1, warmup=0)


def test_masks_that_cannot_be_true_are_found_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ade20k(tmp_path)
    save(np.full((48, 48), 9, dtype=np.uint8), data / "annotations" / "validation" / "102.png")
    monkeypatch.setattr(PixelSubject, "encode", lambda *_, **__: pytest.fail("views were encoded"))
    with pytest.raises(CorpusError, match=r"102\.png holds class 9, but there are 3"):
        segment(pixels_subject(), data=data, size=SIDE, training=FAST)


def test_classes_are_counted_over_all_training_masks_whatever_the_limit(tmp_path: Path) -> None:
    data = ade20k(tmp_path)
    save(np.ones((48, 48), dtype=np.uint8), data / "annotations" / "training" / "0.png")
    result = segment(pixels_subject(), data=data, size=SIDE, training=FAST, limit=1)
    assert result.data["classes"] == 3
