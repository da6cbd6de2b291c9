"""The main job on real weights and rendered pictures: `make demo`, or `python -m demo`.

Prepares weights and pictures, runs the shipped recipe `desk` (eupe/recipes/desk.yaml) on them, and shows the results.
Every step is a command that you could type; a step that is already done is a cache hit.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from demo.assets import AssetError, prepare_assets
from demo.outcome import conclude, read_scores, results_table, write_scores
from eupe.cli import app
from eupe.common.progress import report_progress
from eupe.errors import EupeError
from eupe.pipeline.execute import Result
from eupe.pipeline.prepare import prepare, run
from eupe.pipeline.show import step_words
from eupe.pipeline.verbs import read_verbs
from scenes.make import ScenesConfig, make_scenes

ASSETS = Path("assets")
OUT = Path("demo-out")

SCENES = ScenesConfig(out=ASSETS / "rendered", pictures=260, size=128, seed=0, only=("classification", "segmentation"))

console = Console(highlight=False, width=max(Console().width, 110))


def main() -> None:
    """Run every step, then show the results."""
    began = time.monotonic()
    os.environ["HF_HUB_OFFLINE"] = "1"  # all weights are local, so nothing should wait for the hub
    console.rule("two real experts, one proxy, one student")
    try:
        prepare_assets(ASSETS, below="weights")
        with report_progress(console, "pictures", quiet=False) as progress:
            make_scenes(SCENES, progress=lambda done, of: progress.update("rendering", done, of))
        results = run_desk()
        show(results)
    except AssetError as error:
        sys.exit(f"error: {error}")
    except EupeError as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except OSError as error:
        console.print(f"error: {ASSETS} or {OUT} cannot be written ({error})", markup=False, soft_wrap=True)
        sys.exit(2)
    page = next(Path(one.output).resolve() for one in results if one.step == "page" and one.output is not None)
    console.print(f"\n{time.monotonic() - began:.0f} s in all; look at [bold]{page}[/]", soft_wrap=True)


def run_desk() -> list[Result]:
    """Run the recipe, as `eupe run desk` does."""
    settings = {"assets": str(ASSETS), "out": str(OUT)}
    prepared = prepare("desk", settings, read_verbs(typer.main.get_command(app)))
    told = lambda one: console.print(f"\n[bold]{escape(step_words(one))}[/]", soft_wrap=True)  # noqa: E731
    return list(run(prepared, on_step=told))


def show(results: Sequence[Result]) -> None:
    """Print the table and what it says, and write `results.json`."""
    scores = read_scores(results)
    write_scores(scores, OUT / "results.json")
    console.print()
    console.print(results_table(scores))
    console.print(f"\n{conclude(scores)}", markup=False, soft_wrap=True)
    console.print(f"\n{cost(results)}", markup=False, soft_wrap=True)


def cost(results: Sequence[Result]) -> str:
    """Return a sentence about the time and bytes of the caches and the training."""
    stores = [one for one in results if one.verb == "extract"]
    num_bytes = sum(one.report["stored_bytes"] for one in stores)
    caching = sum(one.seconds for one in stores)
    runs = "; ".join(
        f"{one.step}: {one.report['steps']} steps, {one.seconds:.0f} s" for one in results if one.verb == "train"
    )
    caches = f"{len(stores)} stores, {num_bytes / 1e6:.0f} MB, {caching:.0f} s, which later students share"
    return f"Caches: {caches}. Training: {runs}."


if __name__ == "__main__":
    main()
