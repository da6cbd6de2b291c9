"""What the end of a pipeline shows."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from eupe.pipeline.execute import Result
from eupe.pipeline.show import show_results


def judged(subject: str, score: float, *, untrained: bool = False) -> dict[str, Any]:
    scores, protocol = {"miou": score, "accuracy": 0.9}, {"lr": 0.003, "betas": [0.9, 0.99]}
    return {"task": "segment", "subject": subject, "untrained": untrained, "scores": scores, "protocol": protocol}


def test_each_subject_is_named_with_its_first_score_and_no_protocol() -> None:
    report = {"results": [judged("dinov2", 0.5), judged("out/proxy-0123", 0.25), judged("x", 0.125, untrained=True)]}
    results = [
        Result("proxy", "train", True, 1.0, "out/proxy-0123", {"steps": 7}),
        Result("segmentation", "eval segment", False, 2.0, None, report),
    ]
    file = io.StringIO()
    show_results(results, Console(file=file), reports=Path("out/reports"))
    lines = [" ".join(line.split()) for line in file.getvalue().splitlines()]
    assert lines[2] == "segmentation 2 s dinov2 miou 0.5, proxy miou 0.25, x untrained miou 0.125"
    assert lines[-1] == "full reports of all steps: out/reports"
