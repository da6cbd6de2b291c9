"""Recipes planned without running anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from eupe.cli import app
from eupe.pipeline.inputs import Inputs
from eupe.pipeline.planned_steps import PlannedStep, plan_steps
from eupe.pipeline.recipe import Problems, parse_recipe
from eupe.pipeline.steps import check_steps
from eupe.pipeline.verbs import Verb, read_verbs

VERBS: dict[str, Verb] = read_verbs(typer.main.get_command(app))


def problems_of(text: str, settings: Mapping[str, Any] | None = None) -> list[str]:
    """Return the mistakes in the text of a recipe."""
    problems = Problems()
    check_steps(parse_recipe("r.yaml", text, settings or {}, problems), VERBS, problems)
    return problems.found


def plan(text: str, settings: Mapping[str, Any] | None = None) -> dict[str, PlannedStep]:
    """The steps of a recipe without mistakes, by name."""
    problems = Problems()
    recipe = parse_recipe("r.yaml", text, settings or {}, problems)
    steps = check_steps(recipe, VERBS, problems)
    assert problems.found == []
    return {one.step.name: one for one in plan_steps(steps, recipe.out, Inputs(recipe.out))}


def pretend_done(planned: Mapping[str, PlannedStep], *names: str) -> None:
    """Write what steps leave when they have run: an output folder, and a kept report."""
    for name in names or planned:
        one = planned[name]
        one.report.parent.mkdir(parents=True, exist_ok=True)
        one.report.write_text(json.dumps({"command": "", "content": one.content, "seconds": 1.0, "report": {}}))
        if one.output is not None:
            one.output.mkdir(parents=True, exist_ok=True)


def write_files(folder: Path) -> None:
    """Weights and pictures that only their names and bytes are asked of."""
    for name in ("photos/a/1.png", "photos/b/2.png", "weights.bin"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
