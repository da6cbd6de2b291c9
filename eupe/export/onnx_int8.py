"""Int8 quantisation of an ONNX graph, with the method that preserves the tokens best."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eupe.common.compute import normalise
from eupe.common.storage import AnyPath
from eupe.errors import ConfigError, CorpusError
from eupe.export.config import INT8
from eupe.export.proof import MOST_ASTRAY, Likeness, compare, worst
from eupe.export.sample_pictures import some_pictures, varied_pictures
from eupe.export.source import ForwardFunction, Source

SEEDS = (1, 2)
"""Seeds of the pictures for calibration, and of those to compare the methods on; the proof uses other pictures."""
MOST = 256
"""Maximum number of the user's pictures; half of them for calibration, half for the comparison."""
BATCH = 4
DYNAMIC, STATIC, WEIGHTS = "dynamic", "static", "weights"
_PRODUCTS = ("Conv", "MatMul", "Gemm")
MOST_ASTRAY_KEPT = 0.8 * MOST_ASTRAY[INT8]
"""Largest error of a method that computes in int8; below an export's limit, because the proof has other pictures."""
LARGEST_SIZE = 0.6
"""Largest size of an int8 graph as a share of float32's bytes; a graph whose weights are all in int8 has about 0.27."""


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
    if (share := _share(ways[WEIGHTS], prepared)) > LARGEST_SIZE:
        raise ConfigError(
            f"--precision int8 would leave most of {source.encoder.spec.arch} at {source.size} px in float32, with "
            f"{share:.0%} of the bytes of the float32 graph; use --precision fp16 or fp32"
        )
    ranging, choosing = _pictures(source, calibrate)
    _quantise_arithmetic(prepared, ways[DYNAMIC], ways[STATIC], _Reader(_batches(source, ranging)))
    sizes = {way: _share(graph, prepared) for way, graph in ways.items()}
    found = {way: _likeness(source, ask(graph), choosing) for way, graph in ways.items() if sizes[way] <= LARGEST_SIZE}
    good = [way for way in found if way != WEIGHTS and found[way].astray <= MOST_ASTRAY_KEPT]
    best = max(good or [WEIGHTS], key=lambda way: found[way].least)
    ways[best].replace(path)
    for leftover in (prepared, *ways.values()):
        leftover.unlink(missing_ok=True)
    said = ", ".join(
        f"{way} {found[way].least:.4f}" if way in found else f"{way} leaves most weights in float32" for way in ways
    )
    on = "generated pictures" if calibrate is None else f"{len(choosing)} of your pictures"
    return (
        f"int8: of the methods to quantise, {best} was kept (least cosine on {on} for selection: {said}); the "
        f"graph has {sizes[best]:.0%} of the bytes of the float32 graph"
        f"{', and computes in float32' if best == WEIGHTS else ''}."
    )


def _share(graph: Path, whole: Path) -> float:
    return graph.stat().st_size / whole.stat().st_size


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


def _pictures(source: Source, calibrate: AnyPath | None) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the pictures for calibration, and those to compare the methods on."""
    size = source.encoder.spec.size
    if calibrate is None:
        ranging, choosing = (varied_pictures(size, size, seed=seed) for seed in SEEDS)
        return ranging, choosing
    own = some_pictures(calibrate, size, most=MOST)
    if len(own) < 2:
        raise CorpusError(f"--calibrate {calibrate} has only one picture; give at least two, at best a few hundred")
    return own[::2], own[1::2]


def _likeness(source: Source, forward: ForwardFunction, pictures: NDArray[np.uint8]) -> Likeness:
    """Return the worst agreement of all outputs with the run's."""
    answers = [(source.reference(pixels), forward(pixels)) for pixels in _batches(source, pictures)]
    sides = zip(*answers, strict=True)
    want, got = ({name: torch.cat([each[name] for each in side]) for name in side[0]} for side in sides)
    return worst(list(compare(want, got).values()))


def _batches(source: Source, pictures: NDArray[np.uint8]) -> list[torch.Tensor]:
    spec = source.encoder.spec
    return list(torch.split(normalise(torch.from_numpy(pictures.copy()), spec.mean, spec.std), BATCH))


class _Reader:
    """Batches in the form that ONNX Runtime's calibrator reads."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        self._left: Iterator[torch.Tensor] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        pixels = next(self._left, None)
        return None if pixels is None else {"pixels": pixels.numpy()}
