"""demo/outcome.py: roles in place of directories, gaps that were closed, and a sentence that follows the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from demo import __main__ as demo
from demo.__main__ import cost
from demo.outcome import Score, conclude, gaps_closed, read_scores, results_table, write_scores
from eupe.pipeline.execute import Result


def judged(subject: str, value: float, *, untrained: bool = False, less: bool = False) -> dict[str, Any]:
    return {
        "subject": subject,
        "untrained": untrained,
        "scores": {"first": value, "second": 9.0},
        "lower_is_better": less,
    }


def step(name: str, verb: str, rows: list[dict[str, Any]], output: str | None = None) -> Result:
    return Result(name, verb, False, 1.0, output, {"results": rows})


def results(student_depth: float = 0.9) -> list[Result]:
    experts = ("dinov2", "efficientnet-lite0", "out/proxy-01ab")
    return [
        step("proxy", "train", [], output="out/proxy-01ab"),
        step("student", "train", [], output="out/student-23cd"),
        step("a", "eval knn", [judged(*each) for each in zip(experts, (0.6, 0.8, 0.9), strict=True)]),
        step("b", "eval knn", [judged("out/student-23cd", 0.3), judged("out/student-23cd", 0.1, untrained=True)]),
        step("c", "eval depth", [judged(*each, less=True) for each in zip(experts, (0.5, 1.0, 0.8), strict=True)]),
        step(
            "d",
            "eval depth",
            [
                judged("out/student-23cd", student_depth, less=True),
                judged("out/student-23cd", 1.5, untrained=True, less=True),
            ],
        ),
        step("e", "eval depth", [judged("pixels", 2.0, less=True)]),
        step("f", "eval knn", [judged("pixels", 0.2)]),
        step("g", "eval agreement", [judged("out/student-23cd", 0.7)]),
    ]


def test_scores_have_the_names_of_roles(tmp_path: Path) -> None:
    scores = read_scores(results())

    assert {(score.task, score.subject): score.value for score in scores} == {
        ("knn", "expert dinov2"): 0.6,
        ("knn", "expert efficientnet-lite0"): 0.8,
        ("knn", "proxy before"): 0.8,
        ("knn", "proxy"): 0.9,
        ("knn", "student"): 0.3,
        ("knn", "student before"): 0.1,
        ("knn", "pixels"): 0.2,
        ("depth", "expert dinov2"): 0.5,
        ("depth", "expert efficientnet-lite0"): 1.0,
        ("depth", "proxy before"): 1.0,
        ("depth", "proxy"): 0.8,
        ("depth", "student"): 0.9,
        ("depth", "student before"): 1.5,
        ("depth", "pixels"): 2.0,
    }
    write_scores(scores, tmp_path / "results.json")
    written = json.loads((tmp_path / "results.json").read_text())
    assert {"task": "depth", "subject": "student before", "value": 1.5, "less_is_better": True} in written
    assert len(written) == len(scores)


def test_gaps_are_those_to_the_better_expert_and_a_subject_that_was_better_has_none() -> None:
    scores = read_scores(results())

    assert gaps_closed(scores, "proxy") == pytest.approx({"depth": 0.4})  # it began as the better expert at categories
    assert gaps_closed(scores, "student") == pytest.approx({"knn": 0.2 / 0.7, "depth": 0.6})


def test_a_closed_gap_is_at_most_one_and_falls_below_zero() -> None:
    task = [Score("segment", "expert a", 0.5, False), Score("segment", "student before", 0.1, False)]

    assert gaps_closed([*task, Score("segment", "student", 0.9, False)], "student") == {"segment": 1.0}
    assert gaps_closed([*task, Score("segment", "student", 0.0, False)], "student")["segment"] == pytest.approx(-0.25)


@pytest.mark.parametrize(
    ("student_depth", "told"),
    [
        (0.9, "the student became better than it was at 2 of 2 tasks and closed 44% of the gap"),
        (1.7, "the student became better than it was at 1 of 2 tasks (not at depth) and closed 4% of the gap"),
    ],
)
def test_the_sentence_follows_the_numbers(student_depth: float, told: str) -> None:
    sentence = conclude(read_scores(results(student_depth)))

    assert "dinov2 is better at depth" in sentence
    assert "efficientnet-lite0 is better at categories" in sentence
    assert "the proxy became better than it was at 2 of 2 tasks and closed 40% of the gap" in sentence
    assert told in sentence


def test_a_folder_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(demo, "ASSETS", tmp_path / "file/assets")

    with pytest.raises(SystemExit) as ended:
        demo.main()

    assert ended.value.code == 2
    assert "file/assets or demo-out cannot be written (" in "".join(capsys.readouterr().out.split("\n"))


def test_the_cost_is_that_of_all_caches_and_of_each_training() -> None:
    store = {"stored_bytes": 20_000_000}
    stores = [Result(name, "extract", True, 30.0, f"out/{name}.zarr", store) for name in ("a", "b")]
    trained = Result("proxy", "train", False, 110.4, "out/proxy-01ab", {"steps": 100})

    assert cost([*stores, trained]) == (
        "Caches: 2 stores, 40 MB, 60 s, which later students share. Training: proxy: 100 steps, 110 s."
    )


def test_the_table_has_a_row_for_each_subject_in_order() -> None:
    console = Console(width=140)
    with console.capture() as printed:
        console.print(results_table(read_scores(results())))

    rows = printed.get().splitlines()[2:]
    assert [row[: row.index("0.") if "0." in row else None].strip() for row in rows if row.strip()] == [
        "expert dinov2",
        "expert efficientnet-lite0",
        "proxy before",
        "proxy",
        "student before",
        "student",
        "pixels",
    ]
    assert rows[3].split() == ["proxy", "0.900", "0.800", "+40%", "of", "the", "gap"]
