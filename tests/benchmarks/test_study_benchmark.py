"""The tables of the study: roles of subjects, paired differences, and their intervals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy.stats import ttest_rel

from benchmarks import study
from benchmarks.study import QUESTIONS, TASKS, gaps_closed, interval, main, read_scores
from eupe.pipeline.recipe import read_recipe

SUBJECTS = sorted({row for question in QUESTIONS for row in question.rows})


def run_of(values: dict[str, float]) -> dict[str, Any]:
    """Build the output of `eupe run study --json` in which each subject has one value on two tasks."""
    trained = [name for name in values if name not in ("untrained", "pixels", *study.EXPERTS)]
    steps = [{"step": name, "verb": "train", "output": f"out/{name}-01ab", "report": {}} for name in trained]
    for task, verb, less in (("knn", "eval knn", False), ("depth", "eval depth", True)):
        judged = [
            {
                "subject": f"out/{name}-01ab" if name in trained else name,
                "untrained": False,
                "scores": {"first": value, "second": 7.0},
                "lower_is_better": less,
            }
            for name, value in values.items()
            if name != "untrained"
        ]
        fresh = {**judged[0], "untrained": True, "scores": {"first": values["untrained"]}}
        steps.append({"step": task, "verb": verb, "output": None, "report": {"results": judged}})
        steps.append({"step": f"{task}-untrained", "verb": verb, "output": None, "report": {"results": [fresh]}})
    return {"steps": steps}


def test_scores_are_by_step_and_less_is_negated() -> None:
    scores = read_scores(run_of({"dinov2": 0.5, "direct": 0.3, "untrained": 0.1}))

    assert scores["knn"] == {"dinov2": 0.5, "direct": 0.3, "untrained": 0.1}
    assert scores["depth"] == {"dinov2": -0.5, "direct": -0.3, "untrained": -0.1}


def test_an_interval_that_leaves_zero_out_is_that_of_a_paired_t_test() -> None:
    first, second = [0.30, 0.32, 0.35], [0.33, 0.36, 0.38]
    changes = [b - a for a, b in zip(first, second, strict=True)]

    found = ttest_rel(second, first).confidence_interval(0.95)

    assert sum(changes) / 3 - interval(changes) == pytest.approx(found.low)
    assert sum(changes) / 3 + interval(changes) == pytest.approx(found.high)


def test_gaps_are_averaged_over_the_tasks_that_have_one() -> None:
    values = {"dinov2": 0.5, "efficientnet-lite0": 0.9, "untrained": 0.1, "direct": 0.3, "proxy": 1.0}
    scores = {0: read_scores(run_of(values))}

    # categories: a quarter of 0.1 to 0.9; depth: 0.1 is better than either expert, so there is no gap
    assert gaps_closed(scores, "direct") == pytest.approx([0.25])
    # categories: the proxy began as the better expert; depth: it became worse than it was, by a quarter of the gap
    assert gaps_closed(scores, "proxy") == pytest.approx([-0.25])


def test_seeds_are_kept_and_tables_are_of_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        values = {name: 0.5 + 0.01 * i + 0.001 * seed * i for i, name in enumerate(SUBJECTS)}
        (tmp_path / f"{seed}.json").write_text(json.dumps(run_of(values)))
        words = ["study", str(tmp_path / "scores.json"), "--run", str(seed), str(tmp_path / f"{seed}.json")]
        monkeypatch.setattr(sys, "argv", words)
        main()
    printed = capsys.readouterr().out.partition("Seeds: 0, 1.")[2]

    assert [printed.count(f"## {question.title}\n") for question in QUESTIONS] == [1] * len(QUESTIONS)
    by = SUBJECTS.index("views-1"), SUBJECTS.index("fresh-views")
    change, first = 0.0105 * (by[0] - by[1]), 0.5 + 0.0105 * by[0]
    assert f"| views-1 | {first:.3f} (**{change:+.3f} ± " in printed


def test_the_recipe_judges_every_row_on_every_task() -> None:
    steps = yaml.safe_load(read_recipe("study"))["steps"]

    for task in TASKS:
        (options,) = steps[task].values()
        assert set(SUBJECTS) - {"untrained"} <= set(options["subjects"])
        (untrained,) = steps[f"{task}-untrained"].values()
        assert untrained["untrained"] is True
        assert {name: untrained.get(name) for name in ("data", "size", "steps", "label-share", "penalty", "lr")} == {
            name: options.get(name) for name in ("data", "size", "steps", "label-share", "penalty", "lr")
        }
