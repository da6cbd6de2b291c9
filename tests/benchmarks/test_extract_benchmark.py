"""benchmarks/extract.py: the row that times the command as it is typed ends with its ratio; rates are not tested."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import extract


@pytest.mark.slow
@pytest.mark.usefixtures("assets", "forked")
def test_the_command_is_timed_as_it_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["extract", "typed", "--folder", str(tmp_path), "--seconds", "0.1", "--repeats", "1", "--dtype", "fp32"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(extract, "DINOV2", replace(extract.CNN, size=64))  # which is over sooner
    extract.main()
    found = capsys.readouterr().out
    rows = dict(re.findall(r"^\| (command|forward) \| ([\d,.]+) \|", found, re.MULTILINE))
    ((ratio, target),) = re.findall(r"^\| command / forward alone \| ([\d.]+) \([^)]+\) \| ≥ ([\d.]+) \|", found, re.M)
    assert float(ratio) == pytest.approx(float(rows["command"]) / float(rows["forward"]), rel=0.1)
    assert float(target) == extract.TYPED
    whole, around = map(int, re.findall(r"took (\d+) s, (\d+) of them before and after", found)[0])
    assert 0 < around <= whole
