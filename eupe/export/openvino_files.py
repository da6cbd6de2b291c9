"""An OpenVINO model, made from the ONNX graph of the same student."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from eupe.errors import ConfigError
from eupe.export import onnx_files
from eupe.export.config import FP16, FP32, ExportConfig
from eupe.export.graph import quiet
from eupe.export.source import ForwardFunction, Source, Written

MODEL_FILE = "model.xml"
IN_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
"""Without it OpenVINO computes in bfloat16 where the processor has it, which changes the tokens visibly."""


def require_packages() -> None:
    """Raise ConfigError if OpenVINO, or what writes the graph that it reads, is not installed."""
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--format openvino needs OpenVINO: pip install 'eupe[openvino]' ({error})") from error
    onnx_files.require_packages()


def write(source: Source, config: ExportConfig, folder: Path) -> Written:
    """Write the model in the requested precision; in fp16 the weights are stored so, as OpenVINO's own tools do.

    Raises: as `eupe.export.onnx_files.write`.
    """
    import openvino

    with TemporaryDirectory() as temporary, quiet():
        graph = onnx_files.write(source, replace(config, precision=FP32), Path(temporary))
        model = openvino.convert_model(Path(temporary) / onnx_files.GRAPH_FILE)
    openvino.save_model(model, folder / MODEL_FILE, compress_to_fp16=config.precision == FP16)
    note = (
        "Where the processor has bfloat16, OpenVINO computes in it unless INFERENCE_PRECISION_HINT says f32; the "
        "verification below is in f32."
    )
    return Written(f"an OpenVINO model ({config.precision})", (*graph.notes, note))


def reopen(source: Source, folder: Path) -> ForwardFunction:
    """Load the model as a user would; return a function that runs it."""
    import openvino

    compiled = openvino.Core().compile_model(folder / MODEL_FILE, "CPU", IN_FLOAT32)

    def forward(pixels: Tensor) -> dict[str, Tensor]:
        answers = compiled({onnx_files.INPUT: pixels.numpy().astype(np.float32)})
        return {name: torch.from_numpy(np.array(answers[name])) for name in source.outputs}

    return forward
