"""Frozen features as a readout takes them: at most 128 components of any encoder, whitened, and token positions.

Shapes: P pictures, T = h w tokens of each, D width of features, C components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eupe.models.pca import leading_eigenvectors

COMPONENTS = 128
SMALLEST = 1e-6
"""Least variance of a component that is kept, as a share of the greatest."""
PLACE = 5
"""Number of values that encode a token's position."""
AT_ONCE = 64
"""Pictures whose tokens are converted to float64 at a time."""


@dataclass(frozen=True)
class Features:
    """Frozen features of pictures, as components, and token positions."""

    tokens_PTC: Tensor
    summary_PC: Tensor
    place_T5: Tensor


def as_features(summary_PD: Tensor, dense_PhwD: Tensor, learnt_from: Sequence[int]) -> Features:
    """Return both as components that are fitted to the training pictures.

    Args:
        learnt_from: indices of the training pictures.
    """
    grid = dense_PhwD.shape[1:3]
    return Features(
        components(dense_PhwD.flatten(1, 2), learnt_from),
        components(summary_PD[:, None], learnt_from)[:, 0],
        places_of(grid[0], grid[1]),
    )


def components(values_PTD: Tensor, learnt_from: Sequence[int]) -> Tensor:
    """Return the first principal components, with mean 0 and variance 1 over the training pictures; float32 [P, T, C].

    There are at most `COMPONENTS`, and none that hardly varies. Pictures that are judged have no influence on them.

    Args:
        learnt_from: indices of the training pictures.
    """
    known = torch.tensor(list(learnt_from))
    count, width = len(known) * values_PTD.shape[1], values_PTD.shape[2]
    total_D, outer_DD = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for part in torch.split(known, AT_ONCE):
        rows = values_PTD[part].flatten(0, 1).double()
        total_D += rows.sum(dim=0)
        outer_DD += rows.T @ rows
    mean_D = total_D / count
    covariance_DD = outer_DD / count - mean_D[:, None] * mean_D
    variances, directions = leading_eigenvectors(covariance_DD, COMPONENTS, negligible=SMALLEST)
    scale = directions / variances.sqrt()
    parts = [((part.double() - mean_D) @ scale).float() for part in torch.split(values_PTD, AT_ONCE)]
    return torch.cat(parts)


def places_of(height: int, width: int) -> Tensor:
    """Return 1.5 times x, y, x² - 1/3, y² - 1/3 and xy of each token's centre; float32 [T, 5].

    x and y lie between -1 and 1, where the mean of a square is 1/3.
    """
    y, x = torch.meshgrid(*((torch.arange(n) + 0.5) / n * 2 - 1 for n in (height, width)), indexing="ij")
    return 1.5 * torch.stack([x, y, x**2 - 1 / 3, y**2 - 1 / 3, x * y], dim=-1).flatten(0, 1)
