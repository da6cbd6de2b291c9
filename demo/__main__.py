"""The main job on real weights and real photographs: `make demo`, or `python -m demo`.

Prepares weights and pictures, runs the shipped recipe `desk` (eupe/recipes/desk.yaml) on them, and shows the results.
Every step is a command that you could type; a step that is already done is a cache hit.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from demo.assets import AssetError, prepare_assets
from eupe.cli import app
from eupe.errors import EupeError
from eupe.pipeline.execute import Result
from eupe.pipeline.prepare import prepare, run
from eupe.pipeline.show import step_words
from eupe.pipeline.verbs import read_verbs
from scenes.make import ScenesConfig, make_scenes

ASSETS = Path("assets")
OUT = Path("demo-out")

SCENES = ScenesConfig(out=ASSETS / "scenes", pictures=96, size=128, seed=0)
SCENE_TASKS = {"eval segment": "mIoU", "eval depth": "RMSE, m (less is better)", "eval correspond": "PCK"}

console = Console(highlight=False, width=max(Console().width, 110))


def main() -> None:
    """Run every step, then show the results."""
    began = time.monotonic()
    os.environ["HF_HUB_OFFLINE"] = "1"  # all weights are local, so nothing should wait for the hub
    console.rule("real weights and real photographs")
    try:
        prepare_assets(ASSETS)
        make_scenes(SCENES)
        results = {result.step: result for result in run_desk()}
    except AssetError as error:
        sys.exit(f"error: {error}")
    except EupeError as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    show(results)
    page = Path(str(results["page"].output)).resolve()
    console.print(f"{time.monotonic() - began:.0f} s in all; look at [bold]{page}[/]", soft_wrap=True)


def run_desk() -> list[Result]:
    """Run the recipe, as `eupe run desk` does."""
    settings = {"assets": str(ASSETS), "out": str(OUT)}
    prepared = prepare("desk", settings, read_verbs(typer.main.get_command(app)))
    told = lambda one: console.print(f"\n[bold]{escape(step_words(one))}[/]", soft_wrap=True)  # noqa: E731
    return list(run(prepared, on_step=told))


def show(results: dict[str, Result]) -> None:
    """Print the closing tables."""
    names = {Path(str(result.output)).name: step for step, result in results.items()}
    by_verb: dict[str, dict[str, dict[str, Any]]] = {}
    for step, result in results.items():
        by_verb.setdefault(result.verb, {})[step] = result.report
    console.print()
    table = Table("store", "views", "MB", "of raw fp16", "views/s", "where", title="What was cached", box=None)
    for step, r in by_verb["extract"].items():
        rate = "cache hit" if results[step].cached or r["cached"] else f"{r['views_per_s']:.0f}"
        share = f"{r['stored_bytes'] / r['raw_bytes']:.0%}"
        where = os.path.relpath(r["store"])
        table.add_row(step, str(r["num_views"]), f"{r['stored_bytes'] / 1e6:.1f}", share, rate, where)
    console.print(table)
    table = Table("run", "steps", "images/s", "data-wait", "where", title="\nWhat was trained", box=None)
    for step, r in by_verb["train"].items():
        table.add_row(step, str(r["steps"]), f"{r['images_per_s']:.0f}", f"{r['data_wait']:.1%}", r["run"])
    console.print(table)
    columns = ("run", "target", "tokens", "cosine", "mean feature", "untrained", "normalised", "untrained")
    table = Table(*columns, title="\nAgreement on held-out pictures", box=None)
    for step, report in by_verb["eval agreement"].items():
        for target in report["targets"]:
            for kind, a in target["kinds"].items():
                raw = (a["cosine"], a["cosine_mean"], a["cosine_untrained"])
                numbers = (f"{x:.3f}" for x in (*raw, a["normalised_cosine"], a["normalised_untrained"]))
                name = names.get(target["target"], target["target"])
                table.add_row(step.removesuffix("-agreement"), name, kind, *numbers)
    console.print(table)
    table = Table("summaries of", "accuracy", "untrained", "commonest digit", title="\nk-NN on unseen digits", box=None)
    for step, report in by_verb["eval knn"].items():
        judged, *untrained = (result["scores"] for result in report["results"])
        fresh = "".join(f"{scores['accuracy']:.1%}" for scores in untrained)
        table.add_row(step.removesuffix("-digits"), f"{judged['accuracy']:.1%}", fresh, f"{judged['majority']:.1%}")
    console.print(table)
    table = Table("model", *SCENE_TASKS.values(), title="\nDense tokens on rendered scenes", box=None)
    for model, scores in scene_scores(by_verb, names).items():
        table.add_row(model, *scores)
    console.print(table)


def scene_scores(by_verb: dict[str, dict[str, dict[str, Any]]], names: dict[str, str]) -> dict[str, list[str]]:
    """Return the first measure of every task, by model."""
    rows: dict[str, list[str]] = {}
    for verb in SCENE_TASKS:
        for report in by_verb[verb].values():
            for result in report["results"]:
                name = names.get(Path(result["subject"]).name, result["subject"])
                model = f"{name}, untrained" if result["untrained"] else name
                rows.setdefault(model, []).append(f"{next(iter(result['scores'].values())):.3f}")
    return rows


if __name__ == "__main__":
    main()
