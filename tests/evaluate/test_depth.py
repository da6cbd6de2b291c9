"""Depth: its numbers against naive loops, its protocol against the paper, its layouts on tiny files."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from planted import SIDE, depth_pairs, nyu, save

from eupe.errors import ConfigError, CorpusError
from eupe.evaluate.dense_probe import Training
from eupe.evaluate.depth import BINS, MAX_M, MIN_M, TRAINING, LinearDepth, depth, depth_errors, scale_invariant_loss
from eupe.evaluate.layouts import EIGEN_CROP, depth_split, depth_unit, read_depth, stated_unit
from eupe.evaluate.subject import PixelSubject, open_subjects

FAST = Training(steps=150, lr=0.02, warmup=0.1, batch_size=4)


def judged(data: Path, **options: Any) -> Any:
    (subject,) = open_subjects(["pixels"], {})
    return depth(subject, data=data, **{"training": FAST, "size": SIDE, **options})


def test_the_depth_protocol_is_the_papers() -> None:
    assert (TRAINING.steps, TRAINING.batch_size, TRAINING.lr, TRAINING.weight_decay) == (38_400, 16, 3e-4, 1e-3)
    assert (MIN_M, MAX_M, BINS) == (1e-3, 10, 256)
    head = LinearDepth(5, min_m=MIN_M, max_m=MAX_M)
    kinds = [type(module).__name__ for module in head.children()]
    assert kinds == ["BatchNorm2d", "Linear"]


def test_a_depth_is_the_mean_of_the_bins_by_their_shares() -> None:
    head = LinearDepth(5, min_m=0.5, max_m=4).eval()
    tokens = torch.randn(2, 3, 3, 5)
    said = head(tokens).detach()
    normed = head.norm(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    logits = head.linear(normed).permute(0, 3, 1, 2).detach()
    for b, y, x in ((0, 0, 0), (1, 2, 1)):
        shares = [max(float(v), 0) + 0.1 for v in logits[b, :, y, x]]
        bins = [0.5 + i * 3.5 / 255 for i in range(256)]
        assert float(said[b, 0, y, x]) == pytest.approx(
            sum(s * m for s, m in zip(shares, bins, strict=True)) / sum(shares), rel=1e-5
        )


def test_errors_equal_naive_ones() -> None:
    generator = np.random.default_rng(0)
    truth, said = (generator.uniform(0.5, 9, 500).astype(np.float32) for _ in range(2))
    got = depth_errors(said, truth)
    pairs = list(zip(said.astype(float), truth.astype(float), strict=True))
    assert got["rmse"] == pytest.approx(math.sqrt(sum((s - t) ** 2 for s, t in pairs) / 500), abs=1e-9)
    assert got["abs_rel"] == pytest.approx(sum(abs(s - t) / t for s, t in pairs) / 500, abs=1e-9)
    assert got["delta1"] == pytest.approx(sum(max(s / t, t / s) < 1.25 for s, t in pairs) / 500, abs=1e-12)


def test_the_loss_forgives_a_common_scale_and_skips_what_is_unknown() -> None:
    truth = torch.rand(2, 4, 4, dtype=torch.float64) * 5 + 0.5
    truth[0, 0, 0], truth[1, 1, 1] = 0, 50
    said = truth.clamp(0.1, 9) * 2
    known = (truth > 0) & (truth < 10)
    apart = torch.log(said[known]) - torch.log(truth[known])
    naive = math.sqrt(float(((apart - apart.mean()) ** 2).mean()) + 0.15 * float(apart.mean()) ** 2)
    assert float(scale_invariant_loss(said, truth, max_m=10)) == pytest.approx(naive, abs=1e-5)
    assert naive == pytest.approx(math.sqrt(0.15) * math.log(2), abs=1e-6)
    assert float(scale_invariant_loss(said, truth * 0, max_m=10)) == 0


@pytest.mark.parametrize("make", [depth_pairs, nyu])
def test_both_depth_layouts_are_learnt_from_colours(make: Callable[[Path], Path], tmp_path: Path) -> None:
    result = judged(make(tmp_path), size=4 * SIDE)
    assert list(result.scores) == ["rmse", "abs_rel", "delta1"]
    assert result.lower_is_better
    assert result.scores["delta1"] > 0.85, "blocks blur at their edges"
    assert result.scores["rmse"] < 0.8


def test_what_lies_beyond_the_greatest_depth_does_not_count(tmp_path: Path) -> None:
    data = depth_pairs(tmp_path)
    near = judged(data, max_m=3.0)
    assert near.scores["rmse"] < judged(data).scores["rmse"]
    with pytest.raises(CorpusError, match="hold nothing between"):
        judged(data, max_m=0.5)
    with pytest.raises(ConfigError, match="--max-depth"):
        judged(data, max_m=0.0)


@pytest.mark.parametrize("shrunk", [1, 2])
def test_nyus_pictures_are_judged_in_eigens_crop(tmp_path: Path, shrunk: int) -> None:
    """Pictures of another size are judged on the same share of their area; what lies outside does not matter."""
    data = nyu(tmp_path / "a", width=640 // shrunk, height=480 // shrunk)
    x0, y0, x1, y1 = (round(at / shrunk) for at in EIGEN_CROP)
    before = judged(data, training=Training(steps=2, lr=1e-3, warmup=0)).scores
    for path in (data / "scene").glob("sync_depth_10*.png"):
        outside = np.full((480 // shrunk, 640 // shrunk), 9000, dtype=np.uint16)
        outside[y0:y1, x0:x1] = (read_depth(path) * 1000).round().astype(np.uint16)[y0:y1, x0:x1]
        save(outside, path)
    assert judged(data, training=Training(steps=2, lr=1e-3, warmup=0)).scores == before
    for path in (data / "scene").glob("sync_depth_10*.png"):
        outside = (read_depth(path) * 1000).round().astype(np.uint16)
        inside = np.full_like(outside, 9000)
        inside[y0 + 1 :] = outside[y0 + 1 :]
        save(inside, path)
    assert judged(data, training=Training(steps=2, lr=1e-3, warmup=0)).scores != before
    assert depth_split(data, "val").crop == EIGEN_CROP == (41, 45, 601, 471)


def test_arrays_of_metres_are_read_as_pngs_of_millimetres_are(tmp_path: Path) -> None:
    data = depth_pairs(tmp_path)
    expected = judged(data).scores
    for path in (data / "depth").rglob("*.png"):
        np.save(path.with_suffix(".npy"), read_depth(path))
        path.unlink()
    (data / "depth-unit.txt").write_text("m")
    assert judged(data).scores == pytest.approx(expected, rel=1e-6)


def test_depth_maps_that_cannot_be_true_get_a_sentence(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    data = depth_pairs(tmp_path / "eight")
    save(np.ones((48, 48), dtype=np.uint8), data / "depth" / "train" / "0.png")
    with pytest.raises(CorpusError, match="has 8 bits"):
        judged(data)
    data = nyu(tmp_path / "lists")
    (data / "nyu_test.txt").write_text("/scene/rgb_1.png\n")
    with pytest.raises(CorpusError, match="line 1 of"):
        judged(data)
    (data / "nyu_test.txt").write_text("/scene/gone.png /scene/sync_depth_1.png 518\n")
    with pytest.raises(CorpusError, match=r"names 1 files that are missing; the first is .*gone.png"):
        judged(data)
    (data / "nyu_test.txt").unlink()
    outcome = run_eupe("eval", "depth", "pixels", "--data", data)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    pickled = depth_pairs(tmp_path / "pickled")
    (pickled / "depth" / "train" / "0.png").unlink()
    np.save(pickled / "depth" / "train" / "0.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(CorpusError, match="cannot be read"):
        judged(pickled)


def test_the_verb_takes_the_greatest_depth(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    words = ["eval", "depth", "pixels", "--data", depth_pairs(tmp_path), "--size", 48, "--steps", 2, "--json"]
    far, near = (json.loads(run_eupe(*words, "--max-depth", m).out)["results"][0] for m in (10, 3))
    assert far["scores"] != near["scores"]
    assert (far["protocol"]["max_m"], near["protocol"]["max_m"]) == (10, 3)


def test_each_option_of_the_verb_changes_the_result(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    base = ["eval", "depth", "pixels", "--data", depth_pairs(tmp_path), "--size", 48, "--steps", 3, "--json"]

    def scores(*more: object) -> Any:
        (result,) = json.loads(run_eupe(*base, *more).out)["results"]
        return result["scores"]

    first = scores()
    assert scores() == first
    for more in (["--steps", 9], ["--batch-size", 2], ["--lr", 0.5], ["--seed", 1], ["--limit", 2], ["--size", 32]):
        assert scores(*more) != first
    for more in (
        ["--limit", 0],
        ["--limit", -1],
        ["--size", 0],
        ["--seed", -1],
        ["--max-depth", "inf"],
        ["--lr", "inf"],
    ):
        refused = run_eupe(*base, *more)
        assert refused.code == 2 and more[0] in refused.err and "Traceback" not in refused.err


def test_maps_that_cannot_be_true_are_found_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = depth_pairs(tmp_path)
    save(np.ones((48, 48), dtype=np.uint8), data / "depth" / "val" / "102.png")
    monkeypatch.setattr(PixelSubject, "encode", lambda *_, **__: pytest.fail("views were encoded"))
    with pytest.raises(CorpusError, match=r"102\.png has 8 bits"):
        judged(data)


STEPS = np.array([[0, 64], [128, 255]])


@pytest.mark.parametrize(
    ("name", "values", "unit", "metres"),
    [
        ("kitti.png", (STEPS * 256).astype(np.uint16), "1/256", STEPS),
        ("centimetres.png", STEPS.astype(np.uint16), "cm", STEPS / 100),
        ("eight.png", STEPS.astype(np.uint8), "10/255", STEPS * 10 / 255),
        ("millimetres.npy", STEPS * 1000.0, "mm", STEPS),
        ("half.npy", STEPS.astype(np.float16), None, STEPS),
        ("tenths.npy", STEPS.astype(np.uint16), "0.1", STEPS / 10),
        ("floats.tiff", STEPS.astype(np.float32), None, STEPS),
        ("floats.tiff", STEPS.astype(np.float32), "mm", STEPS / 1000),
        ("whole.tiff", STEPS.astype(np.uint16), None, STEPS / 1000),
        ("disparity.png", STEPS.astype(np.uint16), "54.4/disparity", [[0, 0.85], [0.425, 54.4 / 255]]),
        ("holes.npy", np.array([[np.nan, np.inf], [-np.inf, 2]]), "mm", [[0, 0], [0, 0.002]]),
    ],
)
def test_maps_are_in_the_unit_that_is_given(
    name: str, values: np.ndarray[Any, Any], unit: str | None, metres: Any, tmp_path: Path
) -> None:
    if name.endswith(".npy"):
        np.save(tmp_path / name, values)
    else:
        Image.fromarray(values).save(tmp_path / name)
    read = read_depth(tmp_path / name, None if unit is None else depth_unit(unit))
    assert read == pytest.approx(np.array(metres), rel=1e-5)


def test_whole_numbers_are_read_in_a_unit_that_is_stated_or_not_at_all(
    tmp_path: Path, run_eupe: Callable[..., Any]
) -> None:
    data = depth_pairs(tmp_path / "set")
    words = ["eval", "depth", "pixels", "--data", data, "--size", 48, "--steps", 2]
    by_file = run_eupe(*words, "--json")
    (data / "depth-unit.txt").write_text("0.0001")
    (tenth,) = json.loads(run_eupe(*words, "--json").out)["results"]
    assert tenth["protocol"]["depth_unit"] == "0.0001" and "0.1 to 0.6 m" in tenth["notes"][1]
    (data / "depth-unit.txt").write_text("mm")
    arrays = [data / "metres.npy"]
    np.save(arrays[0], np.full((4, 4), 1000.0))
    assert stated_unit(data, None, arrays) == depth_unit("mm"), "arrays are metres where nothing says otherwise"
    (data / "depth-unit.txt").write_text("fathoms")
    refused(run_eupe(*words), "--depth-unit takes")
    (data / "depth-unit.txt").unlink()
    refused(run_eupe(*words), "whole numbers up to 6,000, and nothing states the depth of one step; give --depth-unit")
    (given,) = json.loads(run_eupe(*words, "--depth-unit", "mm", "--json").out)["results"]
    assert given["scores"] == json.loads(by_file.out)["results"][0]["scores"]
    (tmp_path / "scenes.json").write_text("{}")  # scenes that were rendered before they said so
    assert run_eupe(*words, "--json").out == by_file.out


def refused(outcome: Any, said: str) -> None:
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert said in outcome.err


@pytest.mark.parametrize("word", ["", "0", "-1", "inch", "1/0", "nan", "1/256/2", "/disparity"])
def test_units_that_are_none_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="--depth-unit takes m, cm, mm, the metres of one step"):
        depth_unit(word)


def test_the_range_is_told_so_that_a_wrong_unit_is_seen(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    data = depth_pairs(tmp_path)
    words = ["eval", "depth", "pixels", "--data", data, "--size", 48, "--steps", 2]
    out = run_eupe(*words).out
    assert "judged: 3 pictures of images/val, by 8 of images/train\n" in out
    told = "1 to 6 m, median 2.5 m, known for 92% of the pixels; 0% of these are too far to be judged"
    assert f"depth of images/train, read as mm (--depth-unit): {told}" in out
    (plain,), (given,), (tenth,) = (
        json.loads(run_eupe(*words, *more, "--json").out)["results"]
        for more in ([], ["--depth-unit", "mm"], ["--depth-unit", "0.0001"])
    )
    assert plain["scores"] == given["scores"] != tenth["scores"]
    assert "depth_unit" not in plain["protocol"] and given["protocol"]["depth_unit"] == "mm"
    assert "0.1 to 0.6 m, median 0.25 m" in tenth["notes"][1]
    refused = run_eupe(*words, "--depth-unit", "m")
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert "hold nothing between 0.001 and 10 m (found: 1,000 to 6,000 m, median 2,500 m" in refused.err
    assert "--depth-unit sets the metres of one step" in refused.err
