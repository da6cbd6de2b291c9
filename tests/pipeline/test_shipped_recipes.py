"""The recipes that come with eupe are valid, and what they say they cost is what `eupe plan` says."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
from making import make_corpus
from planning import plan, problems_of

from eupe.extract.plan_on_paper import NOMINAL_SHARES
from eupe.pipeline.recipe import shipped_names
from eupe.teachers.registry import REGISTRY

Run = Callable[..., Any]

PICTURES = ["--set", "corpus=nowhere", "--set", "labelled=nowhere"]
MUST_BE_SET: dict[str, list[str]] = {"eupe": PICTURES, "open": PICTURES}


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


def test_every_licence_behind_the_recipe_open_is_permissive(run_eupe: Run) -> None:
    """As the table of teachers and timm say it of each teacher and each start that its commands name."""
    outcome = run_eupe("run", "open", *MUST_BE_SET["open"], "--dry-run", "--json")
    plain = json.loads(outcome.out)
    words = [word for step in plain["steps"] for word in step["command"].split()]
    outputs = {step["output"] for step in plain["steps"]}
    named = {
        option: {value for word, value in itertools.pairwise(words) if word == option and value not in outputs}
        for option in ("--teacher", "--student", "--init", "--weights")
    }
    found = {name: REGISTRY[name].licence for name in named["--teacher"]}
    found |= {name: timm.get_pretrained_cfg(name).license for name in named["--student"]}
    assert len(named["--teacher"]) == 3 and len(named["--student"]) == 2 and not named["--init"] | named["--weights"]
    assert {licence.lower() for licence in found.values()} <= {"apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause"}
    assert {each["name"]: each["licence"] for each in plain["licences"]} == found
    assert all(each["permissive"] for each in plain["licences"])


def test_a_dry_run_says_which_licence_is_not_permissive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_eupe: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = " ".join(run_eupe("run", "eupe", *MUST_BE_SET["eupe"], "--dry-run").out.split())
    assert "dinov3-h+ DINOv3-License; not Apache, MIT or BSD: dinov3-h+" in shown
    (tmp_path / "weights.bin").write_bytes(b"")
    (tmp_path / "r.yaml").write_text(
        """
out: o
steps:
  expert: {extract: {teacher: sam, corpus: photos, tokens: dense}}
  student: {train: {targets: expert, student: test_vit, size: 64, init: weights.bin, steps: 1}}
  further: {train: {targets: expert, init: student, steps: 1}}
"""
    )
    shown = run_eupe("run", "r.yaml", "--dry-run").out
    assert "sam-b Apache-2.0, weights.bin unknown: a file does not say; not Apache, MIT or BSD: weights.bin" in shown


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
