"""Fine-tuned models exported with their heads and class names, and run by the code on their cards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import planted
import pytest
import torch
from exporting import SHALLOW_TEST_VIT, centre_view, code_of
from tuning import run_of, shades, tuned

from eupe.common.compute import normalise
from eupe.finetune.model import load_model

SIZE = 64
DATA = {"classify": shades, "segment": planted.masks, "depth": planted.depth_pairs}
OUTPUT = {"classify": "logits", "segment": "logits", "depth": "depth"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("finetuned")

    def model(task: str) -> Path:
        if not (folder / task).exists():
            data = DATA[task](folder / f"data-{task}")
            tuned(run_of(folder / "run", SHALLOW_TEST_VIT), data, folder / task, task=task)
        return folder / task / "weights-1-0"

    return model


def answers(model: Path, picture: Path) -> Any:
    """The answer of encoder and head, without any export."""
    encoder, head, facts = load_model(model)
    with torch.inference_mode():
        tokens = encoder(normalise(centre_view(picture, SIZE), encoder.spec.mean, encoder.spec.std))
        if facts.task == "classify":
            return head(tokens.summary)
        return head(tokens.dense).permute(0, 2, 3, 1)


CASES = [("onnx", "segment"), ("openvino", "depth"), ("timm", "classify")]


@pytest.mark.parametrize(("form", "task"), CASES)
def test_the_code_on_the_card_answers_as_the_model_does(
    form: str, task: str, models: Callable[[str], Path], tmp_path: Path, run_eupe: Callable[..., Any]
) -> None:
    model, out = models(task), tmp_path / "out"
    done = run_eupe("export", model.parent, "--format", form, "--out", out, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert list(report["outputs"]) == ["summary", "dense", OUTPUT[task]]
    assert report["licences"] == {"dinov2-s": "apache-2.0", "efficientnet-lite0": "mit"}
    picture = next(model.parents[1].glob(f"data-{task}/**/*.png"))
    said: dict[str, Any] = {"DIR": str(out), "PICTURE": str(picture)}
    exec(code_of(out / "README.md"), said)
    wanted = answers(model, picture)
    got = torch.as_tensor(np.asarray(said[OUTPUT[task]]))
    assert got.shape == wanted.shape
    # timm's preparation resizes first and crops then, which mixes other pixels at the edges of the crop
    near = 0.05 if form == "timm" else 2e-3
    assert torch.allclose(got, wanted, atol=near, rtol=near)
    classes = json.loads((model / "task.json").read_text())["classes"]
    card = (out / "README.md").read_text()
    assert "| seed | 0 |" in card
    if task == "depth":
        assert not (out / "labels.txt").exists()
        assert said["answer"].shape == tuple(wanted.shape[1:3])
        assert "depth-estimation" in card
        return
    assert (out / "labels.txt").read_text().splitlines() == classes
    assert f"0 {classes[0]}, 1 {classes[1]}" in card
    if task == "classify":
        assert said["answer"] == classes[int(wanted[0].argmax())]
    else:
        assert said["answer"] == [[classes[int(cell.argmax())] for cell in row] for row in wanted[0]]
    if form == "onnx":
        (props,) = onnx.load(str(out / "model.onnx")).metadata_props
        assert (props.key, json.loads(props.value)) == ("classes", classes)
    if form == "timm":
        assert json.loads((out / "config.json").read_text())["label_names"] == classes


def test_formats_without_a_place_for_a_head_are_refused(
    models: Callable[[str], Path], tmp_path: Path, run_eupe: Callable[..., Any]
) -> None:
    classify, segment = models("classify"), models("segment")
    several = shutil.copytree(classify.parent, tmp_path / "several")
    shutil.copytree(classify, several / "weights-1-1")
    cases = [
        ((classify, "--format", "hf"), ", timm"),
        ((segment, "--format", "timm"), "fine-tuned to segment; give --format onnx"),
        ((classify, "--format", "onnx", "--heads", "all"), "--heads is for the targets of a run"),
        ((several, "--format", "onnx"), "holds 2 fine-tuned models; give one of them"),
    ]
    for words, told in cases:
        done = run_eupe("export", *words, "--out", tmp_path / "out")
        assert done.code == 2
        assert told in done.err
        assert not (tmp_path / "out").exists()
