"""Dense features as colours: three leading principal components, one projection for all maps of a model.

Shapes: P pictures, h w cells, D channels, N = P*h*w tokens, C = 3 components.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_COMPONENTS = 3
PERCENTILES = (1.0, 99.0)
"""Of each component's scores; drawn as 0 and 255, so that a few outlier tokens do not grey out the rest."""
NEGLIGIBLE = 1e-10
"""A component with less than this share of the variance is rounding noise, and drawn as mid grey."""

Maps = NDArray[np.floating]


@dataclass(frozen=True)
class Pca:
    """A projection to three components and the shades that their scores are drawn in."""

    mean_D: NDArray[np.float64]
    components_DC: NDArray[np.float64]
    low_C: NDArray[np.float64]
    high_C: NDArray[np.float64]
    """Scores drawn as 0 and as 255."""
    explained: float
    """Share of the tokens' variance that the three explain (0 to 1)."""

    def scores(self, dense_PhwD: Maps) -> NDArray[np.float64]:
        """Of every token on the three components: [P, h, w, 3]."""
        return (dense_PhwD - self.mean_D) @ self.components_DC

    def rgb(self, dense_PhwD: Maps) -> NDArray[np.uint8]:
        """The scores as red, green and blue: [P, h, w, 3]."""
        span_C = self.high_C - self.low_C
        flat_C = span_C == 0
        shades = np.where(flat_C, 0.5, (self.scores(dense_PhwD) - self.low_C) / np.where(flat_C, 1.0, span_C))
        return np.round(shades.clip(0, 1) * 255).astype(np.uint8)


def fit_pca(dense_PhwD: Maps) -> Pca:
    """The three leading principal components of all tokens, and the percentiles of their scores.

    A component's sign is such that its score of largest magnitude is positive. Components that the tokens do
    not have (fewer than three channels, fewer than four different tokens) score 0.
    """
    tokens_ND = dense_PhwD.reshape(-1, dense_PhwD.shape[-1]).astype(np.float64)
    mean_D = tokens_ND.mean(axis=0)
    tokens_ND -= mean_D
    total = float(np.square(tokens_ND).sum())
    variances, components_DC = _leading(tokens_ND, negligible=NEGLIGIBLE * total)
    scores_NC = tokens_ND @ components_DC
    largest = scores_NC[np.abs(scores_NC).argmax(axis=0), np.arange(NUM_COMPONENTS)]
    signs_C = np.where(largest < 0, -1.0, 1.0)
    low_C, high_C = np.percentile(scores_NC * signs_C, PERCENTILES, axis=0)
    explained = float(variances.sum()) / total if total else 0.0
    return Pca(mean_D, components_DC * signs_C, low_C, high_C, explained)


def _leading(tokens_ND: NDArray[np.float64], *, negligible: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Variances (summed over tokens) [3] and directions [D, 3], largest first, from the smaller square product.

    Both are 0 where there is no more than a negligible variance.
    """
    wide = tokens_ND.shape[1] > tokens_ND.shape[0]
    eigenvalues, vectors = np.linalg.eigh(tokens_ND @ tokens_ND.T if wide else tokens_ND.T @ tokens_ND)
    variances = eigenvalues[::-1][:NUM_COMPONENTS]
    kept = variances > negligible
    vectors = vectors[:, ::-1][:, :NUM_COMPONENTS]
    if wide:
        vectors = tokens_ND.T @ vectors / np.sqrt(np.where(kept, variances, 1.0))
    lacking = NUM_COMPONENTS - len(variances)
    directions_DC = np.pad(np.where(kept, vectors, 0.0), ((0, 0), (0, lacking)))
    return np.pad(np.where(kept, variances, 0.0), (0, lacking)), directions_DC
