"""An export as a step of a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
from planning import plan, problems_of, write_files

from eupe.store import Store

RECIPE = """
out: out
steps:
  expert: {extract: {teacher: "timm:test_vit", corpus: photos}}
  student: {train: {targets: expert, student: test_vit, steps: 3}}
  portable: {export: {run: student, format: timm, heads: all, out: timm}}
  graph: {export: {run: student, format: onnx, dynamic-size: true, precision: fp16, out: g.onnx}}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    return tmp_path


def test_an_export_takes_an_earlier_run_and_is_named_after_its_key() -> None:
    steps = plan(RECIPE)
    portable, student = steps["portable"], steps["student"]
    assert portable.output == Path(f"out/portable-{portable.key[:8]}")
    wanted = ["export", str(student.output), "--format", "timm", "--heads", "all"]
    assert portable.command() == [*wanted, "--out", str(portable.output), "--json"]
    assert str(steps["graph"].output).endswith(".onnx") and "--dynamic-size" in steps["graph"].command()


def test_an_export_is_done_anew_when_its_run_or_its_options_change() -> None:
    before, trained = plan(RECIPE), plan(RECIPE.replace("steps: 3", "steps: 4"))
    assert before["portable"].key != trained["portable"].key
    other = plan(RECIPE.replace("format: timm", "format: hf"))
    assert before["portable"].key != other["portable"].key
    assert before["graph"].key == other["graph"].key
    renamed = plan(RECIPE.replace("out: timm", "out: elsewhere"))
    assert before["portable"].key == renamed["portable"].key


def test_calibration_pictures_count_for_an_export(here: Path) -> None:
    recipe = RECIPE.replace("precision: fp16", "precision: int8, calibrate: some")
    (here / "some").mkdir()
    (here / "some" / "1.png").write_bytes(b"1")
    before = plan(recipe)
    assert plan(recipe)["graph"].key == before["graph"].key
    (here / "some" / "2.png").write_bytes(b"2")
    assert plan(recipe)["graph"].key != before["graph"].key


def test_mistakes_in_an_export_step_are_named() -> None:
    steps = (
        'steps: {a: {extract: {teacher: "timm:test_vit", corpus: photos}}, b: {export: {run: a, out: x, form: timm}}}'
    )
    found = "\n".join(problems_of(f"out: out\n{steps}"))
    assert "steps.b.export.run: step 'a' makes a store, but this option takes a run" in found
    assert "steps.b.export.form: is not an option of eupe export; did you mean format?" in found
    assert "steps.b.export.format: is missing; eupe export needs it" in found


@pytest.mark.slow
def test_a_recipe_ends_with_a_model_that_timm_loads(
    here: Path, tiny_store: Store, monkeypatch: pytest.MonkeyPatch, run_eupe: Callable[..., Any]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    training = f'targets: "{tiny_store.path}", student: test_vit, batch-size: 8, steps: 3, head-width: 16, holdout: 0.3'
    text = f"""
out: out
steps:
  student: {{train: {{{training}}}}}
  portable: {{export: {{run: student, format: timm, heads: all, out: timm}}}}
"""
    (here / "r.yaml").write_text(text)
    first = run_eupe("run", "r.yaml", "--json")
    assert first.code == 0, first.err
    ended = {step["step"]: step for step in json.loads(first.out)["steps"]}
    out = ended["portable"]["output"]
    assert timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=0).num_features == 64
    assert ended["portable"]["report"]["outputs"].keys() == {
        "summary",
        "dense",
        "timm:test_vit.summary",
        "timm:test_vit.dense",
    }
    shown = run_eupe("run", "r.yaml").out
    (row,) = [line for line in shown.splitlines() if line.split()[:1] == ["portable"]]
    assert "cached" in row and "summary least 1" in row


def test_a_run_is_fine_tuned_and_the_model_exported_both_named_after_their_keys(run_eupe: Callable[..., Any]) -> None:
    recipe = (
        RECIPE
        + """
  tuned: {finetune: {subject: student, data: photos, epochs: 2, label-share: [0.1, 1], from-scratch: true}}
  app: {export: {run: tuned, format: onnx, out: app}}
  other: {finetune: {subject: resnet18.a1_in1k, data: photos}}
"""
    )
    steps = plan(recipe)
    tuned = steps["tuned"]
    assert tuned.output == Path(f"out/tuned-{tuned.key[:8]}")
    assert tuned.command() == [
        *("finetune", str(steps["student"].output), "--data", "photos", "--epochs", "2"),
        *("--label-share", "0.1", "--label-share", "1", "--from-scratch", "--out", str(tuned.output), "--json"),
    ]
    assert str(tuned.output) in steps["app"].command()
    assert plan(recipe.replace("epochs: 2", "epochs: 3"))["app"].key != steps["app"].key
    Path("tuned.yaml").write_text(recipe)
    shown = run_eupe("run", "tuned.yaml", "--dry-run")
    assert shown.code == 0, shown.err
    assert "resnet18.a1_in1k apache-2.0" in shown.out, "weights that a fine-tuning starts from have a licence, too"
    (told,) = problems_of(recipe.replace("resnet18.a1_in1k", "studnet"))
    assert "there is no earlier step 'studnet'; did you mean student?" in told
