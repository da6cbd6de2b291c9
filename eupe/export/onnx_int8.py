"""Int8 quantisation of an ONNX graph, with the method that preserves the tokens best."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eupe.common.storage import AnyPath
from eupe.export.int8 import BATCH, DYNAMIC, STATIC, WEIGHTS, calibration_pictures, keep_best, require_smaller
from eupe.export.source import ForwardFunction, Source

_PRODUCTS = ("Conv", "MatMul", "Gemm")


def quantise(path: Path, source: Source, ask: Callable[[Path], ForwardFunction], calibrate: AnyPath | None) -> str:
    """Replace a float32 graph by one with int8 weights, which also computes in int8 if that preserves the tokens.

    `dynamic` finds the ranges of the activations for every input, and leaves convolutions in float32. `static` takes
    the ranges from calibration pictures. The one with the higher least cosine is kept. If both leave most weights in
    float32 or have too large an error, `weights` is kept: int8 weights in the file, computation in float32.

    Args:
        ask: opens a graph; returns a function that runs it.
        calibrate: pictures for calibration and for the comparison; None for generated pictures.
    Returns: a sentence about the methods that were compared and the one that was kept.
    Raises: CorpusError if the pictures are missing or fewer than two; ConfigError if the weights in int8 do not make
        the graph much smaller.
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_name("prepared.onnx")
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    ways = {way: path.with_name(f"{way}.onnx") for way in (DYNAMIC, STATIC, WEIGHTS)}
    quantise_weights(prepared, ways[WEIGHTS])
    whole_bytes = prepared.stat().st_size
    require_smaller(ways[WEIGHTS].stat().st_size / whole_bytes, source)
    pictures = calibration_pictures(source, calibrate)
    _quantise_arithmetic(prepared, ways[DYNAMIC], ways[STATIC], _Reader(torch.split(pictures.ranging, BATCH)))
    best, note = keep_best(source, ways, whole_bytes, ask, pictures)
    ways[best].replace(path)
    for leftover in (prepared, *ways.values()):
        leftover.unlink(missing_ok=True)
    return note


def _quantise_arithmetic(prepared: Path, dynamic: Path, static: Path, reader: _Reader) -> None:
    """Quantise with ONNX Runtime's two methods, to 7-bit weights: 8-bit products overflow on CPUs without VNNI."""
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static

    quantize_dynamic(
        str(prepared),
        str(dynamic),
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=True,
        op_types_to_quantize=["MatMul", "Gemm"],
    )
    quantize_static(
        str(prepared),
        str(static),
        reader,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
        per_channel=True,
        reduce_range=True,
        op_types_to_quantize=["Conv", "MatMul", "Gemm"],
    )


def quantise_weights(graph: Path, out: Path) -> None:
    """Store the weights of convolutions and matrix products in int8, with one scale per output."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(graph))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    axes = {node.input[1]: _axis_of_outputs(node) for node in model.graph.node if node.op_type in _PRODUCTS}
    for name, axis in axes.items():
        if name not in tensors or len(tensors[name].dims) < 2:
            continue
        weights = np.moveaxis(numpy_helper.to_array(tensors[name]), axis, -1)
        # `tiny` avoids a division by zero where all weights of an output are zero
        scales = np.maximum(np.abs(weights).reshape(-1, weights.shape[-1]).max(axis=0), np.finfo(np.float32).tiny) / 127
        codes = np.moveaxis(np.rint(weights / scales).astype(np.int8), -1, axis)
        model.graph.initializer.remove(tensors[name])
        parts = {f"{name}_int8": np.ascontiguousarray(codes), f"{name}_scales": scales.astype(np.float32)}
        model.graph.initializer.extend(numpy_helper.from_array(part, part_name) for part_name, part in parts.items())
        # first, because ONNX wants nodes in topological order
        model.graph.node.insert(0, helper.make_node("DequantizeLinear", list(parts), [name], axis=axis))
    onnx.save(model, str(out))


def _axis_of_outputs(node: Any) -> int:
    """Return the axis of a node's weights that indexes its outputs."""
    is_transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if node.op_type == "Conv" or is_transposed else -1


class _Reader:
    """Batches in the form that ONNX Runtime's calibrator reads."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self._left: Iterator[Tensor] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        pixels = next(self._left, None)
        return None if pixels is None else {"pixels": pixels.numpy()}
