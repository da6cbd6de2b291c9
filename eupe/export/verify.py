"""Whether an export says what its run says: both on the same varied pictures.

Shapes: B pictures, H W pixels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from eupe.encoder import EncoderCard
from eupe.errors import ConformanceError
from eupe.evaluate.latency import time_passes
from eupe.export.config import FP16, FP32, INT8
from eupe.export.pictures import varied_pictures
from eupe.export.source import Says
from eupe.tokens import normalise

LEAST: Mapping[str, float] = {FP32: 0.9999, FP16: 0.999, INT8: -1.0}
"""What the cosine of every token must reach, by precision; int8's is told, and up to whoever uses it."""
MOST_STRETCHED: Mapping[str, float] = {FP32: 0.01, FP16: 0.03, INT8: math.inf}
"""By what share the length of a token may differ, which no cosine sees."""
MOST_ASTRAY: Mapping[str, float] = {FP32: 0.05, FP16: 0.1, INT8: 0.5}
"""How great the error may be beside what differs between pictures: where a graph was traced into a constant it is 1,
however near that constant is to every picture's tokens."""
BATCHES = (1, 2, 5, 3)
"""Sizes of the batches that the export is asked in; the run is asked in others."""
REFERENCE_BATCH = 4
TIMED = 9
"""Passes of which the median time is told."""


@dataclass(frozen=True)
class Likeness:
    """Of one output to the run's own."""

    least: float
    """Least cosine of a token, over all pictures."""
    mean: float
    stretched: float
    """Greatest share by which a token's length differs."""
    astray: float
    """Root mean square of the error, over that of the differences between pictures."""


@dataclass(frozen=True)
class Proof:
    """How an export that was loaded again compares with its run."""

    num_pictures: int
    sizes: tuple[tuple[int, int], ...]
    """Height and width of the inputs that were tried."""
    outputs: dict[str, Likeness]
    """The worst over the sizes."""
    torch_ms: float
    """Of the run's student in PyTorch: median time of one picture on this machine's CPU."""
    exported_ms: float


def prove(reference: Says, exported: Says, card: EncoderCard, sizes: Sequence[tuple[int, int]]) -> Proof:
    """Ask both for the same pictures.

    Args:
        sizes: height and width of the inputs; the first is the one that is timed.
    """
    likenesses = []
    num_pictures = 0
    for height, width in sizes:
        pixels = normalise(torch.from_numpy(varied_pictures(height, width)), card.mean, card.std)
        num_pictures += len(pixels)
        want = _asked(reference, pixels, cycle([REFERENCE_BATCH]))
        got = _asked(exported, pixels, cycle(BATCHES))
        likenesses.append(compare(want, got))
    one = torch.zeros(1, 3, *sizes[0])
    return Proof(
        num_pictures=num_pictures,
        sizes=tuple(sizes),
        outputs={name: worst([found[name] for found in likenesses]) for name in likenesses[0]},
        torch_ms=1000 * statistics.median(time_passes(reference, one, TIMED)),
        exported_ms=1000 * statistics.median(time_passes(exported, one, TIMED)),
    )


def require_sameness(proof: Proof, precision: str, what: str) -> None:
    """Raises: ConformanceError naming the outputs that are not the run's."""
    least, stretched, astray = LEAST[precision], MOST_STRETCHED[precision], MOST_ASTRAY[precision]
    wrong = [
        f"{name} (least cosine {found.least:.6f}, length off by {found.stretched:.2%}, astray by {found.astray:.2%})"
        for name, found in proof.outputs.items()
        if not (found.least >= least and found.stretched <= stretched and found.astray <= astray)
    ]
    if wrong:
        raise ConformanceError(
            f"{what}, loaded again, says something else than its run of {proof.num_pictures} pictures, so nothing was "
            f"left: {', '.join(wrong)}; wanted are cosines of {least:g}, lengths within {stretched:.0%}, and errors "
            f"within {astray:.0%} of what differs between pictures"
        )


def compare(want: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> dict[str, Likeness]:
    """Each output of the same pictures, [B, ..., D].

    Raises: ConformanceError if one is missing, or of another shape.
    """
    shapes, theirs = ({name: tuple(value.shape) for name, value in outputs.items()} for outputs in (want, got))
    if shapes != theirs:
        raise ConformanceError(f"an export gives {theirs}, and its run {shapes}")
    return {name: _likeness(value.double(), got[name].double()) for name, value in want.items()}


def _likeness(want: Tensor, got: Tensor) -> Likeness:
    lengths, theirs = want.norm(dim=-1), got.norm(dim=-1)
    both_nothing = (lengths == 0) & (theirs == 0)  # where a ReLU is last
    cosines = F.cosine_similarity(want, got, dim=-1).where(~both_nothing, 1.0)
    stretched = (theirs / lengths - 1).abs().where(~both_nothing, 0.0)
    error, differences = got - want, want - want.mean(dim=0)
    return Likeness(
        least=float(cosines.min()),
        mean=float(cosines.mean()),
        stretched=float(stretched.max()),
        astray=float(error.norm() / differences.norm()),
    )


def worst(found: Sequence[Likeness]) -> Likeness:
    """Each measure's worst; not a number where any is not."""

    def over_all(name: str) -> Tensor:
        return torch.tensor([getattr(each, name) for each in found], dtype=torch.float64)

    return Likeness(
        **{name: float(over_all(name).min()) for name in ("least", "mean")},
        **{name: float(over_all(name).max()) for name in ("stretched", "astray")},
    )


def _asked(says: Says, pixels: Tensor, sizes: Iterator[int]) -> dict[str, Tensor]:
    """The outputs of all pictures, asked for in batches of these sizes."""
    answers: list[dict[str, Tensor]] = []
    start = 0
    while start < len(pixels):
        stop = start + next(sizes)
        answers.append(says(pixels[start:stop]))
        start = stop
    return {name: torch.cat([answer[name] for answer in answers]) for name in answers[0]}
