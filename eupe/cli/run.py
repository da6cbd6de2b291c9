"""`eupe run`: a recipe."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from eupe.cli.console import err, escaped, out
from eupe.cli.options import (
    Json,
)

if TYPE_CHECKING:
    pass


def run_recipe(
    recipe: Annotated[str, typer.Argument(help="A recipe file (.yaml), or the name of a recipe that comes with eupe.")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="NAME=VALUE: override a setting of the recipe; out=DIR is the folder of all outputs. May be repeated.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print what is wrong, what is already done, and what the rest costs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a whole pipeline from one file; skip the steps that are already done."""
    from eupe.cli.app import app  # here, because it imports this module
    from eupe.pipeline.planned_steps import REPORTS
    from eupe.pipeline.prepare import prepare, run
    from eupe.pipeline.recipe import parse_settings
    from eupe.pipeline.show import show_plan, show_results, step_words
    from eupe.pipeline.verbs import read_verbs

    verbs = read_verbs(typer.main.get_command(app))
    prepared = prepare(recipe, parse_settings(settings or []), verbs)
    if dry_run:
        if as_json:
            print(json.dumps(prepared.to_json()))
        else:
            show_plan(prepared, out)
        return
    told = err if as_json else out  # with --json, standard output holds nothing but JSON
    results = list(run(prepared, on_step=lambda one: told.print(escaped(step_words(one)), soft_wrap=True)))
    if as_json:
        print(json.dumps({"out": str(prepared.recipe.out), "steps": [dataclasses.asdict(r) for r in results]}))
    else:
        show_results(results, out, reports=prepared.recipe.out / REPORTS)
