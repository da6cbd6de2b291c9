"""Files of a run, or of results, that hold something else than they should: one sentence that names them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exporting import finished_run
from making import make_corpus

from eupe.errors import RunError
from eupe.evaluate.open_run import holdout, open_run
from eupe.evaluate.result import Result
from eupe.models.encoder_spec import load_encoder_spec
from eupe.report.comparison import merge
from eupe.report.training_curves import read_history
from eupe.train.run_spec import read_run_spec

Run = Callable[..., Any]
DEEP = "[" * 200_000
LINE: dict[str, Any] = {
    "task": "knn",
    "subject": "dinov2-s",
    "kind": "teacher",
    "untrained": False,
    "scores": {"accuracy": 0.5},
    "lower_is_better": False,
    "protocol": {"size": 224},
    "data": {"path": "digits"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("run") / "run", "test_vit")


@pytest.fixture
def spoilt(run: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    """The run with another text in one of its files."""

    def spoil(name: str, text: str) -> Path:
        for file in run.iterdir():
            (tmp_path / "run").mkdir(exist_ok=True)
            (tmp_path / "run" / file.name).write_bytes(file.read_bytes())
        (tmp_path / "run" / name).write_text(text)
        return tmp_path / "run"

    return spoil


def refused(outcome: Any, *said: str) -> None:
    assert outcome.code == 2, outcome.err
    assert outcome.err.count("\n") == 1 and "Traceback" not in outcome.err
    for words in said:
        assert words in outcome.err, outcome.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("3", "an encoder spec must be an object, not int"),
        (DEEP, "it is nested too deeply"),
        ({"size": "a"}, "an encoder spec has invalid fields: size 'a'"),
        ({"size": 0}, "an encoder spec has invalid fields: size 0"),
        ({"arch": 3, "patch": "x"}, "an encoder spec has invalid fields: arch 3, patch 'x'"),
        ({"summary_dim": -1}, "an encoder spec has invalid fields: summary_dim -1"),
        ({"mean": [0.5, 0.5]}, "an encoder spec has invalid fields: mean [0.5, 0.5]"),
        ({"std": [0.5, 0.5, None]}, "an encoder spec has invalid fields: std [0.5, 0.5, None]"),
        ({"dense": ["normed"]}, "an encoder spec has unknown kinds"),
    ],
)
def test_specs_of_students_that_are_none(
    change: str | dict[str, Any], said: str, run: Path, spoilt: Callable[..., Path]
) -> None:
    spec = json.loads((run / "student.json").read_text())
    text = change if isinstance(change, str) else json.dumps({**spec, **change})
    with pytest.raises(RunError) as raised:
        load_encoder_spec(spoilt("student.json", text))
    assert said in str(raised.value) and "no readable student.json" in str(raised.value)


@pytest.mark.parametrize("text", ["3", "[]", DEEP, '{"validation": {"a": {"summary": {"raw": "x"}}}}'])
def test_reports_of_runs_that_are_none(text: str, spoilt: Callable[..., Path], tmp_path: Path, run_eupe: Run) -> None:
    damaged = spoilt("report.json", text)
    refused(
        run_eupe("export", damaged, "--format", "timm", "--out", tmp_path / "out"),
        f"{damaged / 'report.json'} is not a report of a training run: ",
    )
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunError, match=r"has a damaged metrics\.jsonl or report\.json"):
        read_history(damaged)


@pytest.mark.parametrize("line", ["3", '{"step": "a"}', f'{{"step": 1, "loss": {10**400}, "losses": {{}}}}', DEEP])
def test_logs_of_runs_that_are_none(line: str, spoilt: Callable[..., Path]) -> None:
    with pytest.raises(RunError, match=r"has a damaged metrics\.jsonl or report\.json"):
        read_history(spoilt("metrics.jsonl", line + "\n"))


@pytest.mark.parametrize(
    "change",
    [
        {"config": 3},
        {"targets": [3]},
        {"targets": [{"teacher": "dinov2-s"}]},
        {"targets": [{"teacher": 5, "licence": "MIT"}]},
        {"mix": [5]},
        {"total_steps": "many"},
        {"versions": []},
    ],
)
def test_configs_of_runs_that_are_none(change: dict[str, Any], run: Path, spoilt: Callable[..., Path]) -> None:
    spec = json.loads((run / "config.json").read_text())
    with pytest.raises(RunError, match=r"is not a training run: no readable config\.json"):
        read_run_spec(spoilt("config.json", json.dumps({**spec, **change})))
    with pytest.raises(RunError, match=r"is not a training run: no readable config\.json"):
        read_run_spec(spoilt("config.json", DEEP))


def test_a_run_that_does_not_say_what_it_held_out(
    run: Path, spoilt: Callable[..., Path], tmp_path: Path, run_eupe: Run
) -> None:
    spec = json.loads((run / "config.json").read_text())
    pictures = make_corpus(tmp_path / "pictures", count=3)
    spec["config"].pop("holdout", None)
    silent = spoilt("config.json", json.dumps(spec))
    out = tmp_path / "page.html"
    refused(
        run_eupe("viz", silent, "--images", pictures, "--out", out), f"run {silent} has a config.json whose holdout"
    )
    (silent / "evaluations.jsonl").write_text(json.dumps({**LINE, "kind": "run", "subject": str(silent)}) + "\n")
    refused(
        run_eupe("eval", "report", silent, "--out", out, "--images", pictures), "whose holdout is None, not a share"
    )
    refused(run_eupe("eval", "agreement", silent), f"run {silent} has a config.json without ", "holdout")
    for share in ("0.1", 2, -0.5, [0.1]):
        spec["config"]["holdout"] = share
        with pytest.raises(RunError, match="not a share from 0 to 1"):
            holdout(spoilt("config.json", json.dumps(spec)))
    spec["config"]["holdout"] = 0.25
    assert holdout(spoilt("config.json", json.dumps(spec))) == 0.25
    del spec["targets"][0]["fingerprint"]
    with pytest.raises(RunError, match=r"has a config\.json without .*fingerprint; restore it"):
        open_run(spoilt("config.json", json.dumps(spec)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"untrained": [1]}, "untrained and lower_is_better are not both true or false"),
        ({"lower_is_better": "yes"}, "untrained and lower_is_better are not both true or false"),
        ({"scores": {"accuracy": 10**400}}, "int too large to convert to float"),
        ({"scores": {"accuracy": True}}, "its scores are not numbers"),
        ({"kind": "run", "subject": "runs/\0"}, "its subject is not a valid name"),
    ],
)
def test_results_of_other_types_are_refused(change: dict[str, Any], said: str, tmp_path: Path, run_eupe: Run) -> None:
    (tmp_path / "r.jsonl").write_text(json.dumps({**LINE, **change}) + "\n")
    refused(run_eupe("eval", "report", tmp_path / "r.jsonl"), "line 1 of", "r.jsonl holds no valid result", said)
    (tmp_path / "r.jsonl").write_text(DEEP)
    refused(run_eupe("eval", "report", tmp_path / "r.jsonl"), "it is nested too deeply")


@pytest.mark.parametrize("odd", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("end", [".html", ".md", None])
def test_scores_that_are_not_finite_stand_as_they_are_beside_others(
    odd: str, end: str | None, tmp_path: Path, run_eupe: Run
) -> None:
    lines = [{**LINE, "subject": "a", "scores": {"accuracy": float(odd)}}, {**LINE, "subject": "b"}]
    lines += [{**line, "task": "latency", "data": {}, "lower_is_better": True} for line in lines]
    lines += [{**lines[0], "task": "conflict", "data": {"verdict": "none"}, "scores": {"cka/dense": float(odd)}}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [] if end is None else ["--out", tmp_path / f"page{end}"]
    outcome = run_eupe("eval", "report", tmp_path / "r.jsonl", *words)
    assert outcome.code == 0, outcome.err
    said = outcome.out if end is None else (tmp_path / f"page{end}").read_text()
    assert str(float(odd)) in said and "0.500" in said, "the column has as many digits as without it"
    (column, _) = merge([Result.from_json(line) for line in lines]).columns
    assert {cell.largest for cell in column.cells.values()} == {0.5}


def test_a_subject_of_a_very_long_name_is_only_a_name(tmp_path: Path, run_eupe: Run) -> None:
    (tmp_path / "r.jsonl").write_text(json.dumps({**LINE, "kind": "run", "subject": "x" * 5000}) + "\n")
    outcome = run_eupe("eval", "report", tmp_path / "r.jsonl", "--out", tmp_path / "page.html")
    assert outcome.code == 0, outcome.err
