"""`eupe export`, and `eupe export check`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from eupe.cli.console import finish
from eupe.cli.options import Json
from eupe.errors import ConfigError

Heads = Annotated[
    list[str] | None,
    typer.Option(help="all, or a target: also the features that its head predicts. May be repeated."),
]


class ExportOrCheck(TyperCommand):
    """The command `export`, in which the word `check` in place of a run leads to `check_runtime`."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if args[:1] != ["check"]:
            return super().make_context(info_name, args, parent, **extra)
        check = typer.Typer()
        check.command("check")(check_runtime)
        return typer.main.get_command(check).make_context(f"{info_name} check", args[1:], parent, **extra)


def export_run(
    run: Annotated[Path, typer.Argument(help="A finished training run, or a model that `eupe finetune` made.")],
    form: Annotated[
        str, typer.Option("--format", help="timm, hf (for Transformers), onnx, openvino, executorch, litert or coreml.")
    ],
    out_path: Annotated[Path, typer.Option("--out", help="The directory to create.")],
    size: Annotated[int | None, typer.Option(help="Side of the input in pixels. Default: the run's.")] = None,
    heads: Heads = None,
    precision: Annotated[
        str, typer.Option(help="fp32; also fp16 (onnx, openvino, litert, coreml) or int8 (onnx, openvino, litert).")
    ] = "fp32",
    calibrate: Annotated[
        str | None, typer.Option(help="Pictures from which the ranges of int8 are taken. Default: made-up ones.")
    ] = None,
    dynamic_size: Annotated[
        bool,
        typer.Option("--dynamic-size", help="A graph for any multiple of the patch (onnx, openvino)."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Export a student, or a fine-tuned model, so that other programs can load it, with proof that it is the same.

    `eupe export check` compares the outputs of a runtime that is only on another machine.
    """
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


def check_runtime(
    run: Annotated[Path, typer.Argument(help="The run that was exported.")],
    inputs: Annotated[
        Path | None, typer.Option(help="File to create with the pictures for the runtime: .npy, or .bin for trtexec.")
    ] = None,
    outputs: Annotated[
        Path | None, typer.Option(help="File with the runtime's outputs to compare: .npz, or .json of trtexec.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side of the input in pixels. Default: the run's.")] = None,
    heads: Heads = None,
    precision: Annotated[str, typer.Option(help="Precision of the runtime: fp32, fp16 or int8.")] = "fp32",
    as_json: Json = False,
) -> None:
    """Write pictures for any runtime, or compare the outputs that it gives for them with the run's student."""
    from eupe.export.check import check_outputs, write_inputs

    if inputs is not None and outputs is None:
        finish(dataclasses.asdict(write_inputs(run, inputs, size=size)), as_json)
    elif outputs is not None and inputs is None:
        report = check_outputs(run, outputs, size=size, heads=tuple(heads or ()), precision=precision)
        finish(dataclasses.asdict(report), as_json)
    else:
        raise ConfigError("`eupe export check` needs either --inputs, for a file to create, or --outputs, to compare")
