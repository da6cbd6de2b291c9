"""Features small enough to embed in a page that shows how similar all patches of a picture are to a chosen one.

Shapes: P pictures, h w cells, N = h*w cells of one map, D channels, K channels kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eupe.pca import Maps, leading_directions

MAX_TEXT_BYTES = 4_000_000
"""Most bytes of features in one page, as base64."""
MAX_KEPT = 128
MIN_KEPT = 32
"""Fewer channels than this would say little about the model."""


@dataclass(frozen=True)
class Embedding:
    """A model's features, reduced to K channels of 8 bits, with the errors that this causes in their cosines."""

    codes_PNK: NDArray[np.int8]
    largest_error: float
    """Largest difference of the codes' cosines from the features', over all pairs of patches of a picture."""
    mean_error: float
    """Mean of these differences."""


def channels_to_keep(num_tokens: int) -> int | None:
    """Return how many channels of each token to keep so that all tokens fit in a page; None if too few to be useful."""
    fitting = MAX_TEXT_BYTES * 3 // 4 // num_tokens  # base64 takes 4 bytes for 3
    return min(fitting, MAX_KEPT) if fitting >= MIN_KEPT else None


def embed(dense_PhwD: Maps, kept: int) -> Embedding:
    """Reduce features so that their cosines change little.

    Tokens are scaled to length 1 and projected onto the `kept` directions along which they are largest, which preserves
    their inner products best. The mean is not subtracted, as it would change the cosines. Each token is then rounded to
    8 bits at its own scale, which cosines do not depend on.
    """
    num_pictures, dim = dense_PhwD.shape[0], dense_PhwD.shape[-1]
    unit_PND = _unit(dense_PhwD.reshape(num_pictures, -1, dim).astype(np.float64))
    _, directions_DK = leading_directions(unit_PND.reshape(-1, dim), min(kept, dim))
    reduced_PNK = unit_PND @ directions_DK
    largest_PN1 = np.abs(reduced_PNK).max(axis=-1, keepdims=True)
    codes_PNK = np.round(reduced_PNK / np.where(largest_PN1 > 0, largest_PN1, 1.0) * 127).astype(np.int8)
    errors = [_cosine_errors(*pair) for pair in zip(codes_PNK, unit_PND, strict=True)]
    largest, means = zip(*errors, strict=True)
    return Embedding(codes_PNK, max(largest), sum(means) / num_pictures)


def _cosine_errors(codes_NK: NDArray[np.int8], unit_ND: NDArray[np.float64]) -> tuple[float, float]:
    """Return the largest and the mean difference of cosines in one picture."""
    rounded_NK = _unit(codes_NK.astype(np.float64))
    errors_NN = np.abs(rounded_NK @ rounded_NK.T - unit_ND @ unit_ND.T)
    return float(errors_NN.max()), float(errors_NN.mean())


def _unit(tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale tokens to length 1; a token of zeros stays zero, and its cosine with any other is 0."""
    lengths = np.linalg.norm(tokens, axis=-1, keepdims=True)
    return tokens / np.where(lengths > 0, lengths, 1.0)
