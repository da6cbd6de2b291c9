"""Monocular depth by BatchNorm and a linear layer on dense tokens.

Source: EUPE, arXiv 2603.22387 (NYUv2): batch size 16, AdamW, learning rate 3e-4, weight decay 1e-3, 38,400 steps with
warm-up over the first third, RMSE. The layer's 256 outputs weight depths that are evenly spaced from the least to the
greatest, and the prediction is their weighted mean (AdaBins, arXiv 2011.14141, with bins of equal width). The loss is
scale-invariant (Eigen et al., arXiv 1406.2283). Deviation: features are computed once, so training views are not
cropped or recoloured at random, and test views are not mirrored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eupe.errors import ConfigError, CorpusError
from eupe.evaluate.dense_probe import (
    ReadTruth,
    Training,
    each_truth,
    predictions,
    require_same_sides,
    train_head,
)
from eupe.evaluate.encode import EncodedViews
from eupe.evaluate.judged_pictures import windows
from eupe.evaluate.layouts import NYU_SIDES, DepthUnit, Mapped, Split, depth_split, read_depth, stated_unit, told_unit
from eupe.evaluate.result import Result
from eupe.evaluate.subject import Subject, result_of
from eupe.store.layout import DENSE

SIZE = 512
TRAINING = Training(steps=38_400, lr=3e-4, warmup=1 / 3, betas=(0.9, 0.99), clip=35.0)
MIN_M, MAX_M = 1e-3, 10.0
BINS = 256
EVEN_SHARE = 0.1
"""Added to every output, so that no bin ever has zero weight."""
SCALE_SHARE = 0.15
"""Weight of the squared mean of the log differences in the loss, next to their variance."""


SAMPLED = 4096
"""Approximate number of pixels per map from which the reported median is computed."""


class LinearDepth(nn.Module):
    """Head from tokens [B, h, w, D] to depths in metres [B, 1, h, w]."""

    def __init__(self, width: int, *, min_m: float, max_m: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, BINS)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("bins_m", torch.linspace(min_m, max_m, BINS))

    def forward(self, tokens_BhwD: Tensor) -> Tensor:
        normed = self.norm(tokens_BhwD.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        shares = torch.relu(self.linear(normed)) + EVEN_SHARE
        # The sum is never 0, even where ReLU zeroes every bin: EVEN_SHARE is added above.
        shares = shares / shares.sum(dim=-1, keepdim=True)
        return (shares * self.bins_m).sum(dim=-1)[:, None]  # type: ignore[operator]


@dataclass(frozen=True)
class DepthMaps:
    """Pictures with depth maps, of which every one was read."""

    train: Mapped
    val: Mapped
    unit: DepthUnit | None
    max_m: float
    data: Path
    ranges: tuple[Range, Range]
    """Of the training maps, and of those that are judged."""

    def read_train(self, i: int) -> NDArray[np.float32]:
        """Read the depth of a training picture in metres, [H, W]."""
        return _read(self.train, self.unit, i)

    def read_val(self, i: int) -> NDArray[np.float32]:
        """Read the depth of a judged picture in metres, [H, W]."""
        return _read(self.val, self.unit, i)

    def loss(self, said_B1SS: Tensor, truth_BSS: Tensor) -> Tensor:
        """Return the scale-invariant loss of predicted depths, over the pixels that count."""
        return scale_invariant_loss(said_B1SS[:, 0], truth_BSS, max_m=self.max_m)

    def judge(self, head: nn.Module, seen: EncodedViews) -> dict[int, dict[str, float]]:
        """Return the errors of each judged picture that has pixels that count, by its index; see `depth_errors`.

        Raises: CorpusError if none has any.
        """
        errors = {}
        for i, (said, truth) in zip(
            np.unique(seen.picture_V).tolist(), predictions(head, seen, self.read_val), strict=True
        ):
            judged = _judged(truth, self.val, self.max_m) & torch.isfinite(said[0]).cpu().numpy()
            if judged.any():
                errors[i] = depth_errors(said[0].cpu().numpy()[judged], truth[judged])
        if not errors:
            raise CorpusError(
                f"the depth maps of the val split of {self.data} hold nothing between {MIN_M:g} and {self.max_m:g} m"
            )
        return errors

    @property
    def notes(self) -> list[str]:
        """Return a sentence on the range of each split, so that a wrong unit is noticed."""
        parts = zip((self.train, self.val), self.ranges, strict=True)
        return [_told_range(part, self.unit, found) for part, found in parts]


def open_depth(
    data: Path, *, unit: DepthUnit | None = None, max_m: float = MAX_M, limit: int | None = None
) -> DepthMaps:
    """Find the depth maps of a data set, their unit and their range; each is read once.

    Args:
        unit, max_m, limit: see `depth`.
    Raises: ConfigError if `max_m` is no depth; CorpusError as `depth`.
    """
    if not MIN_M < max_m < math.inf:
        raise ConfigError(f"--max-depth must be above {MIN_M:g} m, and finite, got {max_m:g}")
    train, val = (depth_split(data, split).limited(limit) for split in get_args(Split))
    unit = stated_unit(data, unit, train.maps)
    ranges = tuple(_range(len(part.maps), partial(_read, part, unit), max_m) for part in (train, val))
    for split, found in zip(get_args(Split), ranges, strict=True):
        if not found.num_judged:
            raise CorpusError(
                f"the depth maps of the {split} split of {data} hold nothing between {MIN_M:g} and {max_m:g} m "
                f"(found: {found.told}); --depth-unit sets the metres of one step, --max-depth the greatest depth "
                "that counts"
            )
    return DepthMaps(train, val, unit, max_m, data, (ranges[0], ranges[1]))


def depth(
    subject: Subject,
    *,
    data: Path,
    size: int | None = None,
    training: Training = TRAINING,
    max_m: float = MAX_M,
    unit: DepthUnit | None = None,
    limit: int | None = None,
    scratch: Path | None = None,
    on_step: Callable[[int, int], None] = lambda done, of: None,
) -> Result:
    """Measure RMSE in metres, absolute relative error and delta 1 of a depth head, each as a mean over pictures.

    Delta 1 is the share of pixels whose prediction is within a factor of 1.25.

    Args:
        max_m: greatest depth in metres that counts; farther pixels are ignored.
        unit: unit of the maps; `stated_unit` decides if None.
        limit: only the first pictures of each split.
    Raises: CorpusError if a map is missing or differs in size from its picture, or if a split has no depth that
        counts; StoreError, RunError, TeacherError, ConfigError.
    """
    maps = open_depth(data, unit=unit, max_m=max_m, limit=limit)
    train, val = maps.train, maps.val
    chosen = subject.size(size, usual=SIZE)
    seen_val, seen_train = (  # the larger split last: if it does not fit in memory, only a short pass is lost
        subject.encode_views(part.pictures, kinds=[DENSE], size=chosen, crop=windows, scratch=scratch)
        for part in (val, train)
    )
    make_head = partial(LinearDepth, min_m=MIN_M, max_m=max_m)
    head = train_head(make_head, seen_train, maps.read_train, maps.loss, training, on_step=on_step)
    errors = list(maps.judge(head, seen_val).values())
    return result_of(
        subject,
        task="depth",
        scores=depth_measures(errors),
        lower_is_better=True,
        protocol={
            **subject.protocol(chosen),
            **asdict(training),
            "max_m": max_m,
            "crop": val.crop,
            **({} if maps.unit is None else {"depth_unit": maps.unit.word}),
            **val.protocol,
        },
        data={"path": str(data), "train": len(train.maps), "val": len(errors)},
        notes=[
            f"judged: {len(errors):,} pictures of {val.name}, by {len(train.maps):,} of {train.name}",
            *maps.notes,
        ],
    )


def scale_invariant_loss(metres_BSS: Tensor, truth_BSS: Tensor, *, max_m: float) -> Tensor:
    """Return the root of the variance of the log differences plus a share of their squared mean, over known pixels."""
    known = (truth_BSS > MIN_M) & (truth_BSS <= max_m)
    if not known.any():
        return metres_BSS.sum() * 0  # a zero that `backward` accepts
    apart = torch.log(metres_BSS[known]) - torch.log(truth_BSS[known])
    # The constant keeps the root's gradient finite where all differences are 0.
    return torch.sqrt(apart.var(correction=0) + SCALE_SHARE * apart.mean().square() + 1e-12)


def depth_errors(metres_N: NDArray[np.float32], truth_N: NDArray[np.float32]) -> dict[str, float]:
    """Return RMSE, absolute relative error and delta 1 over one picture's pixels, given in metres."""
    said, true = metres_N.astype(np.float64), truth_N.astype(np.float64)
    return {
        "rmse": float(np.sqrt(np.square(said - true).mean())),
        "abs_rel": float((np.abs(said - true) / true).mean()),
        "delta1": float((np.maximum(said / true, true / said) < 1.25).mean()),
    }


def depth_measures(errors: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the means of several pictures' errors."""
    return {name: float(np.mean([error[name] for error in errors])) for name in errors[0]}


@dataclass(frozen=True)
class Range:
    """Range of the values in a split's depth maps."""

    least_m: float
    median_m: float
    greatest_m: float
    known: float
    """Share of the pixels whose depth is known."""
    beyond: float
    """Share of the known pixels beyond the greatest depth that is judged."""
    num_judged: int

    @property
    def told(self) -> str:
        """Return the range in words, so that a wrong unit is noticed."""
        if not self.known:
            return "no known depth"
        least, greatest, median = map(_short, (self.least_m, self.greatest_m, self.median_m))
        metres = f"{least} to {greatest} m, median {median} m"
        return (
            f"{metres}, known for {self.known:.0%} of the pixels; {self.beyond:.0%} of these are too far to be judged"
        )


def _short(metres: float) -> str:
    return f"{metres:,.0f}" if metres >= 1000 else f"{metres:.3g}"


def _told_range(part: Mapped, unit: DepthUnit | None, found: Range) -> str:
    return f"depth of {part.name}, read as {told_unit(part.maps[0], unit)} (--depth-unit): {found.told}"


def _range(pictures: int, read_truth: ReadTruth, max_m: float) -> Range:
    """Read every map once and return their range; the median is over a few thousand pixels of each.

    Raises: the errors of `read_truth`.
    """
    parts = []
    for truth in each_truth(pictures, read_truth):
        known = truth[truth > MIN_M]
        some = known[:: max(1, len(known) // SAMPLED)]
        ends = (known.min(), known.max()) if len(known) else (math.inf, 0.0)
        parts.append((*ends, truth.size, len(known), int((known <= max_m).sum()), some))
    least, greatest, sizes, counts, judged, samples = zip(*parts, strict=True)
    known_pixels, num_judged = sum(counts), sum(judged)
    if not known_pixels:
        return Range(0, 0, 0, 0, 0, 0)
    median = float(np.median(np.concatenate(samples)))
    beyond = 1 - num_judged / known_pixels
    return Range(float(min(least)), median, float(max(greatest)), known_pixels / sum(sizes), beyond, num_judged)


def _read(mapped: Mapped, unit: DepthUnit | None, i: int) -> NDArray[np.float32]:
    truth = require_same_sides(mapped, i, read_depth(mapped.maps[i], unit))
    return truth.astype(np.float32)


def _judged(truth: NDArray[np.float32], val: Mapped, max_m: float) -> NDArray[np.bool_]:
    """Return the mask of the pixels that are judged: known, near enough, and inside the split's crop."""
    known = (truth > MIN_M) & (truth <= max_m)
    if val.crop is None:
        return known
    across, down = (side / nyus for side, nyus in zip(truth.shape[::-1], NYU_SIDES, strict=True))
    x0, y0, x1, y1 = (round(at * scale) for at, scale in zip(val.crop, (across, down, across, down), strict=True))
    inside = np.zeros_like(known)
    inside[y0:y1, x0:x1] = True
    return known & inside
