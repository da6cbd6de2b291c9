"""Dense features as colours: their three leading principal components, one projection per model.

Shapes: P pictures, h w cells, D channels, N = P*h*w tokens, C = 3 components.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

NUM_COMPONENTS = 3
PERCENTILES = (1.0, 99.0)
"""Of each component's scores; drawn as 0 and 255, so that a few outlier tokens do not grey out the rest."""
NEGLIGIBLE = 1e-10
"""A component with less than this share of the variance is rounding noise, and drawn as mid grey."""


def pca_scores(dense_PhwD: NDArray[np.floating]) -> tuple[NDArray[np.float64], float]:
    """Scores of every token on the three leading principal components of all tokens.

    A component's sign is such that its score of largest magnitude is positive. Components that the tokens do
    not have (fewer than three channels, fewer than four different tokens) score 0.

    Returns: scores [P, h, w, 3], and the share of the tokens' variance that the three explain (0 to 1).
    """
    tokens_ND = dense_PhwD.reshape(-1, dense_PhwD.shape[-1]).astype(np.float64)
    tokens_ND -= tokens_ND.mean(axis=0)
    variances, scores_NC = _leading_scores(tokens_ND)
    total = float(np.square(tokens_ND).sum())
    kept = variances > NEGLIGIBLE * total
    largest = scores_NC[np.abs(scores_NC).argmax(axis=0), np.arange(NUM_COMPONENTS)]
    scores_NC = np.where(kept, scores_NC * np.where(largest < 0, -1.0, 1.0), 0.0)
    explained = float(variances[kept].sum()) / total if total else 0.0
    return scores_NC.reshape(*dense_PhwD.shape[:-1], NUM_COMPONENTS), explained


def _leading_scores(tokens_ND: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Squared singular values [3] and scores [N, 3], largest first, from the smaller square product."""
    wide = tokens_ND.shape[1] > tokens_ND.shape[0]
    eigenvalues, vectors = np.linalg.eigh(tokens_ND @ tokens_ND.T if wide else tokens_ND.T @ tokens_ND)
    variances = np.clip(eigenvalues[::-1][:NUM_COMPONENTS], 0, None)
    vectors = vectors[:, ::-1][:, :NUM_COMPONENTS]
    scores = vectors * np.sqrt(variances) if wide else tokens_ND @ vectors
    lacking = NUM_COMPONENTS - len(variances)
    return np.pad(variances, (0, lacking)), np.pad(scores, ((0, 0), (0, lacking)))


def pca_rgb(dense_PhwD: NDArray[np.floating]) -> tuple[NDArray[np.uint8], float]:
    """The three components as red, green and blue, each scaled between its percentiles over all pictures.

    Returns: colours [P, h, w, 3], and the share of the tokens' variance that they show (0 to 1).
    """
    scores_PhwC, explained = pca_scores(dense_PhwD)
    low_C, high_C = np.percentile(scores_PhwC, PERCENTILES, axis=(0, 1, 2))
    span_C = high_C - low_C
    flat_C = span_C == 0
    shades = np.where(flat_C, 0.5, (scores_PhwC - low_C) / np.where(flat_C, 1.0, span_C))
    return np.round(shades.clip(0, 1) * 255).astype(np.uint8), explained
