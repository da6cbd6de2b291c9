"""Summary of a finished store's statistics: norms, channels, directions, outliers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from eupe.store.layout import StoreSpec, feature_path
from eupe.store.reader import Store
from eupe.store.stats import FullStats

FIRST_COMPONENTS = (1, 10, 100)
"""Numbers of principal components for which the share of variance is reported."""


@dataclass(frozen=True)
class TokenSummary:
    """Statistics of one kind of token at one size."""

    size: int
    kind: str
    precision: str
    fidelity: Mapping[str, float] | None
    """`mean` and `p5` of the cosines, and `share` of bytes, measured when the precision was chosen; None if never."""
    count: int
    """Number of vectors."""
    std: NDArray[np.float64]
    """Standard deviation of each channel, [D]."""
    dead_channels: tuple[int, ...]
    norms: NDArray[np.int64]
    """Histogram of the L2 norms, [bins]."""
    norm_edges: NDArray[np.float64]
    """Edges of the bins, [bins + 1], a quarter of an octave apart."""
    eigenvalues: NDArray[np.float64]
    """Eigenvalues of the covariance, [D], in descending order, none below 0."""
    outliers: NDArray[np.int64] | None
    """Number of views in which each cell's token is an outlier, [h, w]; None for summaries."""

    @property
    def path(self) -> str:
        """Return the array's path, such as `224/dense`."""
        return feature_path(self.size, self.kind)

    @property
    def num_channels(self) -> int:
        return len(self.std)

    @property
    def mean_norm(self) -> float:
        """Return the mean norm, each taken as the geometric middle of its bin, so within 9% of the exact mean."""
        middles = np.sqrt(self.norm_edges[:-1] * self.norm_edges[1:])
        return float(self.norms @ middles / self.norms.sum())

    @property
    def median_norm(self) -> float:
        """Return the median norm, interpolated within its bin."""
        half = self.norms.sum() / 2
        below = np.cumsum(self.norms)
        place = int(np.searchsorted(below, half))
        share = 1 - (below[place] - half) / self.norms[place]
        low, high = self.norm_edges[place : place + 2]
        return float(low * (high / low) ** share)

    @property
    def std_range(self) -> tuple[float, float, float]:
        """Return the smallest, median and largest of the channels' standard deviations."""
        return float(self.std.min()), float(np.median(self.std)), float(self.std.max())

    @property
    def effective_rank(self) -> float:
        """Return the participation ratio of the eigenvalues, (Σλ)² / Σλ²: 1 to D; 0 if nothing varies."""
        shares = self.variance_shares
        return float(1 / (shares @ shares)) if shares.any() else 0.0

    @property
    def variance_shares(self) -> NDArray[np.float64]:
        """Return each principal component's share of the variance, [D]; 0 if nothing varies."""
        total = self.eigenvalues.sum()
        return self.eigenvalues / total if total > 0 else np.zeros_like(self.eigenvalues)

    def explained(self, components: int) -> float:
        """Return the share of the variance along the first principal components."""
        return float(self.variance_shares[:components].sum())

    @property
    def outlier_rates(self) -> NDArray[np.float64] | None:
        """Return the share of views in which each cell's token is an outlier, [h, w]; None for summaries."""
        return None if self.outliers is None else self.outliers / (self.count // self.outliers.size)

    @property
    def outlier_share(self) -> float | None:
        """Return the share of tokens that are outliers; None for summaries."""
        return None if self.outliers is None else float(self.outliers.sum() / self.count)

    @property
    def outlier_cell(self) -> tuple[int, int] | None:
        """Return row and column, from 0, of the cell with most outliers; None for summaries and if there are none."""
        if self.outliers is None or not self.outliers.any():
            return None
        row, column = np.unravel_index(self.outliers.argmax(), self.outliers.shape)
        return int(row), int(column)

    def to_json(self) -> dict[str, Any]:
        used = np.flatnonzero(self.norms)
        first, last = int(used[0]), int(used[-1])
        return {
            "count": self.count,
            "channels": self.num_channels,
            "precision": self.precision,
            "fidelity": None if self.fidelity is None else dict(self.fidelity),
            "mean_norm": self.mean_norm,
            "median_norm": self.median_norm,
            "norm_edges": self.norm_edges[first : last + 2].tolist(),
            "norms": self.norms[first : last + 1].tolist(),
            "std_range": list(self.std_range),
            "std": self.std.tolist(),
            "dead_channels": list(self.dead_channels),
            "effective_rank": self.effective_rank,
            "explained": {str(k): self.explained(k) for k in FIRST_COMPONENTS},
            "eigenvalues": self.eigenvalues.tolist(),
            "outlier_share": self.outlier_share,
            "outlier_cell": None if self.outlier_cell is None else list(self.outlier_cell),
            "outliers": None if self.outliers is None else self.outliers.tolist(),
        }


@dataclass(frozen=True)
class StoreSummary:
    """Statistics of a finished store."""

    path: str
    spec: StoreSpec
    num_failed: int
    """Number of samples without features."""
    num_clipped: int
    """Number of values beyond float16's range, stored as its largest value."""
    num_nonfinite: int
    """Number of values that were NaN or infinite; their samples have failed."""
    stored_bytes: int
    tokens: tuple[TokenSummary, ...]

    @property
    def stored_share(self) -> float:
        """Return the stored bytes as a share of the same features in raw float16."""
        spec = self.spec
        views = (spec.num_samples - self.num_failed) * spec.num_views
        return self.stored_bytes / (views * spec.bytes_per_view)

    def to_json(self) -> dict[str, Any]:
        """Return all numbers except the covariances."""
        spec = self.spec
        return {
            "store": self.path,
            "teacher": {name: spec.teacher.get(name) for name in ("name", "backend", "model", "licence")},
            "views": dict(spec.views),
            "sizes": list(spec.sizes),
            "grids": list(spec.grids),
            "layers": {number: dict(layer) for number, layer in spec.layers.items()},
            "precision": dict(spec.precision),
            "pictures": spec.num_samples,
            "failed": self.num_failed,
            "num_parts": spec.num_parts,
            "stored_bytes": self.stored_bytes,
            "num_clipped": self.num_clipped,
            "num_nonfinite": self.num_nonfinite,
            "tokens": {token.path: token.to_json() for token in self.tokens},
        }


def summarise(store: Store) -> StoreSummary:
    """Summarise the statistics of every kind of token at every size.

    Raises: StoreError if the store is not finished; PartCorruptError.
    """
    spec = store.spec
    tokens = tuple(
        _token_summary(spec, size, kind, store.full_stats(size, kind)) for size in spec.sizes for kind in spec.kinds
    )
    totals = store.totals
    return StoreSummary(
        path=str(store.path),
        spec=spec,
        num_failed=pc.sum(pc.not_equal(store.samples["status"], "ok")).as_py() or 0,
        num_clipped=totals["num_clipped"],
        num_nonfinite=totals["num_nonfinite"],
        stored_bytes=store.stored_bytes,
        tokens=tokens,
    )


def _token_summary(spec: StoreSpec, size: int, kind: str, stats: FullStats) -> TokenSummary:
    return TokenSummary(
        size=size,
        kind=kind,
        precision=spec.precision_of(feature_path(size, kind)),
        fidelity=spec.measured_fidelity(feature_path(size, kind)),
        count=stats.count,
        std=stats.std,
        dead_channels=tuple(stats.dead_channels),
        norms=stats.norms,
        norm_edges=stats.norm_edges,
        # ascending and, by rounding, perhaps below zero
        eigenvalues=np.clip(np.linalg.eigvalsh(stats.cov)[::-1], 0, None),
        outliers=stats.outliers,
    )
