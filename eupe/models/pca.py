"""Dense features as colours: three leading principal components, one projection for all maps of a model.

Shapes: P pictures, h w cells, D channels, N = P*h*w tokens, C = 3 components, K directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUM_COMPONENTS = 3
PERCENTILES = (1.0, 99.0)
"""Percentiles of each component's scores that are drawn as 0 and 255; a few outliers then do not grey out the rest."""
NEGLIGIBLE = 1e-10
"""Share of the first component's variance below which a component is rounding noise and is drawn as mid grey."""

Maps = NDArray[np.floating]


@dataclass(frozen=True)
class Pca:
    """A projection to three components, and the range of scores that is drawn as shades."""

    mean_D: NDArray[np.float64]
    components_DC: NDArray[np.float64]
    low_C: NDArray[np.float64]
    high_C: NDArray[np.float64]
    """Scores that are drawn as 0 (`low_C`) and as 255 (`high_C`)."""
    explained_C: NDArray[np.float64]
    """Share of the tokens' variance that each component explains (0 to 1)."""

    def scores(self, dense_PhwD: Maps) -> NDArray[np.float64]:
        """Return every token's scores on the three components: [P, h, w, 3]."""
        return (dense_PhwD - self.mean_D) @ self.components_DC

    def rgb(self, dense_PhwD: Maps) -> NDArray[np.uint8]:
        """Return the scores as red, green and blue: [P, h, w, 3]."""
        span_C = self.high_C - self.low_C
        flat_C = span_C == 0
        shades = np.where(flat_C, 0.5, (self.scores(dense_PhwD) - self.low_C) / np.where(flat_C, 1.0, span_C))
        return np.round(shades.clip(0, 1) * 255).astype(np.uint8)


def fit_pca(dense_PhwD: Maps) -> Pca:
    """Fit the three leading principal components of all tokens, and the percentiles of their scores.

    A component's sign is such that its score of largest magnitude is positive. Components that the tokens do
    not have (fewer than three channels, fewer than four different tokens) score 0.
    """
    tokens_ND = dense_PhwD.reshape(-1, dense_PhwD.shape[-1]).astype(np.float64)
    mean_D = tokens_ND.mean(axis=0)
    tokens_ND -= mean_D
    total = float(np.square(tokens_ND).sum())
    squares_C, components_DC = leading_directions(tokens_ND, NUM_COMPONENTS)
    scores_NC = tokens_ND @ components_DC
    largest = scores_NC[np.abs(scores_NC).argmax(axis=0), np.arange(NUM_COMPONENTS)]
    signs_C = np.where(largest < 0, -1.0, 1.0)
    low_C, high_C = np.percentile(scores_NC * signs_C, PERCENTILES, axis=0)
    return Pca(mean_D, components_DC * signs_C, low_C, high_C, squares_C / total if total else squares_C)


def leading_directions(tokens_ND: NDArray[np.float64], count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Find the orthonormal directions along which the tokens are largest, from the smaller of the two Gram matrices.

    Returns: the sums of squares along them [K], largest first, and the directions [D, K]; K is `count`. Both are 0
        for a direction that the tokens do not have, or that holds a negligible share of their squares.
    """
    wide = tokens_ND.shape[1] > tokens_ND.shape[0]
    gram = torch.from_numpy(tokens_ND @ tokens_ND.T if wide else tokens_ND.T @ tokens_ND)
    squares, vectors = (found.numpy() for found in leading_eigenvectors(gram, count, negligible=NEGLIGIBLE))
    if wide:
        vectors = tokens_ND.T @ vectors / np.sqrt(squares)
    lacking = (0, count - len(squares))
    return np.pad(squares, lacking), np.pad(vectors, ((0, 0), lacking))


def leading_eigenvectors(matrix_NN: Tensor, count: int, *, negligible: float) -> tuple[Tensor, Tensor]:
    """Return the greatest eigenvalues of a Gram or covariance matrix [K], and their eigenvectors [N, K], in order.

    Args:
        count: upper bound on K.
        negligible: share of the greatest eigenvalue; what does not exceed it is left out.
    """
    eigenvalues, vectors = torch.linalg.eigh(matrix_NN)
    eigenvalues, vectors = eigenvalues.flip(0)[:count], vectors.flip(1)[:, :count]
    # if nothing varies, all are 0, and `tiny` leaves out every one
    kept = eigenvalues > max(negligible * float(eigenvalues[0]), torch.finfo(torch.float64).tiny)
    return eigenvalues[kept], vectors[:, kept]


def find_foreground(dense_PhwD: Maps) -> NDArray[np.bool_]:
    """Return which tokens are foreground: [P, h, w]; none if all tokens are alike.

    The tokens are split at the mean of their first component. Background is the side that is more frequent along the
    pictures' borders than in the pictures as a whole; if neither is, the larger side.

    Source: DINOv2 (arXiv:2304.07193), figure 1; there, the side is chosen by eye.
    """
    above_Phw = fit_pca(dense_PhwD).scores(dense_PhwD)[..., 0] > 0
    border_hw = np.ones(above_Phw.shape[1:], dtype=bool)
    border_hw[1:-1, 1:-1] = False
    along_border, overall = above_Phw[:, border_hw].mean(), above_Phw.mean()
    background_is_above = along_border > overall or (along_border == overall and overall > 0.5)
    return ~above_Phw if background_is_above else above_Phw
