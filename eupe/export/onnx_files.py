"""An ONNX graph: pixels in, `summary`, `dense` and the heads' tokens out, checked and run by ONNX Runtime.

Shapes: B pictures, H W pixels, h w cells, D width of a token.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eupe.errors import ConfigError
from eupe.export.config import FP16, INT8, ExportConfig
from eupe.export.graph import Graph, brief_root, quiet
from eupe.export.onnx_int8 import quantise
from eupe.export.rotary import traced_rotary
from eupe.export.source import Says, Source, Written

GRAPH_FILE = "model.onnx"
INPUT = "pixels"
TRACED_BATCH = 2
"""Not 1, which the tracer would take for a constant."""


def require_packages() -> None:
    """Raises: ConfigError if what writes and runs graphs is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--format onnx needs more packages: pip install 'eupe[export]' ({error})") from error


class HalfGraph(nn.Module):
    """The same function in float16, float32 at both ends; timm keeps rotary positions in float32."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.inner = copy.deepcopy(graph).half()  # `graph` is the tracer's own name

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """As `Graph`."""
        return tuple(output.float() for output in self.inner(pixels.half()))


def write(source: Source, config: ExportConfig, folder: Path) -> Written:
    """Write the graph in the precision that was asked for.

    Raises: ConfigError if the architecture cannot be traced, or not for any size; CorpusError for calibration pictures;
        OSError.
    """
    import onnx

    if config.dynamic_size:
        _require_other_sizes(source)
    path = folder / GRAPH_FILE
    graph = Graph(source.encoder, source.heads).eval()
    halved = HalfGraph(graph) if config.precision == FP16 else None
    model = (graph if halved is None else halved.inner).encoder.model
    with quiet(), traced_rotary(model) if config.dynamic_size else nullcontext():
        _trace(halved or graph, source, config).save(path)
    notes: list[str] = []
    if config.precision == INT8:
        with quiet():
            notes.append(quantise(path, source, lambda graph: _asking(graph, source.outputs), config.calibrate))
    opset = _strip(path)
    onnx.checker.check_model(str(path), full_check=True)
    if config.dynamic_size:
        notes.append(f"Height and width may be any multiples of {source.encoder.card.patch} pixels.")
    return Written(f"an ONNX graph (opset {opset}, {config.precision})", tuple(notes))


def _require_other_sizes(source: Source) -> None:
    """Try, on the meta device, whether the student takes inputs of several sizes.

    Raises: ConfigError.
    """
    card = source.encoder.card
    encoder = copy.deepcopy(source.encoder).to("meta")
    for rows, columns in ((card.size, card.size), (card.size + card.patch, card.size + 2 * card.patch)):
        try:
            encoder(torch.zeros(1, 3, rows, columns, device="meta"))
        except Exception as error:  # libraries refuse in many ways
            raise ConfigError(
                f"--dynamic-size does not work for {card.arch}, which takes one size alone "
                f"({brief_root(error)}); leave --dynamic-size out"
            ) from error


def _strip(path: Path) -> int:
    """Remove what the exporter notes of its work, such as where the source code lay; returns the graph's opset."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.save(model, str(path))
    return int(next(each.version for each in model.opset_import if not each.domain))


def reopen(source: Source, folder: Path) -> Says:
    """As a stranger would."""
    return _asking(folder / GRAPH_FILE, source.outputs)


def holds_int8(folder: Path) -> bool:
    """Whether any matrix of a graph is kept in int8."""
    import onnx

    graph = onnx.load(str(folder / GRAPH_FILE), load_external_data=False).graph
    return any(each.data_type == onnx.TensorProto.INT8 and len(each.dims) > 1 for each in graph.initializer)


def _asking(path: Path, outputs: list[str]) -> Says:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def says(pixels: Tensor) -> dict[str, Tensor]:
        answers: list[Any] = session.run(outputs, {INPUT: pixels.numpy().astype(np.float32)})
        return {name: torch.from_numpy(answer) for name, answer in zip(outputs, answers, strict=True)}

    return says


def _trace(graph: nn.Module, source: Source, config: ExportConfig) -> Any:
    """The graph by torch.export.

    Raises: ConfigError.
    """
    card = source.encoder.card
    dynamic: dict[int, Any] = {0: torch.export.Dim("batch")}
    if config.dynamic_size:
        dynamic |= {2: card.patch * torch.export.Dim("rows"), 3: card.patch * torch.export.Dim("columns")}
    try:
        program = torch.onnx.export(
            graph,
            (torch.zeros(TRACED_BATCH, 3, source.size, source.size),),
            input_names=[INPUT],
            output_names=source.outputs,
            dynamic_shapes={INPUT: dynamic},
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # tracers refuse in many ways
        hint = "leave --dynamic-size out" if config.dynamic_size else "use --format timm"
        raise ConfigError(f"{card.arch} cannot be traced into an ONNX graph ({brief_root(error)}); {hint}") from error
    assert program is not None
    return program
