"""Normalisation of features: from a teacher's values to those in the loss, and back."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eupe.errors import ConfigError
from eupe.store import Store
from eupe.store.layout import layer_kind
from eupe.train.config import NONE, NORMALISATIONS, PHI_S, STANDARD
from eupe.train.targets import TargetTokens

LEAST_STD = 1e-3
"""Least scale of a channel, as a share of the median channel's standard deviation.

What varies less is mostly the rounding of fp16 or int8; scaled to unit variance it would be a target like any other.
"""
SAME_LENGTH = 1e-6
"""Relative difference in length below which components of an eigenvector count as equal."""

SYLVESTER = np.array([[1.0, 1.0], [1.0, -1.0]])
TURNED = np.array([[1.0, -1.0], [-1.0, -1.0]])
"""Matrices of order 2 with entries of +-1, from which larger Hadamard matrices are built."""


@dataclass(frozen=True)
class Normaliser:
    """The normalisation of one kind of token of one target: y = R (x - centre) / scale, and its inverse."""

    mean: Tensor
    """float32 [D]: the teacher's mean, whether or not it is subtracted."""
    centre: Tensor
    scale: Tensor
    """`centre` and `scale`: float32 [D]."""
    rotation: Tensor | None = None
    """R: orthogonal, float32 [D, D]; None for no rotation."""

    def __call__(self, tokens: TargetTokens | Tensor) -> Tensor:
        """Normalise stored tokens, or the teacher's [..., D], to float32 as the loss uses them."""
        if isinstance(tokens, TargetTokens):
            scaled = tokens.standardised(self.centre, self.scale)
        else:
            scaled = (tokens.float() - self.centre) / self.scale
        return scaled if self.rotation is None else _linear_fp32(scaled, self.rotation)

    def inverse(self, normalised: Tensor) -> Tensor:
        """Return a head's output [..., D] in the teacher's own space, float32."""
        scaled = normalised.float()
        if self.rotation is not None:
            scaled = _linear_fp32(scaled, self.rotation.T)
        return scaled * self.scale + self.centre


def _linear_fp32(tokens: Tensor, matrix_DD: Tensor) -> Tensor:
    """Multiply each token [..., D] by a matrix in float32, even within autocast: these are targets, not activations."""
    with torch.autocast(tokens.device.type, enabled=False):
        return F.linear(tokens, matrix_DD)


def normalisers(
    store: Store,
    size: int,
    device: torch.device,
    how: str,
    *,
    floored: bool = True,
    layers: Collection[str] = (),
) -> dict[str, Normaliser]:
    """Build the normalisers of a store's features at one size, by kind of token.

    Args:
        how: `standard`, each channel minus its mean, over its standard deviation (1 for a channel that never changes);
            `phi-s`, see `phi_s`; `none`, the teacher's values as they are.
        floored: whether `LEAST_STD` applies to `standard`; it does not in runs of method 1.
        layers: numbers of the layers whose maps are normalised as well.
    Raises: ConfigError if `how` is unknown, or `phi-s` does not support a width; StoreError, PartCorruptError.
    """
    made = {}
    for kind in (*store.spec.tokens, *map(layer_kind, layers)):
        stats, rotation = store.stats(size, kind), None
        centre, scale = stats.mean, np.where(stats.std > 0, stats.std, 1.0)
        if floored and stats.std.any():
            scale = np.maximum(scale, LEAST_STD * np.median(stats.std[stats.std > 0]))
        if how == PHI_S:
            alpha, rotation = phi_s(store.full_stats(size, kind).cov)
            scale = np.full_like(centre, 1 / alpha)
        elif how == NONE:
            centre, scale = np.zeros_like(centre), np.ones_like(centre)
        elif how != STANDARD:
            raise ConfigError(f"normalisation {how!r} is unknown; use {', '.join(NORMALISATIONS)}")
        made[kind] = Normaliser(
            mean=_float32(stats.mean, device),
            centre=_float32(centre, device),
            scale=_float32(scale, device),
            rotation=None if rotation is None else _float32(rotation, device),
        )
    return made


def _float32(values: NDArray[np.float64], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def phi_s(covariance: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """Compute PHI Standardization: alpha and R = H U^T, so that alpha R (x - mean) has unit variance in every channel.

    One scale serves all directions, so ratios of distances and angles about the mean are preserved; per-channel
    standardisation changes them. U holds the eigenvectors by descending eigenvalue; the first of each one's longest
    components is made positive, so that the same statistics give the same rotation. Eigenvectors that share an
    eigenvalue (such as 0, if there are fewer tokens than channels) are as LAPACK returns them. Everything is float64.

    Args:
        covariance: [D, D].
    Returns: alpha, 1 / sqrt(mean eigenvalue), or 1 if nothing varies at all; and R, orthogonal, [D, D].
    Raises: ConfigError if no Hadamard matrix H of order D is known here.
    Source: Ranzinger et al., "PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation",
        arXiv 2410.01680.
    """
    mixing = hadamard(len(covariance))
    rising = np.linalg.eigh(covariance).eigenvectors
    vectors = rising[:, ::-1]
    lengths = np.abs(vectors)
    longest = (lengths >= (1 - SAME_LENGTH) * lengths.max(axis=0)).argmax(axis=0)
    signs = np.sign(np.take_along_axis(vectors, longest[None], axis=0))
    variance = float(np.trace(covariance)) / len(covariance)
    return (variance**-0.5 if variance > 0 else 1.0), mixing @ (vectors * signs).T


def hadamard(order: int) -> NDArray[np.float64]:
    """Return an orthogonal matrix [order, order] whose entries are all +-1/sqrt(order).

    It is built by Sylvester's doubling, starting from 1 or from one of Paley's two constructions over a prime field.
    This covers every width in the registry. Prime powers and other constructions are left out, so orders such as 52 and
    584 are not known.

    Raises: ConfigError for an order that is not known.
    Source: Paley, "On orthogonal matrices" (1933).
    """
    signs = _signs(order)
    if signs is None:
        others = " or ".join(how for how in NORMALISATIONS if how != PHI_S)
        raise ConfigError(
            f"{PHI_S} does not support a width of {order}: no Hadamard matrix of that order is known; use {others}"
        )
    return signs / math.sqrt(order)


def _signs(order: int) -> NDArray[np.float64] | None:
    """Return a matrix of +-1 with orthogonal rows; None if there is none or none is known.

    Paley's second construction needs a prime that is 1 modulo 4. If it is 3 modulo 4, the first construction has
    already served half the order.
    """
    if order == 1:
        return np.ones((1, 1))
    if order % 2 == 0 and (half := _signs(order // 2)) is not None:
        return np.kron(SYLVESTER, half)
    if order % 4 == 0 and _is_prime(order - 1):
        return np.eye(order) + _bordered(order - 1, -1)
    prime = order // 2 - 1
    if order % 4 == 0 and _is_prime(prime):
        return np.kron(_bordered(prime, 1), SYLVESTER) + np.kron(np.eye(prime + 1), TURNED)
    return None


def _bordered(prime: int, left: int) -> NDArray[np.float64]:
    """Return Paley's core below a row of 1: +1 where i - j is a square modulo a prime, else -1; 0 on the diagonal."""
    square = np.full(prime, -1.0)
    square[np.arange(1, prime) ** 2 % prime] = 1
    square[0] = 0
    places = np.arange(prime)
    matrix = np.zeros((prime + 1, prime + 1))
    matrix[0, 1:], matrix[1:, 0] = 1, left
    matrix[1:, 1:] = square[(places[:, None] - places) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
