"""`eupe viz`: a page of feature maps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from eupe.cli.console import finish
from eupe.cli.options import (
    Json,
    LocalKeys,
    LocalWeights,
    Overwrite,
    Size,
    local_keys,
    local_weights,
)


def viz(
    items: Annotated[list[str], typer.Argument(help="Stores, training runs, teachers, or `pixels`: one column each.")],
    images: Annotated[str, typer.Option(help="Folder of pictures, or an index.")],
    out_path: Annotated[Path, typer.Option("--out", help="The page (.html) or figure (.png) to write.")],
    limit: Annotated[int, typer.Option(help="Number of pictures.")] = 8,
    weights: LocalWeights = None,
    weights_key: LocalKeys = None,
    size: Size = None,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Also draw every run and teacher with random weights.")
    ] = False,
    foreground: Annotated[
        bool,
        typer.Option("--foreground", help="Colour only the foreground, which is found by a model's first component."),
    ] = False,
    cell: Annotated[int | None, typer.Option(help="Side of a figure's cells in pixels. Default: 224.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Draw dense features as PCA maps side by side: a self-contained page with runs' loss curves, or a PNG figure."""
    from eupe.report.viz_page import write_maps

    report = write_maps(
        items,
        images=images,
        out=out_path,
        limit=limit,
        weights=local_weights(weights, items),
        weights_keys=local_keys(weights_key),
        size=size,
        untrained=untrained,
        foreground=foreground,
        cell_px=cell,
        overwrite=overwrite,
    )
    finish(dataclasses.asdict(report), as_json)
