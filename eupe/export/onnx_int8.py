"""Eight bits for an ONNX graph, by whichever of ONNX Runtime's ways keeps the tokens better."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from eupe.encoder import normalise
from eupe.export.pictures import varied_pictures
from eupe.export.source import Says, Source
from eupe.export.verify import Likeness, compare

SEEDS = (1, 2)
"""Of the pictures that ranges are taken from, and others that the ways are compared on; neither set proves anything."""
BATCH = 4


def quantise(path: Path, source: Source, ask: Callable[[Path], Says]) -> str:
    """Replace a float32 graph by one of int8 weights, and int8 activations where they are ranged beforehand.

    `dynamic` ranges the activations of every input anew, and leaves convolutions as they are; `static` takes their
    ranges from calibration pictures.

    Returns: what was compared, and what was kept.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

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
        _Reader(_batches(source, SEEDS[0])),
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
        per_channel=True,
    )
    least = {way: _least(source, ask(graph)) for way, graph in ways.items()}
    best = max(least, key=lambda way: least[way])
    ways[best].replace(path)
    for leftover in (prepared, *ways.values()):
        leftover.unlink(missing_ok=True)
    said = ", ".join(f"{way} {cosine:.4f}" for way, cosine in least.items())
    return f"int8: of ONNX Runtime's ways to quantise, {best} was kept (least cosine on pictures for choosing: {said})."


def _least(source: Source, says: Says) -> float:
    """The least cosine of any token on the pictures for choosing."""
    found: list[Likeness] = []
    for pixels in _batches(source, SEEDS[1]):
        found += compare(source.reference(pixels), says(pixels)).values()
    return min(each.least for each in found)


def _batches(source: Source, seed: int) -> list[torch.Tensor]:
    card = source.encoder.card
    pixels = normalise(torch.from_numpy(varied_pictures(card.size, card.size, seed=seed)), card.mean, card.std)
    return list(torch.split(pixels, BATCH))


class _Reader:
    """Batches as the calibrator asks for them."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        self._left: Iterator[torch.Tensor] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        pixels = next(self._left, None)
        return None if pixels is None else {"pixels": pixels.numpy()}
