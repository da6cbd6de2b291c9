"""`eupe train`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eupe.cli.console import err, escaped, finish, out
from eupe.cli.flags import takes
from eupe.cli.options import Json
from eupe.train.config import TrainConfig

if TYPE_CHECKING:
    from eupe.common.progress import Reporter
    from eupe.train.log import TrainStatus


@takes(TrainConfig, from_files=True, after={"recipe": "out", "config": "recipe", "compile": "rope_rescale"})
def train(
    recipe: Annotated[
        str | None, typer.Option(help="stage1, stage2 or stage3: the paper's settings, which flags override.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of options, such as the options.yaml of a run.")
    ] = None,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Distil cached targets into students; no teacher is loaded."""
    from eupe.common.progress import report_progress
    from eupe.train.loop import train_together
    from eupe.train.option_files import configs_given, origins_told

    origins = partial(origins_told, recipe=recipe, config=config, flags=given)
    with origins():
        configs = configs_given(recipe=recipe, config=config, given=given)

    def note(words: str) -> None:
        if not as_json:
            err.print(f"note: {escaped(words)}", soft_wrap=True)

    with origins(), report_progress(err, "steps", quiet=as_json) as progress:
        reports = train_together(configs, on_status=_teller(configs, progress), on_note=note)
    for report in reports:
        finish(dataclasses.asdict(report), as_json)
        if not as_json and report.cached:
            out.print("nothing to do: this run is already finished")


def _teller(configs: list[TrainConfig], progress: Reporter) -> Callable[[int, TrainStatus], None]:
    """Return what shows a student's status, by its index, beside the last one of each other student."""
    notes: dict[int, str] = {}

    def tell(place: int, status: TrainStatus) -> None:
        name = f"{configs[place].out.name}: " if len(configs) > 1 else ""
        notes[place] = f"{name}{status.words()}"
        progress.update("training", status.step, status.total_steps, note="  ".join(notes[i] for i in sorted(notes)))

    return tell
