"""The recipes that come with eupe are valid, and what they say they cost is what `eupe plan` says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from making import make_corpus
from planning import plan, problems_of

from eupe.extract.plan_on_paper import NOMINAL_SHARES
from eupe.pipeline.recipe import shipped_names

Run = Callable[..., Any]

MUST_BE_SET: dict[str, list[str]] = {"eupe": ["--set", "corpus=nowhere", "--set", "labelled=nowhere"]}


def dry(run_eupe: Run, *words: object) -> dict[str, dict[str, Any]]:
    outcome = run_eupe("run", *words, "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    return {step["step"]: step for step in json.loads(outcome.out)["steps"]}


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_recipe_is_valid_without_its_pictures(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_eupe: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = dry(run_eupe, name, *MUST_BE_SET.get(name, []), "--set", "num-images=100", "--set", "out=o")
    assert all(step["state"] == "to do" for step in steps.values())
    for step in steps.values():
        if step["verb"] == "extract":
            assert step["cost"]["num_bytes"] == pytest.approx(
                100 * step["cost"]["views_per_image"] * step["cost"]["bytes_per_view"]
            )
        if step["verb"] == "train":
            assert step["cost"]["num_views"] == step["cost"]["steps"] * step["cost"]["batch_size"]
    shown = run_eupe("run", name, *MUST_BE_SET.get(name, []), "--dry-run")
    assert shown.code == 0
    assert all(step in shown.out for step in steps)
    assert list(tmp_path.iterdir()) == []


def test_the_recipe_in_the_documentation_is_valid() -> None:
    text = (Path(__file__).parents[2] / "docs/pipelines.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert problems_of(example) == []
    assert "proxy" in plan(example)


def test_the_papers_stores_cost_what_the_plan_on_paper_says(run_eupe: Run) -> None:
    steps = dry(run_eupe, "eupe", *MUST_BE_SET["eupe"], "--set", "num-images=1000")
    words = ["--teacher", "pe-core-g-proj", "--teacher", "pe-lang-g", "--teacher", "dinov3-h+", "--views", "rrc:4"]
    on_paper = json.loads(run_eupe("plan", *words, "--num-images", 1000, "--precision", "int8", "--json").out)
    for name, teacher in zip(
        ("pe-core-features", "pe-lang-features", "dinov3-features"), on_paper["teachers"], strict=True
    ):
        assert steps[name]["cost"]["num_bytes"] == pytest.approx(teacher["need"]["stored"], rel=1e-6)


def test_a_proxy_that_is_not_trained_yet_has_its_students_widths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_eupe: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    make_corpus(tmp_path / "photos", count=9)
    (tmp_path / "r.yaml").write_text(
        """
out: o
steps:
  expert: {extract: {teacher: dinov2, corpus: photos, size: 112, tokens: dense, grid: 4}}
  proxy: {train: {targets: expert, student: vit_tiny_patch16_dinov3_qkvb, size: 64, batch-size: 2, epochs: 3}}
  features: {extract: {teacher: proxy, corpus: photos, size: [64, 96], views: "rrc:5", limit: 4, fidelity: 0.99}}
  student: {train: {targets: [features, expert], student: test_vit, steps: 7, batch-size: 2}}
"""
    )
    steps = dry(run_eupe, "r.yaml")
    share = NOMINAL_SHARES["fp16"]
    expert = 4 * 4 * 384 * 2 * share
    assert steps["expert"]["cost"]["bytes_per_view"] == pytest.approx(expert)
    assert steps["expert"]["cost"]["num_images"] == 9
    assert steps["proxy"]["cost"]["steps"] == 12
    proxy = steps["features"]["cost"]
    at_64, at_96 = (192 * 2 * (grid * grid + 1) * share for grid in (4, 6))
    assert proxy["bytes_per_view"] == pytest.approx(at_64 + at_96)
    assert (proxy["num_images"], proxy["num_views"], proxy["at_most"]) == (4, 20, True)
    student = steps["student"]["cost"]
    assert student["num_views"] == 14
    assert student["num_bytes"] == pytest.approx(14 * ((at_64 + at_96) / 2 + expert))


def test_pictures_that_cannot_be_counted_are_said_to_be_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_eupe: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("out: o\nsteps: {a: {extract: {teacher: dinov2, corpus: s3://bucket/photos}}}")
    told = run_eupe("run", "r.yaml", "--dry-run").out
    assert "counted" in told and "num-images=N" in told
    assert dry(run_eupe, "r.yaml")["a"]["cost"]["num_bytes"] is None
    assert dry(run_eupe, "r.yaml", "--set", "num-images=7")["a"]["cost"]["num_images"] == 7
