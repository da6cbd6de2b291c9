"""Semantic correspondence: match a point of one picture to the pixel of another with the nearest features.

Source: EUPE, arXiv 2603.22387 (SPair-71k). Pictures are squashed to 512 px (patch 16) or 448 px (patch 14), features
are resized bilinearly to the picture, and the match is the pixel with the greatest cosine. The score is PCK@0.1 of the
longer side of the target's box. Nothing is trained.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eupe.common.compute import pick_device
from eupe.corpus.views import ViewParams
from eupe.errors import ConfigError
from eupe.evaluate.encode import EncodedViews
from eupe.evaluate.layouts import PointPair, point_pairs
from eupe.evaluate.pictures import whole
from eupe.evaluate.result import Result
from eupe.evaluate.subject import Subject, require_one_view, result_of
from eupe.store.layout import DENSE

SIZES = {14: 448}
SIZE = 512
ALPHA = 0.1
BAND_ROWS = 32
"""Rows of the resized features that are in memory at a time."""


def correspond(
    subject: Subject,
    *,
    data: Path,
    size: int | None = None,
    alpha: float = ALPHA,
    limit: int | None = None,
    scratch: Path | None = None,
    on_step: Callable[[int, int], None] = lambda done, of: None,
) -> Result:
    """Measure PCK, the share of points that are matched correctly: over all points, and as a mean over categories.

    Args:
        alpha: greatest distance of a correct match, as a share of the longer side of the target's box.
        limit: only the first pairs.
    Raises: CorpusError, StoreError, RunError, TeacherError, ConfigError.
    """
    if not 0 < alpha < math.inf:
        raise ConfigError(f"--alpha must be above 0, and finite, got {alpha:g}")
    pictures, pairs = point_pairs(data, limit=limit)
    chosen = subject.size(size, usual=SIZES.get(subject.patch, SIZE))
    encoded = subject.encode_views(pictures, kinds=[DENSE], size=chosen, crop=whole, scratch=scratch)
    require_one_view(subject, encoded, pictures, views="squash")
    found: dict[str, list[bool]] = defaultdict(list)
    for number, pair in enumerate(pairs, start=1):
        found[pair.category] += _found(encoded, pair, alpha)
        on_step(number, len(pairs))
    points = [hit for hits in found.values() for hit in hits]
    by_category = {f"pck/{name}": float(np.mean(hits)) for name, hits in sorted(found.items())}
    return result_of(
        subject,
        task="correspond",
        scores={
            "pck": float(np.mean(points)),
            "pck_by_category": float(np.mean(list(by_category.values()))),
            **by_category,
        },
        protocol={**subject.protocol(chosen), "alpha": alpha},
        data={"path": str(data), "pairs": len(pairs), "points": len(points)},
    )


def _found(encoded: EncodedViews, pair: PointPair, alpha: float) -> list[bool]:
    """Return whether each point of a pair is matched correctly."""
    assert encoded.dense is not None
    device = pick_device()
    source, target = (encoded.dense[place].to(device).float() for place in (pair.source, pair.target))
    points = to_view(pair.source_points, encoded.params[pair.source], encoded.size)
    said = nearest_points(source, points, target, size=encoded.size)
    places = from_view(said, encoded.params[pair.target], encoded.size)
    x0, y0, x1, y1 = pair.target_box
    apart = np.linalg.norm(places - pair.target_points, axis=1)
    hits: list[bool] = (apart <= alpha * max(x1 - x0, y1 - y0)).tolist()
    return hits


def nearest_points(
    source_hwD: Tensor, points_P2: NDArray[np.float64], target_hwD: Tensor, *, size: int
) -> NDArray[np.float64]:
    """Return for each source point the target pixel with the greatest cosine of features, [P, 2] as x and y.

    Args:
        source_hwD, target_hwD: float32 tokens, resized bilinearly to `size` x `size`, a band of rows at a time.
        points_P2: x and y in pixels of the source view; centres of pixels have integer coordinates.
    """
    columns, rows = points_P2.round().astype(int).clip(0, size - 1).T
    wanted_PD = torch.stack([_band(source_hwD, row, row + 1, size)[0, x] for row, x in zip(rows, columns, strict=True)])
    wanted_PD = F.normalize(wanted_PD, dim=1)
    best_P = torch.full((len(points_P2),), -torch.inf, device=target_hwD.device)
    at_P = torch.zeros(len(points_P2), dtype=torch.int64, device=target_hwD.device)
    for start in range(0, size, BAND_ROWS):
        band = _band(target_hwD, start, min(start + BAND_ROWS, size), size)
        cosine_PN = wanted_PD @ F.normalize(band.flatten(0, 1), dim=1).T
        greatest_P, place_P = cosine_PN.max(dim=1)
        better_P = greatest_P > best_P
        best_P = torch.where(better_P, greatest_P, best_P)
        at_P = torch.where(better_P, place_P + start * size, at_P)
    at = at_P.cpu().numpy()
    return np.stack([at % size, at // size], axis=1).astype(np.float64)


def _band(tokens_hwD: Tensor, first: int, last: int, size: int) -> Tensor:
    """Return rows `first` to `last` - 1 of the tokens resized to `size` x `size`, [rows, size, D].

    Resizing is bilinear, as by `F.interpolate` with `align_corners=False`.
    """
    side = tokens_hwD.shape[0]
    down = ((torch.arange(first, last, device=tokens_hwD.device) + 0.5) * side / size - 0.5).clamp(0, side - 1)
    above = down.floor().long()
    below = (above + 1).clamp(max=side - 1)
    share = (down - above)[:, None, None]
    rows = tokens_hwD[above] * (1 - share) + tokens_hwD[below] * share
    resized = F.interpolate(rows.permute(0, 2, 1), size=size, mode="linear", align_corners=False)
    return resized.permute(0, 2, 1)


def to_view(points_P2: NDArray[np.float64], params: ViewParams, size: int) -> NDArray[np.float64]:
    """Convert pixels of the picture to pixels of a view of it."""
    x0, y0, x1, y1 = params.box
    scaled = (points_P2 + 0.5 - (x0, y0)) * size / (x1 - x0, y1 - y0) - 0.5
    return np.stack([size - 1 - scaled[:, 0], scaled[:, 1]], axis=1) if params.flip else scaled


def from_view(points_P2: NDArray[np.float64], params: ViewParams, size: int) -> NDArray[np.float64]:
    """Convert pixels of a view to pixels of its picture, as the inverse of `to_view`."""
    x0, y0, x1, y1 = params.box
    points = np.stack([size - 1 - points_P2[:, 0], points_P2[:, 1]], axis=1) if params.flip else points_P2
    back: NDArray[np.float64] = (points + 0.5) * (x1 - x0, y1 - y0) / size - 0.5 + (x0, y0)
    return back
