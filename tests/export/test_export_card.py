"""The README of an export: licences, recipe, evaluations."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from exporting import DINO, LITE, finished_run, target

from eupe.errors import RunError
from eupe.evaluate.licences import Origin, origins
from eupe.evaluate.result import Result, keep_results
from eupe.export.config import ExportConfig
from eupe.export.job import ExportReport, export
from eupe.train.run_spec import read_run_spec

ARCH = "test_vit"


def of(run: Path) -> list[Origin]:
    return origins(run, read_run_spec(run))


def export_of(run: Path, **options: Any) -> tuple[ExportReport, str]:
    out = run.with_name(f"{run.name}-out")
    return export(ExportConfig(run=run, out=out, format="timm", **options)), (out / "README.md").read_text()


def test_a_student_of_a_proxy_has_the_licences_of_the_proxy_s_teachers(tmp_path: Path) -> None:
    first = finished_run(tmp_path / "first", ARCH, targets=[DINO])
    proxy = finished_run(tmp_path / "proxy", ARCH, targets=[target(str(first), licence="own"), LITE])
    run = finished_run(tmp_path / "student", ARCH, targets=[target(str(proxy), licence="own")])
    assert of(run) == [
        Origin("dinov2-s", "apache-2.0", ("proxy", "first")),
        Origin("efficientnet-lite0", "mit", ("proxy",)),
    ]
    report, card = export_of(run)
    assert report.licences == {"dinov2-s": "apache-2.0", "efficientnet-lite0": "mit"}
    assert "| dinov2-s | apache-2.0 | first of proxy |" in card
    assert str(tmp_path) not in card, "where things lie on one machine is nobody else's concern"


def test_a_proxy_is_found_where_it_lay_or_beside_its_student_and_is_unknown_when_gone(tmp_path: Path) -> None:
    proxy = finished_run(tmp_path / "there" / "proxy", ARCH, targets=[LITE])
    run = finished_run(tmp_path / "here" / "student", ARCH, targets=[target("elsewhere/proxy", licence="own")])
    (gone,) = of(run)
    assert gone.name == "proxy" and gone.licence.startswith("unknown: no run is here")
    assert "unknown: no run is here" in export_of(run)[1]
    proxy.rename(run.parent / "proxy")
    assert of(run) == [Origin("efficientnet-lite0", "mit", ("proxy",))]


def test_what_a_student_began_as_counts_too(tmp_path: Path) -> None:
    stage2 = finished_run(tmp_path / "stage2", ARCH, targets=[LITE])
    run = finished_run(tmp_path / "stage3", ARCH, targets=[DINO])
    (run / "init.json").write_text(json.dumps({"source": str(stage2)}))
    assert of(run) == [Origin("dinov2-s", "apache-2.0"), Origin("efficientnet-lite0", "mit", ("stage2",))]
    (run / "init.json").write_text(json.dumps({"source": "trunk.safetensors"}))
    assert [origin.name for origin in of(run)] == ["dinov2-s", "trunk.safetensors"]
    assert of(run)[1].licence.startswith("unknown")


def test_runs_that_name_each_other_come_to_an_end(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    finished_run(one, ARCH, targets=[target(str(other), licence="own"), DINO])
    finished_run(other, ARCH, targets=[target(str(one), licence="own")])
    assert {origin.name for origin in of(one)} == {"dinov2-s"}


def test_the_card_says_what_a_hub_and_a_reader_ask_for(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", ARCH)
    judged = Result(
        task="knn", subject=str(run), kind="run", scores={"accuracy": 0.5}, protocol={"metric": "l2", "k": 10}, data={}
    )
    again = replace(judged, scores={"accuracy": 0.625, "top5": 0.9})
    keep_results([judged, again, replace(judged, untrained=True), replace(judged, task="segment", protocol={})])
    report, card = export_of(run, heads=("dinov2-s",))
    _, front, body = card.split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["license"] == "other" and head["library_name"] == "timm"
    assert {"eupe", "distillation"} <= set(head["tags"])
    for words in (
        "| dinov2-s | apache-2.0 |",
        "| efficientnet-lite0 | mit |",
        "| steps | 1,234 |",
        "| batch_size | 32 |",
        "`ffffffff`",
        "`dddddddd`",
        "| dinov2-s dense | 0.8100 | 0.7000 | 0.5000 |",
        "| knn | the student | accuracy 0.625, top5 0.9 | metric l2, k 10 |",
        "| knn | untrained weights | accuracy 0.5 |",
        "| segment | the student | accuracy 0.5 |  |",
        "Trained with torch 9",
        f"`dinov2-s.dense` | {report.outputs['dinov2-s.dense']['least']:.6f}",
        "efficientnet-lite0 dense",
    ):
        assert words in body, words
    assert "the student | accuracy 0.5 | metric" not in body, "a newer result of the same has taken its place"
    assert "efficientnet-lite0.dense" not in body, "that head was not asked for"


def test_evaluations_that_cannot_be_read_stop_an_export(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run", ARCH)
    (run / "evaluations.jsonl").write_text('{"task"')
    with pytest.raises(RunError, match=r"evaluations.jsonl holds no valid result of an evaluation"):
        export_of(run)
    assert not run.with_name("run-out").exists()


def test_the_report_is_one_line_of_json_or_readable_lines(tmp_path: Path, run_eupe: Callable[..., Any]) -> None:
    run = finished_run(tmp_path / "run", ARCH)
    outcome = run_eupe("export", run, "--format", "timm", "--out", tmp_path / "out", "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert outcome.out.count("\n") == 1
    assert (report["format"], report["cached"], report["kind"]) == ("timm", False, "timm test_vit")
    assert report["torch_ms"] > 0 and report["exported_ms"] > 0
    assert report["num_bytes"] > (tmp_path / "out" / "model.safetensors").stat().st_size
    again = run_eupe("export", run, "--format", "timm", "--out", tmp_path / "out")
    assert "cached: yes" in again.out and "summary: least 1, mean 1" in again.out.replace("  ", "")
