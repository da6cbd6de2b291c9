"""From features as a teacher gives them to features as the loss sees them, and back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from eupe.errors import ConfigError
from eupe.store import Store
from eupe.train.batch import TargetTokens

STANDARD, PHI_S, NONE = "standard", "phi-s", "none"
NORMALISATIONS = (STANDARD, PHI_S, NONE)
LEAST_STD = 1e-3
"""Of the median channel's standard deviation. A channel that varies less is divided by this in place of its own: what
varies so little is mostly the rounding of fp16 or int8, which unit variance would make a target like any other."""
SAME_LENGTH = 1e-6
"""Components of an eigenvector whose lengths differ by a smaller share are equal."""

SYLVESTER = np.array([[1.0, 1.0], [1.0, -1.0]])
TURNED = np.array([[1.0, -1.0], [-1.0, -1.0]])
"""Hadamard matrices of order 2, of which larger ones are made."""


@dataclass(frozen=True)
class Normaliser:
    """One kind of token of one target: y = R (x - centre) / scale, and back."""

    mean: Tensor
    """float32 [D], the teacher's, whatever is subtracted."""
    centre: Tensor
    scale: Tensor
    """float32 [D]"""
    rotation: Tensor | None = None
    """R: orthogonal, float32 [D, D]; None for no rotation."""

    def __call__(self, tokens: TargetTokens | Tensor) -> Tensor:
        """Stored tokens, or [..., D] as the teacher gave them, to float32 as the loss sees them."""
        if isinstance(tokens, TargetTokens):
            scaled = tokens.standardised(self.centre, self.scale)
        else:
            scaled = (tokens.float() - self.centre) / self.scale
        return scaled if self.rotation is None else _linear_fp32(scaled, self.rotation)

    def inverse(self, normalised: Tensor) -> Tensor:
        """A head's output [..., D] as the teacher would have said it, float32."""
        scaled = normalised.float()
        if self.rotation is not None:
            scaled = _linear_fp32(scaled, self.rotation.T)
        return scaled * self.scale + self.centre


def _linear_fp32(tokens: Tensor, matrix_DD: Tensor) -> Tensor:
    """Each token [..., D] times a matrix, in float32 within autocast, too: these are targets, not activations."""
    with torch.autocast(tokens.device.type, enabled=False):
        return F.linear(tokens, matrix_DD)


def normalisers(
    store: Store, size: int, device: torch.device, how: str, *, floored: bool = True
) -> dict[str, Normaliser]:
    """By kind of token, from a store's statistics at a size.

    Args:
        how: `standard`, each channel minus its mean, over its standard deviation (1 for a channel that never changes);
            `phi-s`, see `phi_s`; `none`, as the teacher gives them.
        floored: `LEAST_STD` holds for `standard`; it did not in runs of the first method.
    Raises: ConfigError if `how` is another word, or `phi-s` cannot take a width; StoreError, PartCorruptError.
    """
    made = {}
    for kind in store.spec.tokens:
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
    """PHI Standardization: alpha and R = H U^T, so that alpha R (x - mean) has unit variance in every channel.

    One scale for all directions: distances keep their ratios, and angles about the mean stay, which per-channel
    standardisation changes. U are the eigenvectors by falling eigenvalue, each with the first of its longest components
    positive, so that the same statistics give the same rotation. Eigenvectors that share an eigenvalue (such as 0,
    where there are fewer tokens than channels) are as LAPACK gives them. Float64 throughout.

    Args:
        covariance: [D, D].
    Returns: alpha, 1 / sqrt(mean eigenvalue), or 1 if nothing changes at all; and R, orthogonal, [D, D].
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
    """An orthogonal matrix [order, order] whose entries are all +-1/sqrt(order).

    Sylvester's doubling as far as it goes, of 1 or of one of Paley's two constructions over a prime field. That serves
    every width of the registry; prime powers and other constructions are left out, so orders such as 52 and 584 are not
    known.

    Raises: ConfigError for an order that is not known.
    Source: Paley, "On orthogonal matrices" (1933).
    """
    signs = _signs(order)
    if signs is None:
        others = " or ".join(how for how in NORMALISATIONS if how != PHI_S)
        raise ConfigError(f"{PHI_S} knows no Hadamard matrix for a width of {order}; normalise by {others}")
    return signs / math.sqrt(order)


def _signs(order: int) -> NDArray[np.float64] | None:
    """A matrix of +-1 with orthogonal rows; None if there is none or none is known.

    Paley's second construction wants a prime that is 1 modulo 4; of one that is 3, the first has made half the order.
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
    """Paley's core, whether i - j is a square modulo a prime (+1, -1; 0 on the diagonal), below a row of 1."""
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
