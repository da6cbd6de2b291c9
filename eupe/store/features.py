"""What is read of a store: parameters of views, and their features as stored or decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eupe.corpus.views import NEUTRAL, Photometric, ViewParams
from eupe.store.precision import Tokens


@dataclass(frozen=True)
class StoredViews:
    """Parameters by which B views were made."""

    boxes: NDArray[np.int32]
    """[B, 4], x0 y0 x1 y1 in pixels of the upright picture."""
    flips: NDArray[np.bool_]
    """[B]"""
    photometric: NDArray[np.float32] | None
    """[B, 8], see `eupe.corpus.views.Photometric`; None if the store's views are not recoloured."""

    @property
    def params(self) -> list[ViewParams]:
        """Return the B views' parameters as `eupe.corpus.views.render_view` takes them."""
        colours = [NEUTRAL] * len(self.flips)
        if self.photometric is not None:
            colours = [Photometric(*values) for values in self.photometric.tolist()]
        boxes = [(x0, y0, x1, y1) for x0, y0, x1, y1 in self.boxes.tolist()]
        return [ViewParams(*view) for view in zip(boxes, self.flips.tolist(), colours, strict=True)]

    def first_difference(self, other: StoredViews) -> int | None:
        """Return the index of the first view whose parameters differ in `other`; None if all are the same."""
        pairs = zip(self.params, other.params, strict=True)
        return next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)


@dataclass(frozen=True)
class StoredFeatures(StoredViews):
    """Parameters and features of B views at one size, as stored and not yet decoded."""

    summary: Tokens | None = None
    """[B, Ds]"""
    dense: Tokens | None = None
    """[B, h, w, D]"""
    layers: Mapping[str, Tokens] = field(default_factory=dict)
    """[B, h, w, D] of each layer that was asked for, by its number."""


@dataclass(frozen=True)
class Features(StoredViews):
    """Parameters and decoded features of B views at one size."""

    summary: NDArray[Any] | None = None
    """[B, Ds], float16, or float32 if stored as int8."""
    dense: NDArray[Any] | None = None
    """[B, h, w, D], float16, or float32 if stored as int8."""
    layers: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """The same of each layer that was asked for, by its number."""


@dataclass(frozen=True)
class Clipped:
    """Values beyond float16's range, stored as its largest value, 65,504."""

    count: int
    paths: tuple[str, ...]
    """Feature arrays that may hold such values: those with tokens whose norm is large enough."""
