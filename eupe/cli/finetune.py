"""`eupe finetune`."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from eupe.cli.console import err, escaped, out, show
from eupe.cli.flags import takes, values_of
from eupe.cli.options import Json
from eupe.finetune.config import FinetuneConfig

if TYPE_CHECKING:
    from eupe.finetune.job import FinetuneReport


@takes(FinetuneConfig)
def finetune(
    subject: Annotated[
        str, typer.Argument(help="A finished training run, or a student's name: NAME.TAG is pretrained.")
    ],
    as_json: Json = False,
    **given: Any,
) -> None:
    """Train an encoder with a light head on labels: first a linear probe, then all; with a table and a page."""
    from eupe.common.progress import report_progress
    from eupe.finetune.job import finetune
    from eupe.finetune.tasks import open_task
    from eupe.report.finetune_page import write_finetune_page

    config = FinetuneConfig(subject=subject, **values_of(FinetuneConfig, given))
    task = open_task(config)
    with report_progress(err, "steps", quiet=as_json) as progress:
        report = finetune(
            config, task, on_step=lambda name, done, total, note: progress.update(name, done, total, note=note)
        )
    page = write_finetune_page(report, task)
    if as_json:
        print(json.dumps(dataclasses.asdict(report)))
        return
    _print(report)
    out.print(f"page: {escaped(str(page))}")


def _print(report: FinetuneReport) -> None:
    for note in report.notes:
        out.print(escaped(note))
    less = ", less is better" if report.lower_is_better else ""
    table = Table("labels", "pictures", "start", "linear probe", f"fine-tuned ({report.measure}{less})", box=None)
    for row in report.rows:
        probe = "" if row.probe is None else str(row.probe)
        start = escaped(report.starts[row.start])
        table.add_row(f"{row.label_share:.4g}", f"{row.pictures:,}", start, probe, str(row.fine_tuned))
    show(table)
    for gain in report.gains:
        doubt = "" if gain.is_beyond_the_spread else ", which may be chance"
        out.print(f"with {gain.label_share:.4g} of the labels, weights are better than random ones by {gain.by}{doubt}")
    if any(row.fine_tuned.interval is not None for row in report.rows):
        out.print("± is half of the 95% interval of a mean over seeds")
    for trial in report.trials:
        out.print(f"model: {escaped(trial.folder)}")
