"""Exact statistics that merge: count, mean and sum of squared deviations per channel, in float64.

Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_ROWS = 8192


@dataclass(frozen=True)
class Moments:
    """Of a set of vectors [n, D]."""

    count: int
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]
    """Sum over the vectors of (x - mean)^2, [D]."""

    @property
    def std(self) -> NDArray[np.float64]:
        """Population standard deviation, [D]."""
        return np.sqrt(self.m2 / self.count)

    @classmethod
    def empty(cls, dim: int) -> Moments:
        return cls(0, np.zeros(dim), np.zeros(dim))

    @classmethod
    def of(cls, vectors: NDArray[Any]) -> Moments:
        """Moments of [n, D] vectors of any float type, in bounded memory."""
        moments = cls.empty(vectors.shape[1])
        for start in range(0, len(vectors), BLOCK_ROWS):
            block = vectors[start : start + BLOCK_ROWS].astype(np.float64)
            mean = block.mean(axis=0)
            block -= mean
            moments = moments.merge(cls(len(block), mean, np.einsum("nd,nd->d", block, block)))
        return moments

    def merge(self, other: Moments) -> Moments:
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta**2 * (self.count * other.count / count)
        return Moments(count, mean, m2)

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "mean": _encode(self.mean), "m2": _encode(self.m2)}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Moments:
        return cls(int(plain["count"]), _decode(plain["mean"]), _decode(plain["m2"]))


def merge_all(parts: Iterable[Moments]) -> Moments:
    """Merge in the order given; the same order gives the same bits."""
    iterator = iter(parts)
    total = next(iterator)
    for part in iterator:
        total = total.merge(part)
    return total


def _encode(values: NDArray[np.float64]) -> str:
    return base64.b64encode(values.astype("<f8").tobytes()).decode("ascii")


def _decode(text: str) -> NDArray[np.float64]:
    return np.frombuffer(base64.b64decode(text), "<f8").astype(np.float64)
