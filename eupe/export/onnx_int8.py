"""Eight bits for an ONNX graph, by whichever of ONNX Runtime's ways keeps the tokens better."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eupe.encoder import normalise
from eupe.errors import CorpusError
from eupe.export.pictures import some_pictures, varied_pictures
from eupe.export.source import Says, Source
from eupe.export.verify import Likeness, compare
from eupe.place import Where

SEEDS = (1, 2)
"""Of the pictures that ranges are taken from, and others that the ways are compared on; neither set proves anything."""
MOST = 256
"""Of the user's pictures, half for each."""
BATCH = 4


def quantise(path: Path, source: Source, ask: Callable[[Path], Says], calibrate: Where | None) -> str:
    """Replace a float32 graph by one of int8 weights, and int8 activations where they are ranged beforehand.

    `dynamic` ranges the activations of every input anew, and leaves convolutions as they are; `static` takes their
    ranges from calibration pictures.

    Args:
        ask: a graph.
        calibrate: pictures to range activations on and to choose by; None for made-up ones.
    Returns: what was compared, and what was kept.
    Raises: CorpusError for pictures that are not there, or fewer than two.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ranging, choosing = _pictures(source, calibrate)
    prepared = path.with_name("prepared.onnx")
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    ways = {way: path.with_name(f"{way}.onnx") for way in ("dynamic", "static")}
    quantize_dynamic(
        str(prepared),
        str(ways["dynamic"]),
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm"],
    )
    quantize_static(
        str(prepared),
        str(ways["static"]),
        _Reader(_batches(source, ranging)),
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
        per_channel=True,
    )
    least = {way: _least(source, ask(graph), choosing) for way, graph in ways.items()}
    best = max(least, key=lambda way: least[way])
    ways[best].replace(path)
    for leftover in (prepared, *ways.values()):
        leftover.unlink(missing_ok=True)
    said = ", ".join(f"{way} {cosine:.4f}" for way, cosine in least.items())
    on = "made-up pictures" if calibrate is None else f"{len(choosing)} of your pictures"
    return f"int8: of ONNX Runtime's ways to quantise, {best} was kept (least cosine on {on} for choosing: {said})."


def _pictures(source: Source, calibrate: Where | None) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """To take ranges from, and to choose by."""
    size = source.encoder.card.size
    if calibrate is None:
        ranging, choosing = (varied_pictures(size, size, seed=seed) for seed in SEEDS)
        return ranging, choosing
    own = some_pictures(calibrate, size, most=MOST)
    if len(own) < 2:
        raise CorpusError(f"--calibrate {calibrate} has one picture; give two or more, some hundred are best")
    return own[::2], own[1::2]


def _least(source: Source, says: Says, pictures: NDArray[np.uint8]) -> float:
    """The least cosine of any token."""
    found: list[Likeness] = []
    for pixels in _batches(source, pictures):
        found += compare(source.reference(pixels), says(pixels)).values()
    return min(each.least for each in found)


def _batches(source: Source, pictures: NDArray[np.uint8]) -> list[torch.Tensor]:
    card = source.encoder.card
    return list(torch.split(normalise(torch.from_numpy(pictures.copy()), card.mean, card.std), BATCH))


class _Reader:
    """Batches as the calibrator asks for them."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        self._left: Iterator[torch.Tensor] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        pixels = next(self._left, None)
        return None if pixels is None else {"pixels": pixels.numpy()}
