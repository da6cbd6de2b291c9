"""How alike two spaces are: linear CKA, by the unbiased estimator, from sums that one pass accumulates.

CKA is HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) with linear kernels: 1 where one space is the other rotated, scaled
and moved, 0 where they are independent. The plain estimator of HSIC grows with the widths while samples are few, so
that two wide spaces of noise look alike; the unbiased one, HSIC_1, does not, which makes teachers of different widths
comparable. It may come out slightly below 0. Samples are taken as independent, which views of one picture and tokens of
one view are not quite.

Source: Kornblith et al., arXiv 1905.00414 (linear CKA); Song et al., "Feature Selection via Dependence Maximization",
JMLR 13 (2012), equation 5 (HSIC_1); Nguyen et al., arXiv 2010.15327, average it over minibatches. Here it is of all
samples at once: with linear kernels HSIC_1 is a function of moments, and no matrix of samples by samples is needed.

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
"""Of which the unbiased estimator exists."""

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class PairMoments:
    """Of N pairs of vectors: all that CKA and linear regression need."""

    width: int
    """Dx"""
    moments: Moments
    """Of both vectors side by side, from an origin near their mean, [Z]."""
    lengths: Float64
    """Sums over the samples of products of squared lengths: of x or y by x or y, [2, 2]."""
    weighted: Float64
    """Sums over the samples of both vectors, by the squared length of x or of y, [2, Z]."""

    @property
    def count(self) -> int:
        return self.moments.count

    @property
    def sides(self) -> tuple[slice, slice]:
        """Where x and y stand among the Z."""
        return slice(0, self.width), slice(self.width, None)

    @classmethod
    def of(cls, x_ND: NDArray[np.floating], y_ND: NDArray[np.floating], origin_Z: Float64) -> PairMoments:
        """Of rows that belong together."""
        joint = np.concatenate([x_ND, y_ND], axis=1).astype(np.float64) - origin_Z
        width = x_ND.shape[1]
        squares_2N = np.stack([np.vecdot(side, side) for side in (joint[:, :width], joint[:, width:])])
        return cls(width, Moments.of(joint), squares_2N @ squares_2N.T, squares_2N @ joint)

    def merge(self, other: PairMoments) -> PairMoments:
        """Of both sets of pairs, which have the same origin."""
        return PairMoments(
            self.width,
            self.moments.merge(other.moments),
            self.lengths + other.lengths,
            self.weighted + other.weighted,
        )

    def cka(self) -> float | None:
        """Linear CKA; None for fewer than four samples, or where a space does not vary."""
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
        """HSIC_1 of the kernels of two sides, whose diagonals it leaves out.

        With K = XX^T and L = YY^T without their diagonals: tr(KL) is |X^T Y|^2 less the products of squared lengths;
        the rows of K sum to x_i . sum(X) - |x_i|^2, from which come the sums of all of K and of KL.
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
    """Moments of pairs that come in batches, in several sets that are kept apart."""

    def __init__(self, num_sets: int = 1) -> None:
        self._origin: Float64 | None = None
        self._waiting: list[list[tuple[NDArray[np.floating], NDArray[np.floating]]]] = [[] for _ in range(num_sets)]
        self._done: list[PairMoments | None] = [None] * num_sets

    def add(self, x_ND: NDArray[np.floating], y_ND: NDArray[np.floating], *, to: int = 0) -> None:
        """Rows that belong together; the mean of the first rows of all becomes the origin."""
        if not len(x_ND):
            return
        if self._origin is None:
            self._origin = np.concatenate([x_ND.mean(axis=0, dtype=np.float64), y_ND.mean(axis=0, dtype=np.float64)])
        self._waiting[to].append((x_ND, y_ND))
        if sum(len(x) for x, _ in self._waiting[to]) >= BLOCK_ROWS:
            self._count(to)

    def totals(self) -> list[PairMoments | None]:
        """Of each set; None for one that is empty."""
        for number in range(len(self._done)):
            self._count(number)
        return list(self._done)

    def cka(self) -> float | None:
        """Over all sets."""
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
    """Places of some cells of every view, drawn anew for each: int64 [B, at most `most`]."""
    places = np.tile(np.arange(num_cells), (num_views, 1))
    if most < num_cells:
        places = generator.permuted(places, axis=1)[:, :most]
    return torch.from_numpy(places)


def tokens_at(dense_BhwD: Tensor, cells_BK: Tensor) -> NDArray[np.float32]:
    """Tokens of some cells, one after the other: [B * K, D]."""
    tokens = dense_BhwD.flatten(1, 2)
    picked = tokens[torch.arange(len(tokens))[:, None].to(tokens.device), cells_BK.to(tokens.device)]
    rows: NDArray[np.float32] = picked.flatten(0, 1).float().cpu().numpy()
    return rows
