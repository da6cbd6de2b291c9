"""An ONNX graph from pixels to `summary`, `dense` and the heads' tokens, checked by ONNX and run by ONNX Runtime.

Shapes: B pictures, H W pixels, h w cells, D width of a token.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
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
from eupe.export.source import ForwardFunction, Source, Written

GRAPH_FILE = "model.onnx"
INPUT = "pixels"
TRACED_BATCH = 2
"""Batch size for tracing; the tracer would take 1 for a constant."""


def require_packages(precision: str) -> None:
    """Raise ConfigError if the packages that write and run graphs are not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--format onnx needs more packages: pip install 'eupe[export]' ({error})") from error


class HalfGraph(nn.Module):
    """A graph that computes in float16, with float32 input and output; timm keeps rotary positions in float32."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.inner = copy.deepcopy(graph).half()  # not `graph`: the tracer uses that name itself

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs of `Graph` in float16; return them as float32."""
        return tuple(output.float() for output in self.inner(pixels.half()))


def write(source: Source, config: ExportConfig, folder: Path) -> Written:
    """Write the graph in the requested precision.

    Raises: ConfigError if the architecture cannot be traced, or not with a dynamic size; CorpusError for calibration
        pictures; OSError.
    """
    import onnx

    if config.dynamic_size:
        _require_other_sizes(source)
    path = folder / GRAPH_FILE
    graph = Graph(source).eval()
    halved = HalfGraph(graph) if config.precision == FP16 else None
    model = (graph if halved is None else halved.inner).encoder.model
    with quiet(), traced_rotary(model) if config.dynamic_size else nullcontext():
        _trace(halved or graph, source, config).save(path)
    notes: list[str] = []
    if config.precision == INT8:
        with quiet():
            notes.append(quantise(path, source, lambda graph: _asking(graph, source.outputs), config.calibrate))
    opset = _strip(path, source.classes)
    onnx.checker.check_model(str(path), full_check=True)
    if config.dynamic_size:
        notes.append(f"Height and width may be any multiples of {source.encoder.spec.patch} pixels.")
    return Written(f"an ONNX graph (opset {opset}, {config.precision})", tuple(notes))


def _require_other_sizes(source: Source) -> None:
    """Check on the meta device that the student takes inputs of several sizes.

    Raises: ConfigError if it does not.
    """
    spec = source.encoder.spec
    encoder = copy.deepcopy(source.encoder).to("meta")
    for rows, columns in ((spec.size, spec.size), (spec.size + spec.patch, spec.size + 2 * spec.patch)):
        try:
            encoder(torch.zeros(1, 3, rows, columns, device="meta"))
        except Exception as error:  # libraries raise many types of exceptions
            raise ConfigError(
                f"--dynamic-size does not work for {spec.arch}, which takes only one size "
                f"({brief_root(error)}); leave --dynamic-size out"
            ) from error


def _strip(path: Path, classes: Sequence[str]) -> int:
    """Remove the exporter's metadata, such as paths of source files, and return the graph's opset.

    Args:
        classes: names that become the only metadata, a JSON list, if there are any.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)  # weights above 2 GB stay in their own file
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    if classes:
        onnx.helper.set_model_props(model, {"classes": json.dumps(classes)})
    onnx.save(model, str(path))
    return int(next(each.version for each in model.opset_import if not each.domain))


def reopen(source: Source, folder: Path) -> ForwardFunction:
    """Load the graph as a user would; return a function that runs it."""
    return _asking(folder / GRAPH_FILE, source.outputs)


def holds_int8(folder: Path) -> bool:
    """Return whether the graph stores any matrix in int8."""
    import onnx

    graph = onnx.load(str(folder / GRAPH_FILE), load_external_data=False).graph
    return any(each.data_type == onnx.TensorProto.INT8 and len(each.dims) > 1 for each in graph.initializer)


def _asking(path: Path, outputs: list[str]) -> ForwardFunction:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def forward(pixels: Tensor) -> dict[str, Tensor]:
        answers: list[Any] = session.run(outputs, {INPUT: pixels.numpy().astype(np.float32)})
        return {name: torch.from_numpy(answer) for name, answer in zip(outputs, answers, strict=True)}

    return forward


def _trace(graph: nn.Module, source: Source, config: ExportConfig) -> Any:
    """Trace the graph with torch.export and return the ONNX program.

    Raises: ConfigError if it cannot be traced.
    """
    spec = source.encoder.spec
    dynamic: dict[int, Any] = {0: torch.export.Dim("batch")}
    if config.dynamic_size:
        dynamic |= {2: spec.patch * torch.export.Dim("rows"), 3: spec.patch * torch.export.Dim("columns")}
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
    except Exception as error:  # tracers raise many types of exceptions
        hint = "leave --dynamic-size out" if config.dynamic_size else "use --format timm"
        raise ConfigError(f"{spec.arch} cannot be traced into an ONNX graph ({brief_root(error)}); {hint}") from error
    assert program is not None
    return program
