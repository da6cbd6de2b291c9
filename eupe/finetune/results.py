"""What fine-tunings showed: a row for each start and share of the labels, over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

# fmt: off
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
)
# fmt: on
"""Student's t for a 95% interval, by degrees of freedom from 1 on."""


@dataclass(frozen=True)
class Trial:
    """A fine-tuned model, and what it scores."""

    folder: str
    start: str
    """`weights` or `scratch`."""
    label_share: float
    seed: int
    pictures: int
    """Number of training pictures that it learned from."""
    steps: int
    seconds: float
    images_per_s: float
    scores: dict[str, float]
    """On the judged pictures, by measure; the first is compared."""
    probe: dict[str, float] | None
    """Scores of the linear probe that it started from; None if its weights were random."""
    cached: bool = False
    """Whether it was there already."""

    @property
    def quality(self) -> float:
        """Return the first score."""
        return next(iter(self.scores.values()))


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, with half the width of its 95% interval."""

    mean: float
    interval: float | None
    """None if there is one seed."""

    def __str__(self) -> str:
        """Return both numbers as a table shows them."""
        return f"{self.mean:.3f}" + ("" if self.interval is None else f" ± {self.interval:.3f}")


@dataclass(frozen=True)
class Row:
    """Fine-tunings that differ in the seed alone."""

    label_share: float
    start: str
    pictures: int
    fine_tuned: Spread
    probe: Spread | None


@dataclass(frozen=True)
class Gain:
    """The advantage of weights over random ones, for pairs of the same seed; above 0 is better."""

    label_share: float
    by: Spread

    @property
    def is_beyond_the_spread(self) -> bool:
        """Return whether the interval leaves no doubt about the sign."""
        return self.by.interval is not None and abs(self.by.mean) > self.by.interval


def spread(values: Sequence[float]) -> Spread:
    """Return the mean of values and half the width of its 95% interval (Student's t)."""
    if len(values) < 2:
        return Spread(fmean(values), None)
    return Spread(fmean(values), T_975[len(values) - 2] * stdev(values) / math.sqrt(len(values)))


def rows(trials: Sequence[Trial]) -> list[Row]:
    """Return a row for each share and start, in the order of the trials."""
    alike: dict[tuple[float, str], list[Trial]] = {}
    for trial in trials:
        alike.setdefault((trial.label_share, trial.start), []).append(trial)
    found = []
    for (share, start), group in alike.items():
        probes = [next(iter(trial.probe.values())) for trial in group if trial.probe is not None]
        qualities = spread([trial.quality for trial in group])
        found.append(Row(share, start, group[0].pictures, qualities, spread(probes) if probes else None))
    return found


def gains(trials: Sequence[Trial], *, better: str, worse: str, lower_is_better: bool) -> list[Gain]:
    """Return, for each share, by how much one start is better than another, seed by seed."""
    score = {(trial.label_share, trial.start, trial.seed): trial.quality for trial in trials}
    sign = -1 if lower_is_better else 1
    found = []
    for share in dict.fromkeys(trial.label_share for trial in trials):
        seeds = [trial.seed for trial in trials if (trial.label_share, trial.start) == (share, better)]
        pairs = [
            sign * (score[share, better, seed] - score[share, worse, seed])
            for seed in seeds
            if (share, worse, seed) in score
        ]
        if pairs:
            found.append(Gain(share, spread(pairs)))
    return found
