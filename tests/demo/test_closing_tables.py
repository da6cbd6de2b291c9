"""The demo's closing tables name steps, not directories."""

from __future__ import annotations

from typing import Any

import pytest

from demo.__main__ import console, show
from eupe.pipeline.execute import Result


def result(step: str, verb: str, report: dict[str, Any], *, cached: bool = False, output: str | None = None) -> Result:
    return Result(step, verb, cached, 1.0, output, report)


def test_each_table_has_a_row_for_each_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "width", 130)
    store = {"num_views": 24, "stored_bytes": 8e5, "raw_bytes": 1e6, "views_per_s": 41.0, "cached": False}
    cosines = dict.fromkeys(
        ("cosine", "cosine_mean", "cosine_untrained", "normalised_cosine", "normalised_untrained"), 0.25
    )
    agreement = {"targets": [{"target": "proxy-01234567", "kinds": {"dense": cosines | {"cosine": 0.75}}}]}
    run = {"run": "o/p", "steps": 140, "images_per_s": 12.0, "data_wait": 0.01}
    dense = [
        {"subject": subject, "untrained": untrained, "scores": {"x": score}}
        for subject, untrained, score in (("o/proxy-01234567", False, 0.75), ("dinov2", True, 0.5))
    ]
    results = [
        result("a-features", "extract", {**store, "store": "o/a.zarr"}),
        result("b-features", "extract", {**store, "store": "o/b.zarr"}, cached=True),
        result("proxy", "train", run, output="o/proxy-01234567"),
        result("student-agreement", "eval agreement", agreement),
        result("dinov2-digits", "eval knn", {"results": [{"scores": {"accuracy": 0.5, "majority": 0.1}}]}),
        result(
            "proxy-digits",
            "eval knn",
            {"results": [{"scores": {"accuracy": a, "majority": 0.1}} for a in (0.4, 0.3)]},
        ),
        *(result(verb, f"eval {verb}", {"results": dense}) for verb in ("segment", "depth", "correspond")),
    ]
    show({one.step: one for one in results})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a-features", "24", "0.8", "80%", "41", "o/a.zarr"] in rows
    assert ["b-features", "24", "0.8", "80%", "cache", "hit", "o/b.zarr"] in rows
    assert ["proxy", "140", "12", "1.0%", "o/p"] in rows
    assert ["student", "proxy", "dense", "0.750", "0.250", "0.250", "0.250", "0.250"] in rows
    assert ["dinov2", "50.0%", "10.0%"] in rows
    assert ["proxy", "40.0%", "30.0%", "10.0%"] in rows
    assert ["proxy", "0.750", "0.750", "0.750"] in rows
    assert ["dinov2,", "untrained", "0.500", "0.500", "0.500"] in rows
