"""How well one space says another: ridge regression from moments, judged on pictures that it was not fitted to.

Both spaces are standardised by the training data, as the loss has its targets, so that every channel that varies
counts the same. The penalty is chosen on a part of the training data; the fit is then of all of it. All is a function
of the moments, so features are read once and never kept.

Shapes: Dx inputs, Dy outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eupe.evaluate.cka import PairMoments
from eupe.store.stats import Moments

PENALTIES = tuple(10.0**power for power in range(-6, 3))
"""Factors of the squared weights, beside the mean squared error: scikit-learn's `alpha` over the number of samples."""

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Predicted:
    """What a linear map makes of samples that it was not fitted to."""

    r2: float
    """Share of the outputs' variance that it explains, over all channels together; 1 is all, below 0 less than their
    mean does."""
    penalty: float
    samples: int
    """It was fitted to."""


@dataclass(frozen=True)
class _Regression:
    """A problem in its eigenbasis, where any penalty is a division."""

    mean: Float64
    scale: Float64
    values: Float64
    """Eigenvalues of the inputs' correlations, [Dx]."""
    vectors: Float64
    """[Dx, Dx]"""
    projected: Float64
    """Correlations with the outputs in that basis, [Dx, Dy]."""

    @classmethod
    def of(cls, moments: Moments, inputs: slice, outputs: slice) -> _Regression:
        scale = np.where(moments.std > 0, moments.std, 1.0)
        correlations = moments.covariance / np.outer(scale, scale)
        values, vectors = np.linalg.eigh(correlations[inputs, inputs])
        projected = vectors.T @ correlations[inputs, outputs]
        return cls(moments.mean, scale, values.clip(min=0), vectors, projected)

    def weights(self, penalty: float) -> Float64:
        """From standardised inputs to standardised outputs, [Dx, Dy]."""
        return self.vectors @ (self.projected / (self.values + penalty)[:, None])


def predict(
    train: PairMoments,
    tuning: PairMoments,
    test: PairMoments,
    *,
    backward: bool = False,
    penalties: Sequence[float] = PENALTIES,
) -> Predicted | None:
    """From x to y, or backward; None where no output varies both in training and in the test."""
    inputs, outputs = train.sides[::-1] if backward else train.sides
    first = _Regression.of(train.moments, inputs, outputs)
    alive = train.moments.std[outputs] > 0
    errors = {
        penalty: float(_errors(first, first.weights(penalty), tuning.moments, inputs, outputs)[0][alive].sum())
        for penalty in penalties
    }
    penalty = min(penalties, key=lambda each: errors[each])
    both = train.merge(tuning)
    fitted = _Regression.of(both.moments, inputs, outputs)
    wrong, spread = _errors(fitted, fitted.weights(penalty), test.moments, inputs, outputs)
    if not spread[alive].sum() > 0:
        return None
    return Predicted(1 - float(wrong[alive].sum() / spread[alive].sum()), penalty, both.count)


def _errors(
    regression: _Regression, weights: Float64, judged: Moments, inputs: slice, outputs: slice
) -> tuple[Float64, Float64]:
    """Sums over the samples of squared errors, and of squares about the samples' own mean; both standardised, [Dy]."""
    mean = (judged.mean - regression.mean) / regression.scale
    scatter = judged.scatter / np.outer(regression.scale, regression.scale)
    spread = np.diagonal(scatter)[outputs]
    shared = (weights * scatter[inputs, outputs]).sum(axis=0)
    explained = (weights * (scatter[inputs, inputs] @ weights)).sum(axis=0)
    offset = mean[outputs] - mean[inputs] @ weights
    return spread - 2 * shared + explained + judged.count * offset**2, spread
