"""The proof that an export computes the same as its run, by a comparison on the same varied pictures.

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

from eupe.common.compute import normalise
from eupe.errors import ConformanceError
from eupe.evaluate.latency import time_passes
from eupe.export.config import FP16, FP32, INT8
from eupe.export.sample_pictures import varied_pictures
from eupe.export.source import ForwardFunction
from eupe.models.encoder_spec import EncoderSpec

LEAST: Mapping[str, float] = {FP32: 0.9999, FP16: 0.999, INT8: -1.0}
"""Least cosine that every token must reach, by precision; for int8 it is only reported, and users decide."""
MOST_STRETCHED: Mapping[str, float] = {FP32: 0.01, FP16: 0.03, INT8: math.inf}
"""Largest relative difference of a token's length, which a cosine does not see."""
MOST_ASTRAY: Mapping[str, float] = {FP32: 0.05, FP16: 0.1, INT8: 0.5}
"""Largest error relative to the differences between pictures. A graph that was traced into a constant has 1, even if
the constant is close to every picture's tokens."""
BATCHES = (1, 2, 5, 3)
"""Batch sizes that the export is run with; the run itself uses another."""
REFERENCE_BATCH = 4
TIMED = 9
"""Number of passes whose median time is reported."""


@dataclass(frozen=True)
class Likeness:
    """The agreement of one output with the run's own."""

    least: float
    """Least cosine of a token, over all pictures."""
    mean: float
    stretched: float
    """Largest relative difference of a token's length."""
    astray: float
    """Root mean square of the error, divided by that of the differences between pictures."""


@dataclass(frozen=True)
class Proof:
    """The comparison of a reloaded export with its run."""

    num_pictures: int
    sizes: tuple[tuple[int, int], ...]
    """Height and width of the inputs that were compared."""
    outputs: dict[str, Likeness]
    """Worst agreement of each output over the sizes."""
    torch_ms: float
    """Median time of one picture with the run's student in PyTorch, on this machine's CPU."""
    exported_ms: float | None
    """None if the export does not run on this system; `outputs` is empty then."""


def prove(
    reference: ForwardFunction, exported: ForwardFunction, spec: EncoderSpec, sizes: Sequence[tuple[int, int]]
) -> Proof:
    """Run both models on the same pictures and compare their outputs.

    Args:
        sizes: height and width of the inputs; the first size is timed.
    """
    likenesses = []
    num_pictures = 0
    for height, width in sizes:
        pixels = normalise(torch.from_numpy(varied_pictures(height, width)), spec.mean, spec.std)
        num_pictures += len(pixels)
        want = _asked(reference, pixels, cycle([REFERENCE_BATCH]))
        got = _asked(exported, pixels, cycle(BATCHES))
        likenesses.append(compare(want, got))
    return Proof(
        num_pictures=num_pictures,
        sizes=tuple(sizes),
        outputs={name: worst([found[name] for found in likenesses]) for name in likenesses[0]},
        torch_ms=_median_ms(reference, sizes[0]),
        exported_ms=_median_ms(exported, sizes[0]),
    )


def time_alone(reference: ForwardFunction, size: int) -> Proof:
    """Return a proof without outputs, for an export that does not run on this system."""
    return Proof(0, ((size, size),), {}, torch_ms=_median_ms(reference, (size, size)), exported_ms=None)


def _median_ms(forward: ForwardFunction, size: tuple[int, int]) -> float:
    """Return the median time of one picture in milliseconds."""
    return 1000 * statistics.median(time_passes(forward, torch.zeros(1, 3, *size), TIMED))


def require_sameness(proof: Proof, precision: str, what: str) -> None:
    """Raise ConformanceError, naming the outputs, if any differ too much from the run's."""
    if said := differences(proof.outputs, precision):
        raise ConformanceError(
            f"{what} was reloaded, and its outputs for {proof.num_pictures} pictures differ from its run's, so the "
            f"export was removed: {said}"
        )


def differences(outputs: Mapping[str, Likeness], precision: str) -> str:
    """Return words for the outputs that differ too much from the run's, and for what is required; empty if none do."""
    least, stretched, astray = LEAST[precision], MOST_STRETCHED[precision], MOST_ASTRAY[precision]
    wrong = [
        f"{name} (least cosine {found.least:.6f}, length off by {found.stretched:.2%}, error {found.astray:.2%})"
        for name, found in outputs.items()
        # `not` around all of it, so that NaN fails
        if not (found.least >= least and found.stretched <= stretched and found.astray <= astray)
    ]
    if not wrong:
        return ""
    return (
        f"{', '.join(wrong)}; required are cosines of at least {least:g}, lengths within {stretched:.0%}, and errors "
        f"within {astray:.0%} of the differences between pictures"
    )


def compare(want: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> dict[str, Likeness]:
    """Compare each output [B, ..., D] of the same pictures.

    Raises: ConformanceError if one is missing, or has another shape.
    """
    shapes, theirs = ({name: tuple(value.shape) for name, value in outputs.items()} for outputs in (want, got))
    if shapes != theirs:
        raise ConformanceError(
            f"the outputs have other names or shapes than its run's: got {theirs}, expected {shapes}"
        )
    return {name: _likeness(value.double(), got[name].double()) for name, value in want.items()}


def _likeness(want: Tensor, got: Tensor) -> Likeness:
    lengths, theirs = want.norm(dim=-1), got.norm(dim=-1)
    both_nothing = (lengths == 0) & (theirs == 0)  # equal, but without a direction; a last ReLU can give such tokens
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
    """Return the worst value of each measure; NaN if any of its values is NaN."""

    def over_all(name: str) -> Tensor:  # a tensor, because Python's min and max may drop NaN
        return torch.tensor([getattr(each, name) for each in found], dtype=torch.float64)

    return Likeness(
        **{name: float(over_all(name).min()) for name in ("least", "mean")},
        **{name: float(over_all(name).max()) for name in ("stretched", "astray")},
    )


def _asked(forward: ForwardFunction, pixels: Tensor, sizes: Iterator[int]) -> dict[str, Tensor]:
    """Return the outputs of all pictures, computed in batches of these sizes."""
    answers: list[dict[str, Tensor]] = []
    start = 0
    while start < len(pixels):
        stop = start + next(sizes)
        answers.append(forward(pixels[start:stop]))
        start = stop
    return {name: torch.cat([answer[name] for answer in answers]) for name in answers[0]}
