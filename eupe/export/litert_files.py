"""A LiteRT model (TensorFlow Lite), the runtime of phones and boards, with a batch size of 1."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eupe.common.storage import AnyPath
from eupe.errors import ConfigError
from eupe.export.config import FP16, INT8, ExportConfig
from eupe.export.graph import Graph, brief_root, quiet
from eupe.export.int8 import DYNAMIC, WEIGHTS, calibration_pictures, keep_best, require_smaller
from eupe.export.source import ForwardFunction, Source, Written

MODEL_FILE = "model.tflite"


def require_packages(precision: str) -> None:
    """Raise ConfigError if LiteRT's converter, runtime or quantiser is not installed."""
    try:
        with quiet():
            import ai_edge_litert.interpreter  # noqa: F401
            import ai_edge_quantizer  # noqa: F401
            import litert_torch  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--format litert needs LiteRT: pip install 'eupe[litert]' ({error})") from error


class _NamedOutputs(nn.Module):
    """A graph whose outputs have names, which the converter takes over."""

    def __init__(self, graph: Graph, names: list[str]) -> None:
        super().__init__()
        self.inner, self.names = graph, names

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, self.inner(pixels), strict=True))


def write(source: Source, config: ExportConfig, folder: Path) -> Written:
    """Write the model in the requested precision.

    Raises: ConfigError if the architecture cannot be converted, or int8 does not make it much smaller; CorpusError for
        calibration pictures; OSError.
    """
    import litert_torch

    path = folder / MODEL_FILE
    graph = _NamedOutputs(Graph(source), source.outputs).eval()
    try:
        with quiet():
            pixels = torch.zeros(1, 3, source.size, source.size)
            litert_torch.convert(graph, sample_kwargs={"pixels": pixels}).export(str(path))
    except Exception as error:  # converters raise many types of exceptions
        arch = source.encoder.spec.arch
        raise ConfigError(f"{arch} cannot be converted for LiteRT ({brief_root(error)}); use --format onnx") from error
    notes = ["The batch size is always 1."]
    with quiet():
        if config.precision == FP16:
            path.write_bytes(_in_fp16(path))
        if config.precision == INT8:
            notes.append(_quantise(path, source, config.calibrate))
    return Written(f"a LiteRT model ({config.precision}, one picture)", tuple(notes))


def _in_fp16(path: Path) -> Any:
    """Return the bytes of the model with its weights in float16."""
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.qtyping import TFLOperationName
    from ai_edge_quantizer.quantizer import Quantizer

    quantizer = Quantizer(str(path))
    quantizer.add_weight_only_config(
        ".*", TFLOperationName.ALL_SUPPORTED, num_bits=16, algorithm_key=AlgorithmName.FLOAT_CASTING
    )
    return quantizer.quantize().quantized_model


def _quantise(path: Path, source: Source, calibrate: AnyPath | None) -> str:
    """Replace a float32 model by one with int8 weights, which also computes in int8 if that preserves the tokens.

    Returns: a sentence about the methods that were compared and the one that was kept.
    Raises: CorpusError for the pictures to compare on; ConfigError if int8 does not make the model much smaller.
    """
    from ai_edge_quantizer import recipe
    from ai_edge_quantizer.quantizer import Quantizer

    recipes = {DYNAMIC: recipe.dynamic_wi8_afp32(), WEIGHTS: recipe.weight_only_wi8_afp32()}
    whole_bytes = path.stat().st_size
    with TemporaryDirectory() as temporary:
        ways = {way: Path(temporary) / way / MODEL_FILE for way in recipes}
        for way, file in ways.items():
            file.parent.mkdir()
            file.write_bytes(Quantizer(str(path), recipes[way]).quantize().quantized_model)
        require_smaller(ways[WEIGHTS].stat().st_size / whole_bytes, source)
        pictures = calibration_pictures(source, calibrate)
        best, note = keep_best(source, ways, whole_bytes, lambda file: reopen(source, file.parent), pictures)
        path.write_bytes(ways[best].read_bytes())
    return note


def reopen(source: Source, folder: Path) -> ForwardFunction:
    """Load the model as a user would; return a function that runs it."""
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_path=str(folder / MODEL_FILE)).get_signature_runner()

    def forward(pixels: Tensor) -> dict[str, Tensor]:
        answers = [runner(pixels=one[None].numpy().astype(np.float32)) for one in pixels]
        return {name: torch.from_numpy(np.concatenate([each[name] for each in answers])) for name in source.outputs}

    return forward
