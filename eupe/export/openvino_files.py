"""An OpenVINO model, made from the ONNX graph of the same student; in int8 by NNCF, OpenVINO's own tool."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eupe.common.storage import AnyPath
from eupe.errors import ConfigError
from eupe.export import onnx_files
from eupe.export.config import FP16, FP32, INT8, ExportConfig
from eupe.export.graph import quiet
from eupe.export.int8 import BATCH, STATIC, WEIGHTS, calibration_pictures, keep_best, require_smaller
from eupe.export.source import ForwardFunction, Source, Written

MODEL_FILE, WEIGHTS_FILE = "model.xml", "model.bin"
IN_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
"""Without it OpenVINO computes in bfloat16 where the processor has it, which changes the tokens visibly."""


def require_packages(precision: str) -> None:
    """Raise ConfigError if OpenVINO, or what writes the graph that it reads or quantises it, is not installed."""
    try:
        import openvino  # noqa: F401

        if precision == INT8:
            import nncf  # noqa: F401
    except ImportError as error:
        what = "OpenVINO and NNCF" if precision == INT8 else "OpenVINO"
        raise ConfigError(f"--format openvino needs {what}: pip install 'eupe[openvino]' ({error})") from error
    onnx_files.require_packages(precision)


def write(source: Source, config: ExportConfig, folder: Path) -> Written:
    """Write the model in the requested precision; in fp16 the weights are stored so, as OpenVINO's own tools do.

    Raises: as `eupe.export.onnx_files.write`.
    """
    import openvino

    path = folder / MODEL_FILE
    with TemporaryDirectory() as temporary, quiet():
        graph = onnx_files.write(source, replace(config, precision=FP32, calibrate=None), Path(temporary))
        onnx_path = Path(temporary) / onnx_files.GRAPH_FILE
        openvino.save_model(openvino.convert_model(onnx_path), path, compress_to_fp16=config.precision == FP16)
        notes = list(graph.notes)
        if config.precision == INT8:
            notes.append(_quantise(path, Path(temporary), source, config.calibrate))
    notes.append(
        "Where the processor has bfloat16, OpenVINO computes in it unless INFERENCE_PRECISION_HINT says f32; the "
        "verification below is in f32."
    )
    return Written(f"an OpenVINO model ({config.precision})", tuple(notes))


def _quantise(path: Path, workspace: Path, source: Source, calibrate: AnyPath | None) -> str:
    """Replace a float32 model by one in int8: all of it if that preserves the tokens, and otherwise its weights alone.

    Args:
        workspace: folder for the models to choose from.
    Returns: a sentence about the methods that were compared and the one that was kept.
    Raises: CorpusError for calibration pictures; ConfigError if int8 does not make the model much smaller.
    """
    import nncf
    import openvino
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

    pictures = calibration_pictures(source, calibrate)
    batches = [pixels.numpy() for pixels in torch.split(pictures.ranging, BATCH)]
    # 7 bits in all weights that are multiplied in int8, because 8-bit products overflow on CPUs without VNNI
    narrow = AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE)
    quantise: dict[str, Callable[[Any], Any]] = {
        STATIC: lambda model: nncf.quantize(
            model, nncf.Dataset(batches), subset_size=len(batches), advanced_parameters=narrow
        ),
        WEIGHTS: nncf.compress_weights,
    }
    ways = {way: workspace / way / WEIGHTS_FILE for way in quantise}
    for way, file in ways.items():
        model = quantise[way](openvino.Core().read_model(path))
        openvino.save_model(model, file.with_name(MODEL_FILE), compress_to_fp16=False)
    whole_bytes = path.with_name(WEIGHTS_FILE).stat().st_size
    require_smaller(ways[WEIGHTS].stat().st_size / whole_bytes, source)
    best, note = keep_best(source, ways, whole_bytes, lambda file: reopen(source, file.parent), pictures)
    for name in (MODEL_FILE, WEIGHTS_FILE):
        shutil.move(ways[best].with_name(name), path.with_name(name))
    return note


def reopen(source: Source, folder: Path) -> ForwardFunction:
    """Load the model as a user would; return a function that runs it."""
    import openvino

    compiled = openvino.Core().compile_model(folder / MODEL_FILE, "CPU", IN_FLOAT32)

    def forward(pixels: Tensor) -> dict[str, Tensor]:
        answers = compiled({onnx_files.INPUT: pixels.numpy().astype(np.float32)})
        return {name: torch.from_numpy(np.array(answers[name])) for name in source.outputs}

    return forward
