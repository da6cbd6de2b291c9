"""`eupe export`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eupe.cli.console import finish
from eupe.cli.options import (
    Json,
)

if TYPE_CHECKING:
    pass


def export_run(
    run: Annotated[Path, typer.Argument(help="A finished training run, or a model that `eupe finetune` made.")],
    form: Annotated[str, typer.Option("--format", help="timm, hf (for Transformers), onnx, openvino or executorch.")],
    out_path: Annotated[Path, typer.Option("--out", help="The directory to create.")],
    size: Annotated[int | None, typer.Option(help="Side of the input in pixels. Default: the run's.")] = None,
    heads: Annotated[
        list[str] | None,
        typer.Option(help="all, or a target: also export the features that its head predicts. May be repeated."),
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32; also fp16 or int8 (onnx, openvino).")] = "fp32",
    calibrate: Annotated[
        str | None, typer.Option(help="Pictures from which the ranges of int8 are taken. Default: made-up ones.")
    ] = None,
    dynamic_size: Annotated[
        bool,
        typer.Option("--dynamic-size", help="A graph for any multiple of the patch (onnx, openvino)."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Export a student, or a fine-tuned model, so that other programs can load it, with proof that it is the same."""
    from eupe.export.config import ExportConfig
    from eupe.export.job import export

    config = ExportConfig(
        run=run,
        out=out_path,
        format=form,
        size=size,
        heads=tuple(heads or ()),
        precision=precision,
        calibrate=calibrate,
        dynamic_size=dynamic_size,
    )
    finish(dataclasses.asdict(export(config)), as_json)
