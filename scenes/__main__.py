"""The command line of the renderer: `python -m scenes --out DIR`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from eupe.__main__ import run
from eupe.cli.console import err, finish, out
from eupe.cli.options import Json
from eupe.common.progress import report_progress
from scenes import make

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def scenes(
    out_path: Annotated[Path, typer.Option("--out", help="The folder to create.")],
    pictures: Annotated[int, typer.Option(help="Number of pictures of each task.")] = 300,
    size: Annotated[int, typer.Option(help="Side of the pictures in pixels.")] = 224,
    seed: Annotated[int, typer.Option(help="Seed of the random scenes.")] = 0,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="FOLDER", help="Make only this folder, such as classification. Repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Render pictures with exact labels, masks, depth, correspondences, captions and questions."""
    config = make.ScenesConfig(out=out_path, pictures=pictures, size=size, seed=seed, only=only or ())
    with report_progress(err, "pictures", quiet=as_json) as progress:
        report = make.make_scenes(config, progress=lambda done, of: progress.update("rendering", done, of))
    finish(dataclasses.asdict(report), as_json)
    if report.cached and not as_json:
        out.print("nothing to do: these scenes already exist")


if __name__ == "__main__":
    run(app)
