"""A conversion as a step of a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from planning import plan, problems_of, write_files

from eupe.store import Store

RECIPE = """
out: out
steps:
  expert: {extract: {teacher: "timm:test_vit", weights: weights.bin, corpus: photos, size: 64}}
  small: {store convert: {path: expert, precision: int8, grid: 2}}
  student: {train: {targets: small, student: test_vit, batch-size: 8, steps: 3}}
  stats: {store stats: {path: small}}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    return tmp_path


def test_a_conversion_takes_an_earlier_store_and_makes_one_that_later_steps_take() -> None:
    steps = plan(RECIPE)
    small, expert = steps["small"], steps["expert"]
    assert small.output == Path(f"out/small-{small.key[:8]}.zarr")
    wanted = ["store", "convert", str(expert.output), "--precision", "int8", "--grid", "2"]
    assert small.command() == [*wanted, "--out", str(small.output), "--json"]
    assert steps["student"].command()[1:3] == ["--targets", str(small.output)]
    assert steps["stats"].step.needs == ("small",)
    (small.output / "zarr.json").parent.mkdir(parents=True)
    (small.output / "zarr.json").touch()
    assert plan(RECIPE)["small"].state == "to go on"


@pytest.mark.parametrize(
    ("old", "new", "redone"),
    [
        ("precision: int8", "precision: bitround:5", {"small", "student", "stats"}),
        ("grid: 2", "grid: 1", {"small", "student", "stats"}),
        ("size: 64", "size: 32", {"expert", "small", "student", "stats"}),
        ("steps: 3", "steps: 4", {"student"}),
    ],
)
def test_a_conversion_is_done_again_when_its_store_or_its_options_change(old: str, new: str, redone: set[str]) -> None:
    before, after = plan(RECIPE), plan(RECIPE.replace(old, new))
    assert {name for name in before if before[name].key != after[name].key} == redone


def test_more_pictures_make_another_converted_store(here: Path) -> None:
    """The extraction goes on in its store, but a conversion only takes what its source was."""
    before = plan(RECIPE)
    (here / "photos/c.png").write_bytes(b"new")
    after = plan(RECIPE)
    assert after["expert"].output == before["expert"].output
    assert after["small"].output != before["small"].output


def test_mistakes_in_a_conversion_are_named() -> None:
    wrong = "{path: expart, presicion: int8, out: x.zarr, grid: 2}"
    found = "\n".join(problems_of(RECIPE.replace("{path: expert, precision: int8, grid: 2}", wrong)))
    assert "steps.small.store convert.path: there is no earlier step 'expart'; did you mean expert?" in found
    assert "steps.small.store convert.presicion: is not an option of eupe store convert" in found
    assert "steps.small.store convert.out: is set by the pipeline" in found
    assert "steps.small.store convert.precision: is missing" in found


def test_it_costs_what_an_extraction_of_that_precision_and_grid_does(here: Path, run_eupe: Callable[..., Any]) -> None:
    same = '  same: {extract: {teacher: "timm:test_vit", corpus: photos, size: 64, precision: int8, grid: 2}}\n'
    (here / "r.yaml").write_text(RECIPE + same)
    outcome = run_eupe("run", "r.yaml", "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    costs = {step["step"]: step["cost"] for step in json.loads(outcome.out)["steps"]}
    assert costs["small"] == costs["same"]
    assert costs["small"]["num_bytes"] < costs["expert"]["num_bytes"]
    assert costs["student"]["bytes_per_view"] == costs["small"]["bytes_per_view"]


def test_layers_cost_what_they_take_and_a_conversion_keeps_them(here: Path, run_eupe: Callable[..., Any]) -> None:
    layered = RECIPE.replace("size: 64}}", 'size: 64, layers: "2,5"}}')
    (here / "r.yaml").write_text(
        layered + '  own: {extract: {teacher: student, corpus: photos, size: 64, layers: "6"}}\n'
    )
    outcome = run_eupe("run", "r.yaml", "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    costs = {step["step"]: step["cost"] for step in json.loads(outcome.out)["steps"]}
    assert costs["expert"]["bytes_per_view"] == pytest.approx(0.82 * 2 * (64 + 3 * 16 * 64))
    assert costs["small"]["bytes_per_view"] == pytest.approx(0.43 * 2 * (64 + 3 * 4 * 64))
    assert costs["own"]["bytes_per_view"] == pytest.approx(0.82 * 2 * (64 + 16 * 64))
    (here / "r.yaml").write_text(layered.replace("2,5", "2,9"))
    wrong = run_eupe("run", "r.yaml", "--dry-run")
    assert wrong.code == 2
    assert "steps.expert.extract: teacher timm:test_vit has layers 1 to 6, not 9" in " ".join(wrong.err.split())


def test_what_the_store_will_not_hold_is_told_before_anything_runs(
    here: Path, tiny_store: Store, run_eupe: Callable[..., Any]
) -> None:
    finer = f"  finer: {{store convert: {{path: {tiny_store.path}, precision: fp16, grid: 8}}}}\n"
    more = "  more: {store convert: {path: small, precision: fp16}}\n"
    after = "  after: {store stats: {path: more}}\n"
    (here / "r.yaml").write_text(RECIPE + finer + more + after)
    outcome = run_eupe("run", "r.yaml", "--dry-run")
    assert outcome.code == 2 and "has 2 mistakes" in outcome.err
    assert f"steps.finer.store convert: --grid 8 does not divide the 4x4 map of {tiny_store.path}" in outcome.err
    assert "steps.more.store convert: step small has summary tokens in int8" in outcome.err


@pytest.mark.slow
def test_a_recipe_converts_a_store_and_finds_it_again(
    here: Path, tiny_store: Store, run_eupe: Callable[..., Any], forked: None
) -> None:
    steps = f"small: {{store convert: {{path: {tiny_store.path}, precision: int8}}}}"
    (here / "r.yaml").write_text(f"out: out\nsteps:\n  {steps}\n  check: {{store verify: {{path: small}}}}\n")
    first = run_eupe("run", "r.yaml", "--json")
    assert first.code == 0, first.err
    ended = {step["step"]: step for step in json.loads(first.out)["steps"]}
    assert ended["check"]["report"]["whole"] is True
    assert ended["small"]["report"]["stored_bytes"] < tiny_store.stored_bytes
    shown = run_eupe("run", "r.yaml").out
    (row,) = [line for line in shown.splitlines() if line.split()[:1] == ["small"]]
    assert "cached" in row and "48 views" in row
