"""Prediction of one feature space from another: ridge regression from moments, judged on held-out pictures.

Both spaces are standardised by the training data, as the training loss does with its targets, so that every channel
that varies counts the same. The penalty is chosen on the tuning data; the final fit uses training and tuning data. All
results are functions of the moments, so features are read once and never kept.

Shapes: Dx input channels, Dy output channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eupe.evaluate.cka import PairMoments
from eupe.store.stats import Moments

PENALTIES = tuple(10.0**power for power in range(-6, 3))
"""Factors of the squared weights, relative to the mean squared error: scikit-learn's `alpha` / number of samples."""

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Predicted:
    """The quality of a linear map on samples that it was not fitted to."""

    r2: float
    """Share of the outputs' variance that it explains, over all channels together; below 0 is worse than predicting
    their mean."""
    penalty: float
    samples: int
    """Number of samples that it was fitted to."""


@dataclass(frozen=True)
class _Regression:
    """A regression in the inputs' eigenbasis, where any penalty costs one division."""

    mean: Float64
    scale: Float64
    values: Float64
    """Eigenvalues of the inputs' correlations, [Dx]."""
    vectors: Float64
    """Eigenvectors of the same, [Dx, Dx]."""
    projected: Float64
    """Correlations of inputs and outputs in that basis, [Dx, Dy]."""

    @classmethod
    def of(cls, moments: Moments, inputs: slice, outputs: slice) -> _Regression:
        scale = np.where(moments.std > 0, moments.std, 1.0)
        correlations = moments.covariance / np.outer(scale, scale)
        values, vectors = np.linalg.eigh(correlations[inputs, inputs])
        projected = vectors.T @ correlations[inputs, outputs]
        # rounding makes some zero eigenvalues slightly negative
        return cls(moments.mean, scale, values.clip(min=0), vectors, projected)

    def weights(self, penalty: float) -> Float64:
        """Return the weights from standardised inputs to standardised outputs, [Dx, Dy]."""
        return self.vectors @ (self.projected / (self.values + penalty)[:, None])


def predict(
    train: PairMoments,
    tuning: PairMoments,
    test: PairMoments,
    *,
    backward: bool = False,
    penalties: Sequence[float] = PENALTIES,
) -> Predicted | None:
    """Fit y to x, or x to y if `backward`, and judge the fit on the test data.

    Args:
        train, tuning, test: moments of disjoint sets of pictures.
        penalties: candidates, of which the best on `tuning` is used.
    Returns: None if no output varies in both training and test data.
    """
    inputs, outputs = train.sides[::-1] if backward else train.sides
    first = _Regression.of(train.moments, inputs, outputs)
    alive = train.moments.std[outputs] > 0  # an output that is constant in training has no scale for its errors
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
    """Return two sums over the samples, standardised, [Dy]: of squared errors, and of squares about their own mean."""
    # |y - xW|² expanded into moments, so that no sample is needed
    mean = (judged.mean - regression.mean) / regression.scale
    scatter = judged.scatter / np.outer(regression.scale, regression.scale)
    spread = np.diagonal(scatter)[outputs]
    shared = (weights * scatter[inputs, outputs]).sum(axis=0)
    explained = (weights * (scatter[inputs, inputs] @ weights)).sum(axis=0)
    offset = mean[outputs] - mean[inputs] @ weights
    return spread - 2 * shared + explained + judged.count * offset**2, spread
