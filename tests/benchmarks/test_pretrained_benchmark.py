"""benchmarks/pretrained.py: it starts from the real weights; what it shows is not tested."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from benchmarks import pretrained


@pytest.mark.slow
@pytest.mark.usefixtures("assets")
def test_each_way_of_training_is_compared_with_what_was_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The smaller expert is the student; `tests/demo/test_assets.py` tests the other's weights in timm's names."""
    words = ["pretrained", "--folder", tmp_path, "--student", "efficientnet_lite0", "--pictures", 72, "--steps", 2]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    pretrained.main()
    rows = dict(re.findall(r"^\| (.+?) \| ([\d.]+) \|", capsys.readouterr().out, re.MULTILINE))
    assert list(rows) == ["before", *pretrained.WAYS]
    assert all(0 <= float(value) <= 1 for value in rows.values())
    assert not any(tmp_path.joinpath("pretrained").glob("*"))
