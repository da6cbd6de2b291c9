"""Exact statistics that can be merged: moments in float64, norm histograms, outlier tokens by position.

The merging is that of Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
(1979), here for the whole matrix of co-moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_ROWS = 8192
"""Number of vectors that are centred in float64 at a time."""
NORM_BINS = 128
BINS_PER_OCTAVE = 4
FIRST_BIN = -40
"""Index of the first bin: the histogram runs from a norm of 2^-10 to 2^22; the outermost bins take what is beyond."""
OUTLIER_RATIO = 3.0
"""A dense token is an outlier if its norm exceeds this many times the median norm of its view."""


@dataclass(frozen=True)
class Moments:
    """Moments of a set of vectors [n, D]."""

    count: int
    mean: NDArray[np.float64]
    scatter: NDArray[np.float64]
    """Sum over the vectors of (x - mean)(x - mean)^T, [D, D]."""

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Return the population covariance, [D, D]."""
        return self.scatter / self.count

    @property
    def std(self) -> NDArray[np.float64]:
        """Return the population standard deviation, [D]."""
        return np.sqrt(np.diagonal(self.scatter) / self.count)

    def as_kept(self) -> Moments:
        """Return the moments as they are read back from a stored covariance."""
        return Moments(self.count, self.mean, self.covariance * self.count) if self.count else self

    @classmethod
    def empty(cls, dim: int) -> Moments:
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    @classmethod
    def of(cls, vectors: NDArray[Any]) -> Moments:
        """Compute the moments of [n, D] vectors of any float type, in bounded memory."""
        moments = cls.empty(vectors.shape[1])
        for start in range(0, len(vectors), BLOCK_ROWS):
            block = vectors[start : start + BLOCK_ROWS].astype(np.float64, copy=False)
            mean = block.mean(axis=0)
            centred = block - mean  # sums of raw squares would cancel where the mean is large
            moments = moments.merge(cls(len(block), mean, centred.T @ centred))
        return moments

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of vectors together."""
        count = self.count + other.count
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        between = np.outer(delta, delta) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)


@dataclass(frozen=True)
class Counted:
    """Statistics of some of an array's tokens, as they are stored."""

    moments: Moments
    norms: NDArray[np.int64]
    """Histogram of L2 norms, see `norm_histogram`."""
    outliers: NDArray[np.int64]
    """[h, w] for a dense map, see `outliers_by_position`; a scalar without meaning for summaries."""

    @classmethod
    def of(cls, tokens: NDArray[Any]) -> Counted:
        """Compute the statistics of tokens [views, ..., D] as they are read; views that hold NaN are left out."""
        exact = tokens.astype(np.float64)
        norms = np.sqrt(np.vecdot(exact, exact))
        there = np.isfinite(norms.reshape(len(norms), -1)).all(axis=1)
        return cls.given(Moments.of(exact[there].reshape(-1, tokens.shape[-1])), norms[there])

    @classmethod
    def given(cls, moments: Moments, norms: NDArray[Any]) -> Counted:
        """Build the statistics from the moments and the norms [views, ...] of the same tokens."""
        outliers = outliers_by_position(norms) if norms.ndim == 3 else np.zeros((), np.int64)
        return cls(moments, norm_histogram(norms), outliers)

    @classmethod
    def total(cls, counted: Sequence[Counted]) -> Counted:
        """Merge statistics in the order given."""
        return cls(
            merge_all(c.moments for c in counted),
            np.sum([c.norms for c in counted], axis=0),
            np.sum([c.outliers for c in counted], axis=0),
        )


def merge_all(parts: Iterable[Moments]) -> Moments:
    """Merge moments in the order given; the same order gives the same bits."""
    return reduce(Moments.merge, parts)


def norm_histogram(norms: NDArray[Any]) -> NDArray[np.int64]:
    """Count L2 norms in bins of a quarter octave, int64 [NORM_BINS]; norms of zero count in the first bin."""
    with np.errstate(divide="ignore"):
        place = np.floor(BINS_PER_OCTAVE * np.log2(norms.astype(np.float64).ravel())) - FIRST_BIN
    return np.bincount(np.clip(place, 0, NORM_BINS - 1).astype(np.int64), minlength=NORM_BINS)


def norm_bin_edges() -> NDArray[np.float64]:
    """Return the edges of the histogram's bins, [NORM_BINS + 1]."""
    return 2.0 ** ((np.arange(NORM_BINS + 1) + FIRST_BIN) / BINS_PER_OCTAVE)


def outliers_by_position(norms: NDArray[Any]) -> NDArray[np.int64]:
    """Count the views that have an outlier at each cell, int64 [h, w], from norms [B, h, w]."""
    flat = norms.reshape(len(norms), norms.shape[1] * norms.shape[2])
    outlying = flat > OUTLIER_RATIO * np.median(flat, axis=1, keepdims=True)
    counts: NDArray[np.int64] = outlying.sum(axis=0, dtype=np.int64).reshape(norms.shape[1:])
    return counts


@dataclass(frozen=True)
class ChannelStats:
    """Statistics of the stored values over every valid view of a store."""

    count: int
    """Number of vectors: views, or views times cells."""
    mean: NDArray[np.float64]
    """[D]"""
    std: NDArray[np.float64]
    """Population standard deviation, [D]."""


@dataclass(frozen=True)
class FullStats(ChannelStats):
    """All statistics that a store has of one kind of token at one size."""

    cov: NDArray[np.float64]
    """Population covariance, [D, D]."""
    norms: NDArray[np.int64]
    """Histogram of the tokens' L2 norms, with bins between `norm_edges`."""
    outliers: NDArray[np.int64] | None
    """[h, w], number of views in which the token's norm exceeds three times its view's median; None for summaries."""

    @property
    def norm_edges(self) -> NDArray[np.float64]:
        return norm_bin_edges()

    @property
    def dead_channels(self) -> list[int]:
        """Return the channels that never change."""
        return np.flatnonzero(self.std == 0).tolist()
