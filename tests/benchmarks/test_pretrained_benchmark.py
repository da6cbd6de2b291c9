"""benchmarks/pretrained.py: it starts from the real weights; what it shows is not tested."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from transformers import Dinov2Config, Dinov2Model

from benchmarks import pretrained


def test_renamed_weights_are_timms_and_give_the_same_tokens() -> None:
    config = Dinov2Config(hidden_size=384, num_hidden_layers=2, num_attention_heads=6, image_size=56, patch_size=14)
    torch.manual_seed(0)
    theirs = Dinov2Model(config).eval()
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if "lambda1" in name or name.endswith(("norm.bias", "projection.bias")):
                tensor.normal_()
    ours = timm.create_model("vit_small_patch14_dinov2", num_classes=0, depth=2, img_size=56).eval()
    ours.load_state_dict(pretrained.in_timm_names(dict(theirs.state_dict())))
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(ours.forward_features(pixels), theirs(pixels).last_hidden_state)


@pytest.mark.slow
@pytest.mark.usefixtures("assets")
@pytest.mark.parametrize("student", pretrained.EXPERTS)
def test_each_way_of_training_is_compared_with_what_was_before(
    student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["pretrained", "--folder", tmp_path, "--student", student, "--pictures", 72, "--steps", 2]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    pretrained.main()
    rows = dict(re.findall(r"^\| (.+?) \| ([\d.]+) \|", capsys.readouterr().out, re.MULTILINE))
    assert list(rows) == ["before", *pretrained.WAYS]
    assert all(0 <= float(value) <= 1 for value in rows.values())
    assert not any(tmp_path.joinpath("pretrained").glob("*"))
