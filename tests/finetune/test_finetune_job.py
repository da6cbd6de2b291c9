"""Fine-tuning as a whole: what is learned, kept, done again, and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
import timm
import torch
from making import cached_timm
from PIL import Image
from safetensors.torch import load_file
from tuning import SHADES, run_of, shades, tuned

from eupe.errors import TrainingError
from eupe.finetune.model import load_facts

WEIGHTS = "student.safetensors"


@pytest.fixture(scope="module")
def run(shared_folder: Path) -> Path:
    return run_of(shared_folder / "finetune-run")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shades(tmp_path_factory.mktemp("shades"))


def test_a_classifier_learns_and_its_files_alone_answer_so(
    run: Path, data: Path, tmp_path: Path, run_eupe: Callable[..., Any]
) -> None:
    """What the report says is what timm's model and the head's matrix say of the judged pictures, one by one."""
    done = run_eupe("finetune", run, "--data", data, "--out", tmp_path / "out", "--epochs", 6, "--lr", 3e-4, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    (trial,) = report["trials"]
    folder = Path(trial["folder"])
    spec = json.loads((folder / "student.json").read_text())
    model = timm.create_model(spec["arch"], num_classes=0, img_size=spec["size"])
    model.load_state_dict(load_file(folder / WEIGHTS))
    head = load_file(folder / "head.safetensors")
    facts = load_facts(folder)
    assert facts.classes == tuple(sorted(SHADES))
    right = []
    for path in sorted(data.glob("val/*/*.png")):
        picture = Image.open(path)
        left = (picture.width - picture.height) // 2
        picture = picture.crop((left, 0, left + picture.height, picture.height)).resize((64, 64), Image.BICUBIC)
        pixels = (np.asarray(picture, np.float32) / 255 - spec["mean"]) / np.array(spec["std"], np.float32)
        with torch.inference_mode():
            tokens = model.eval().forward_features(torch.from_numpy(pixels).float().permute(2, 0, 1)[None])
            logits = model.forward_head(tokens, pre_logits=True) @ head["weight"].T + head["bias"]
        right.append(facts.classes[int(logits.argmax())] == path.parent.name)
    assert trial["scores"]["accuracy"] == pytest.approx(np.mean(right))
    assert np.mean(right) > 0.9
    assert [origin.name for origin in facts.learned_from] == ["dinov2-s", "efficientnet-lite0"]


def test_dense_tasks_learn_what_a_probe_cannot(run: Path, tmp_path: Path) -> None:
    segment = tuned(run, planted.masks(tmp_path / "masks"), tmp_path / "s", task="segment", epochs=30)
    assert segment.trials[0].scores["miou"] > segment.trials[0].probe["miou"] + 0.1
    depth = tuned(run, planted.depth_pairs(tmp_path / "depth"), tmp_path / "d", task="depth", epochs=30)
    assert depth.lower_is_better
    assert depth.trials[0].scores["rmse"] < depth.trials[0].probe["rmse"] - 0.1
    assert load_facts(Path(depth.trials[0].folder)).max_m == 10


def test_what_is_there_is_not_trained_again_and_what_is_made_again_is_the_same(
    run: Path, data: Path, tmp_path: Path
) -> None:
    first = tuned(run, data, tmp_path / "out", seeds=2, from_scratch=True)
    assert [(t.start, t.seed) for t in first.trials] == [("weights", 0), ("scratch", 0), ("weights", 1), ("scratch", 1)]
    made = {t.folder: (Path(t.folder) / WEIGHTS).read_bytes() for t in first.trials}
    assert len(set(made.values())) == 4, "seeds and starts differ"
    shutil.rmtree(first.trials[2].folder)
    again = tuned(run, data, tmp_path / "out", seeds=2, from_scratch=True)
    assert [t.cached for t in again.trials] == [True, True, False, True]
    assert {t.folder: (Path(t.folder) / WEIGHTS).read_bytes() for t in again.trials} == made
    assert again.rows == first.rows
    more = tuned(run, data, tmp_path / "out", seeds=2, label_share=(0.5, 1.0))
    assert [t.cached for t in more.trials] == [False, False, True, True], "more shares extend what is there"
    assert [t.pictures for t in more.trials] == [12, 12, 24, 24]


OPTIONS: list[dict[str, Any]] = [
    *({"size": 32}, {"epochs": 1}, {"batch_size": 16}, {"lr": 1e-2}, {"weight_decay": 0.9}, {"scale": "0.9,1"}),
    *({"flip": 0.0}, {"true_colours": False}, {"label_share": (0.5,)}),
]


def test_each_option_makes_another_model(run: Path, data: Path, tmp_path: Path) -> None:
    usual = {"lr": 1e-3, "weight_decay": 0.5}
    models = [
        (Path(tuned(run, data, tmp_path / str(i), **{**usual, **given}).trials[0].folder) / WEIGHTS).read_bytes()
        for i, given in enumerate([{}, *OPTIONS])
    ]
    assert len(set(models)) == len(models)


def test_options_of_dense_tasks_change_what_is_learned(run: Path, tmp_path: Path) -> None:
    depths, masks = planted.depth_pairs(tmp_path / "depth"), planted.masks(tmp_path / "masks")
    usual = tuned(run, depths, tmp_path / "a", task="depth").trials[0].scores
    assert tuned(run, depths, tmp_path / "b", task="depth", max_depth=3.0).trials[0].scores != usual
    assert tuned(run, depths, tmp_path / "c", task="depth", depth_unit="0.0005").trials[0].scores != usual
    usual = tuned(run, masks, tmp_path / "d", task="segment").trials[0].scores
    for name, given in (("e", {"mask_values": "2,1,0", "mask_ignore": "255"}), ("f", {"mask_ignore": "0,255"})):
        assert tuned(run, masks, tmp_path / name, task="segment", **given).trials[0].scores != usual


def test_batch_norms_of_given_weights_keep_their_statistics(data: Path, tmp_path: Path, shared_folder: Path) -> None:
    run = run_of(shared_folder / "finetune-cnn", "test_resnet")
    report = tuned(run, data, tmp_path / "out", from_scratch=True)
    before, weights, scratch = (
        {name: value for name, value in load_file(folder / WEIGHTS).items() if "running_mean" in name}
        for folder in (run, *(Path(trial.folder) for trial in report.trials))
    )
    assert before
    assert all(torch.equal(before[name], weights[name]) for name in before)
    assert not any(torch.equal(before[name], scratch[name]) for name in before)


def test_a_students_name_starts_from_random_weights_and_pretrained_from_its_librarys(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_eupe: Callable[..., Any]
) -> None:
    scratch = tuned("test_vit", data, tmp_path / "scratch", size=64)
    assert scratch.starts == {"scratch": "random weights"}
    assert scratch.trials[0].probe is None
    untrained = run_eupe(
        "finetune", "test_vit", "--size", 64, "--data", data, "--epochs", 0, "--out", tmp_path / "none"
    )
    assert untrained.code == 0, untrained.err
    assert "page: " in untrained.out
    kept = cached_timm(tmp_path, "test_resnet.r160_in1k", monkeypatch)
    pretrained = tuned("test_resnet.r160_in1k", data, tmp_path / "pretrained", size=64, epochs=0)
    assert list(pretrained.starts) == ["weights"]
    folder = Path(pretrained.trials[0].folder)
    (origin,) = load_facts(folder).learned_from
    assert origin.licence == "apache-2.0"
    made = load_file(folder / WEIGHTS)
    assert all(torch.equal(made[name], kept[name]) for name in made)


def test_a_loss_that_is_not_finite_stops_before_anything_is_written(run: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="lower --lr"):
        tuned(run, data, tmp_path / "out", lr=1e30, epochs=3)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["finetune.json"]


MISTAKES: list[tuple[list[str], str]] = [
    (["{data}", "--data", "{data}"], "is not a training run"),
    (["no_such_net", "--data", "{data}"], "no_such_net"),
    (["test_vit", "--data", "{data}", "--from-scratch"], "has none"),
    (["{run}", "--data", "{data}", "--pretrained"], "weights of its own"),
    (["{run}", "--data", "{data}", "--size", "50"], "50"),
    (["{run}", "--data", "{data}", "--label-share", "2"], "at most 1"),
    (["{run}", "--data", "{data}", "--label-share", "0.1", "--label-share", "0.1"], "twice"),
    (["{run}", "--data", "{data}", "--flip", "1.5"], "probability"),
    (["{run}", "--data", "{data}", "--seeds", "31"], "at most 30"),
    (["{run}", "--data", "{data}", "--scale", "2,3"], "--scale takes MIN,MAX"),
    (["{run}", "--data", "{data}", "--task", "depth", "--scale", "0.5,1"], "other depths"),
    (["{run}", "--data", "{data}", "--mask-values", "0,1"], "only for --task segment"),
    (["{run}", "--data", "{data}", "--max-depth", "5"], "only for --task depth"),
    (["{run}", "--data", "{data}", "--task", "sing"], "classify, segment, depth"),
    (["{run}", "--data", "{data}", "--task", "segment"], "holds no masks"),
    (["{run}", "--data", "{data}/nowhere"], "nowhere"),
    (["{run}", "--data", "{data}/val/red"], "has a label"),
]


@pytest.mark.parametrize(("words", "told"), MISTAKES, ids=lambda each: each if isinstance(each, str) else "")
def test_mistakes_get_a_sentence_and_leave_nothing(
    words: list[str], told: str, run: Path, data: Path, tmp_path: Path, run_eupe: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    done = run_eupe("finetune", *(word.format(run=run, data=data) for word in words), "--out", out)
    assert (done.code, done.err.count("error:")) == (2, 1)
    assert told in done.err
    assert not out.exists()


def test_another_fine_tuning_or_anything_else_at_out_is_refused(
    run: Path, data: Path, tmp_path: Path, run_eupe: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    tuned(run, data, out)
    other = run_eupe("finetune", run, "--data", data, "--out", out)
    assert other.code == 2
    assert "holds another fine-tuning (epochs was" in other.err
    changed = shades(tmp_path / "changed", classes=("dull", "red"))
    assert "data was" in run_eupe("finetune", run, "--data", changed, "--out", out).err
    refused = run_eupe("finetune", run, "--data", data, "--out", data)
    assert (refused.code, "is not empty" in refused.err) == (2, True)
    (out / "weights-1-0" / "judged.json").write_text("{}")
    damaged = run_eupe(
        *("finetune", run, "--data", data, "--out", out, "--epochs", 2 * 8 / 24, "--batch-size", 8, "--true-colours")
    )
    assert (damaged.code, "remove the folder" in damaged.err) == (2, True)
