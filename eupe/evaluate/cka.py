"""Similarity of two feature spaces: linear CKA by the unbiased estimator, from sums accumulated in one pass.

CKA is HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) with linear kernels. It is 1 if one space is a rotated, scaled and
shifted copy of the other, and 0 if they are independent. The plain estimator of HSIC grows with the widths when there
are few samples, so two wide spaces of noise look alike. The unbiased estimator, HSIC_1, does not, so teachers of
different widths can be compared; it may be slightly below 0. Samples are assumed to be independent, which is not quite
true of views of one picture or tokens of one view.

Source: Kornblith et al., arXiv 1905.00414 (linear CKA); Song et al., "Feature Selection via Dependence Maximization",
JMLR 13 (2012), equation 5 (HSIC_1). Nguyen et al., arXiv 2010.15327, average HSIC_1 over minibatches. This module
computes it over all samples at once: with linear kernels it is a function of moments, so no N x N matrix is needed.

Shapes: N samples; Dx, Dy widths of the two spaces; Z = Dx + Dy, the two side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eupe.store.stats import BLOCK_ROWS, Moments

MIN_SAMPLES = 4
"""Fewest samples for which the unbiased estimator is defined."""

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class PairMoments:
    """Moments of N pairs of vectors: all that CKA and linear regression need."""

    width: int
    """Width of the first space, Dx."""
    moments: Moments
    """Moments of both vectors side by side, [Z], relative to an origin near their mean."""
    lengths: Float64
    """Sums over the samples of |a|² |b|², [2, 2], where a and b are each x or y."""
    weighted: Float64
    """Sums over the samples of both vectors, weighted by the squared length of x or of y, [2, Z]."""

    @property
    def count(self) -> int:
        return self.moments.count

    @property
    def sides(self) -> tuple[slice, slice]:
        """Return the slices of x and y within the Z columns."""
        return slice(0, self.width), slice(self.width, None)

    @classmethod
    def of(cls, x_ND: NDArray[np.floating], y_ND: NDArray[np.floating], origin_Z: Float64) -> PairMoments:
        """Return the moments of paired rows, relative to an origin."""
        # With an origin far from the mean, sums of fourth powers would lose the digits that CKA depends on.
        joint = np.concatenate([x_ND, y_ND], axis=1).astype(np.float64) - origin_Z
        width = x_ND.shape[1]
        squares_2N = np.stack([np.vecdot(side, side) for side in (joint[:, :width], joint[:, width:])])
        return cls(width, Moments.of(joint), squares_2N @ squares_2N.T, squares_2N @ joint)

    def merge(self, other: PairMoments) -> PairMoments:
        """Return the moments of both sets of pairs, which must have the same origin."""
        return PairMoments(
            self.width,
            self.moments.merge(other.moments),
            self.lengths + other.lengths,
            self.weighted + other.weighted,
        )

    def cka(self) -> float | None:
        """Return linear CKA, or None for fewer than four samples or if a space does not vary."""
        if self.count < MIN_SAMPLES:
            return None
        sums = self.count * self.moments.mean
        second = self.moments.scatter + np.outer(sums, sums) / self.count
        xx, yy = (self._hsic(second, sums, side, side) for side in (0, 1))
        varies = all(np.trace(self.moments.scatter[side, side]) > 0 for side in self.sides)
        if not varies or xx <= 0 or yy <= 0:
            return None
        return self._hsic(second, sums, 0, 1) / math.sqrt(xx * yy)

    def _hsic(self, second_ZZ: Float64, sums_Z: Float64, a: int, b: int) -> float:
        """Return HSIC_1 of the kernels of sides `a` and `b` (0 is x, 1 is y), which leaves out the kernels' diagonals.

        Let K = XX^T and L = YY^T without their diagonals. Then tr(KL) is |X^T Y|^2 minus the summed products of squared
        lengths. Row i of K sums to x_i . sum(X) - |x_i|^2, which gives the sums of all entries of K and of KL.
        """
        n, u, v = self.count, self.sides[a], self.sides[b]
        trace = float(np.square(second_ZZ[u, v]).sum() - self.lengths[a, b])
        all_k, all_l = (float(sums_Z[side] @ sums_Z[side] - np.trace(second_ZZ[side, side])) for side in (u, v))
        rows = float(
            sums_Z[u] @ second_ZZ[u, v] @ sums_Z[v]
            - sums_Z[u] @ self.weighted[b, u]
            - sums_Z[v] @ self.weighted[a, v]
            + self.lengths[a, b]
        )
        return (trace + all_k * all_l / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3))


class PairSums:
    """Accumulator of moments of pairs that arrive in batches, in one or more separate sets."""

    def __init__(self, num_sets: int = 1) -> None:
        self._origin: Float64 | None = None
        self._waiting: list[list[tuple[NDArray[np.floating], NDArray[np.floating]]]] = [[] for _ in range(num_sets)]
        self._done: list[PairMoments | None] = [None] * num_sets

    def add(self, x_ND: NDArray[np.floating], y_ND: NDArray[np.floating], *, to: int = 0) -> None:
        """Add paired rows to set `to`; the mean of the very first rows becomes the origin of all sets."""
        if not len(x_ND):
            return
        if self._origin is None:
            self._origin = np.concatenate([x_ND.mean(axis=0, dtype=np.float64), y_ND.mean(axis=0, dtype=np.float64)])
        self._waiting[to].append((x_ND, y_ND))
        if sum(len(x) for x, _ in self._waiting[to]) >= BLOCK_ROWS:
            self._count(to)

    def totals(self) -> list[PairMoments | None]:
        """Return the moments of each set; None for an empty set."""
        for number in range(len(self._done)):
            self._count(number)
        return list(self._done)

    def cka(self) -> float | None:
        """Return linear CKA over all sets, or None if it is not defined."""
        parts = [part for part in self.totals() if part is not None]
        return reduce(PairMoments.merge, parts).cka() if parts else None

    def _count(self, number: int) -> None:
        waiting, self._waiting[number] = self._waiting[number], []
        if not waiting:
            return
        assert self._origin is not None
        x, y = (np.concatenate(side) for side in zip(*waiting, strict=True))
        block, done = PairMoments.of(x, y, self._origin), self._done[number]
        self._done[number] = block if done is None else done.merge(block)


def draw_cells(generator: np.random.Generator, num_views: int, num_cells: int, most: int) -> Tensor:
    """Draw the indices of cells without replacement, separately for each view: int64 [B, at most `most`]."""
    places = np.tile(np.arange(num_cells), (num_views, 1))
    if most < num_cells:
        places = generator.permuted(places, axis=1)[:, :most]
    return torch.from_numpy(places)


def tokens_at(dense_BhwD: Tensor, cells_BK: Tensor) -> NDArray[np.float32]:
    """Return the tokens at some cells of each view, view after view: float32 [B * K, D]."""
    tokens = dense_BhwD.flatten(1, 2)
    picked = tokens[torch.arange(len(tokens))[:, None].to(tokens.device), cells_BK.to(tokens.device)]
    rows: NDArray[np.float32] = picked.flatten(0, 1).float().cpu().numpy()
    return rows
