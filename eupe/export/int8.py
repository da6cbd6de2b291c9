"""Int8 in any format: pictures for calibration, and the choice of the method that preserves the tokens best."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eupe.common.compute import normalise
from eupe.common.storage import AnyPath
from eupe.errors import ConfigError, CorpusError
from eupe.export.config import INT8
from eupe.export.proof import MOST_ASTRAY, Likeness, compare, worst
from eupe.export.sample_pictures import some_pictures, varied_pictures
from eupe.export.source import ForwardFunction, Source

SEEDS = (1, 2)
"""Seeds of the generated pictures for ranges, and of those for comparison; the proof uses other pictures."""
MOST = 256
"""Maximum number of the user's pictures; half of them for ranges, half for comparison."""
BATCH = 4
DYNAMIC, STATIC, WEIGHTS = "dynamic", "static", "weights"
"""Methods: computation in int8, with the ranges of activations from each input or from calibration pictures; int8 for
the weights in the file alone."""
MOST_ASTRAY_KEPT = 0.8 * MOST_ASTRAY[INT8]
"""Largest error of a method that computes in int8; below an export's limit, because the proof has other pictures."""
LARGEST_SHARE = 0.6
"""Largest size of an int8 graph as a share of float32's bytes; a graph whose weights are all in int8 has about 0.27."""


@dataclass(frozen=True)
class Calibration:
    """Normalised pictures of the export's size, float32 [P, 3, S, S]."""

    ranging: Tensor
    """Pictures that ranges are taken from."""
    choosing: Tensor
    """Other pictures, to compare quantised graphs on."""
    is_generated: bool


def calibration_pictures(source: Source, calibrate: AnyPath | None) -> Calibration:
    """Return the pictures for int8 calibration.

    Args:
        calibrate: the user's pictures; None for generated pictures.
    Raises: CorpusError if the user's pictures are missing, cannot be read or are fewer than two.
    """
    spec = source.encoder.spec

    def prepared(pictures: NDArray[np.uint8]) -> Tensor:
        return normalise(torch.from_numpy(pictures.copy()), spec.mean, spec.std)

    if calibrate is None:
        ranging, choosing = (prepared(varied_pictures(spec.size, spec.size, seed=seed)) for seed in SEEDS)
        return Calibration(ranging, choosing, is_generated=True)
    own = some_pictures(calibrate, spec.size, most=MOST)
    if len(own) < 2:
        raise CorpusError(f"--calibrate {calibrate} has only one picture; give at least two, at best a few hundred")
    return Calibration(prepared(own[::2]), prepared(own[1::2]), is_generated=False)


def require_smaller(share: float, source: Source) -> None:
    """Raise ConfigError if a graph with int8 weights still has most of the float32 graph's bytes."""
    if share > LARGEST_SHARE:
        raise ConfigError(
            f"--precision int8 would leave most of {source.encoder.spec.arch} at {source.size} px in float32, with "
            f"{share:.0%} of the bytes of the float32 graph; use --precision fp16 or fp32"
        )


def keep_best(
    source: Source,
    ways: Mapping[str, Path],
    whole_bytes: int,
    ask: Callable[[Path], ForwardFunction],
    calibration: Calibration,
) -> tuple[str, str]:
    """Choose among quantised models the one with the highest least cosine, if its error is small enough.

    If all others leave most weights in float32 or have too large an error, it is the one of the method `weights`.

    Args:
        ways: files with the weights by method, among them `weights`.
        whole_bytes: number of bytes of the float32 model.
        ask: opens a model; returns a function that runs it.
    Returns: the method, and a sentence about the methods that were compared.
    """
    shares = {way: file.stat().st_size / whole_bytes for way, file in ways.items()}
    found = {
        way: _likeness(source, ask(file), calibration.choosing)
        for way, file in ways.items()
        if shares[way] <= LARGEST_SHARE
    }
    good = [way for way in found if way != WEIGHTS and found[way].astray <= MOST_ASTRAY_KEPT]
    best = max(good or [WEIGHTS], key=lambda way: found[way].least)
    said = ", ".join(
        f"{way} {found[way].least:.4f}" if way in found else f"{way} leaves most weights in float32" for way in ways
    )
    on = "generated pictures" if calibration.is_generated else f"{len(calibration.choosing)} of your pictures"
    return best, (
        f"int8: of the methods to quantise, {best} was kept (least cosine on {on} for selection: {said}); the "
        f"graph has {shares[best]:.0%} of the bytes of the float32 graph"
        f"{', and computes in float32' if best == WEIGHTS else ''}."
    )


def _likeness(source: Source, forward: ForwardFunction, pictures: Tensor) -> Likeness:
    """Return the worst agreement of all outputs with the run's."""
    answers = [(source.reference(pixels), forward(pixels)) for pixels in torch.split(pictures, BATCH)]
    sides = zip(*answers, strict=True)
    want, got = ({name: torch.cat([each[name] for each in side]) for name in side[0]} for side in sides)
    return worst(list(compare(want, got).values()))
