"""Evaluations that name several things, as steps of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
from planning import plan, problems_of, write_files

STEPS = """
out: out
let: {k: 5}
steps:
  expert: {extract: {teacher: "timm:test_vit", corpus: photos}}
  other: {extract: {teacher: "timm:test_vit2", corpus: photos}}
  fight: {eval conflict: {stores: [expert, other]}}
  student: {train: {targets: [expert, other], student: test_vit}}
  digits: {eval knn: {subjects: student, data: photos, k: ${k}}}
"""
REPORT = "  report: {eval report: {judged: student, out: page.html}}\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)


def test_stores_and_runs_of_earlier_steps_are_found() -> None:
    planned = plan(STEPS + REPORT)
    stores = " ".join(str(planned[name].output) for name in ("expert", "other"))
    assert " ".join(planned["fight"].command()) == f"eval conflict {stores} --json"
    report = planned["report"]
    assert " ".join(report.command()) == f"eval report {planned['student'].output} --out {report.output} --json"
    assert str(report.output) == f"out/report-{report.key[:8]}.html"


def test_a_report_is_made_again_when_an_evaluation_before_it_is_another() -> None:
    report = plan(STEPS + REPORT)["report"]
    assert plan(STEPS + REPORT)["report"].key == report.key
    assert plan(STEPS + REPORT, {"k": 6})["report"].key != report.key
    more = "  linear: {eval linear: {subjects: student, data: photos}}\n"
    assert plan(STEPS + more + REPORT)["report"].key != report.key
    assert plan(STEPS + REPORT + more)["report"].key == report.key


def test_a_step_of_the_wrong_kind_is_a_mistake() -> None:
    assert problems_of(STEPS + "  x: {eval conflict: {stores: [expert, student]}}") == [
        "steps.x.eval conflict.stores: step 'student' makes a run, but this option takes a store"
    ]
    assert problems_of(STEPS + "  x: {eval report: {judged: expert}}") == [
        "steps.x.eval report.judged: step 'expert' makes a store, but this option takes a run"
    ]
