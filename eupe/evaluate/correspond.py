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
from eupe.evaluate.judged_pictures import whole
from eupe.evaluate.layouts import PointPair, point_pairs
from eupe.evaluate.result import Result
from eupe.evaluate.subject import Subject, require_one_view, result_of
from eupe.store.layout import DENSE

SIZES = {14: 448}
SIZE = 512
ALPHA = 0.1
TINY = 1e-24
"""Least squared norm, for tokens of zeros."""


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

    Features are resized bilinearly, as by `F.interpolate` with `align_corners=False`. Resizing is linear, so products
    with tokens are resized in place of tokens, which have a hundred times as many values.

    Args:
        source_hwD, target_hwD: float32 tokens, resized to `size` x `size`.
        points_P2: x and y in pixels of the source view; centres of pixels have integer coordinates.
    """
    columns, rows = torch.from_numpy(points_P2.round().astype(int).clip(0, size - 1).T).to(source_hwD.device)
    parts = [
        weight_SS[rows, columns, None] * tokens_hwD[places_S[rows], places_S[columns]]
        for tokens_hwD, weight_SS, places_S in _corners(source_hwD, size)
    ]
    wanted_PD = torch.stack(parts).sum(dim=0)
    products_Phw = torch.einsum("pd,hwd->phw", wanted_PD, target_hwD)
    products_PSS = F.interpolate(products_Phw[None], size=(size, size), mode="bilinear", align_corners=False)[0]
    at = (products_PSS / resized_norms(target_hwD, size)).flatten(1).argmax(dim=1).cpu().numpy()
    return np.stack([at % size, at // size], axis=1).astype(np.float64)


def resized_norms(tokens_hwD: Tensor, size: int) -> Tensor:
    """Return the norms of tokens that are resized bilinearly, [S, S], from products of neighbouring tokens."""
    corners = _corners(tokens_hwD, size)
    squared_SS = torch.zeros(size, size, device=tokens_hwD.device)
    for i, (ours_hwD, our_weight_SS, places_S) in enumerate(corners):
        for theirs_hwD, their_weight_SS, _ in corners[: i + 1]:
            products_hw = (ours_hwD * theirs_hwD).sum(dim=-1)
            twice = 1 if theirs_hwD is ours_hwD else 2
            squared_SS += twice * our_weight_SS * their_weight_SS * products_hw[places_S][:, places_S]
    return squared_SS.clamp_min(TINY).sqrt()


def _corners(tokens_hwD: Tensor, size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return, for each of the four tokens around a pixel: all such tokens [h, w, D], their weights, and places.

    The weights are those of each pixel, [S, S]. Places [S] are the row or column of a pixel's token in the first.
    """
    side = tokens_hwD.shape[0]
    exact_S = ((torch.arange(size, device=tokens_hwD.device) + 0.5) * side / size - 0.5).clamp(0, side - 1)
    places_S = exact_S.floor().long()
    share_S = exact_S - places_S
    shares = (1 - share_S, share_S)
    next_h = (torch.arange(side, device=tokens_hwD.device) + 1).clamp(max=side - 1)
    rows = (tokens_hwD, tokens_hwD[next_h])
    return [
        (tokens if right == 0 else tokens[:, next_h], shares[below][:, None] * shares[right], places_S)
        for below, tokens in enumerate(rows)
        for right in (0, 1)
    ]


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
