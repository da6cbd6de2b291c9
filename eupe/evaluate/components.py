"""Frozen features as a readout takes them: as many components of any encoder, all of one size, and where tokens are.

Shapes: P pictures, T = h w tokens of each, D width of features, C components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COMPONENTS = 128
SMALLEST = 1e-6
"""Variance of a component that is kept, as a share of the greatest."""
PLACE = 5
"""Numbers that say where a token is."""
AT_ONCE = 64
"""Pictures whose tokens are taken to float64 at a time."""


@dataclass(frozen=True)
class Features:
    """Frozen features of pictures, as components."""

    tokens_PTC: Tensor
    summary_PC: Tensor
    place_T5: Tensor


def as_features(summary_PD: Tensor, dense_PhwD: Tensor, learnt_from: Sequence[int]) -> Features:
    """Both as components of the pictures that are learnt from."""
    grid = dense_PhwD.shape[1:3]
    return Features(
        components(dense_PhwD.flatten(1, 2), learnt_from),
        components(summary_PD[:, None], learnt_from)[:, 0],
        places_of(grid[0], grid[1]),
    )


def components(values_PTD: Tensor, learnt_from: Sequence[int]) -> Tensor:
    """The first principal components of what is learnt from, mean 0 and variance 1 there; float32 [P, T, C].

    At most `COMPONENTS`, and none that hardly varies; pictures that are judged decide nothing.
    """
    known = torch.tensor(list(learnt_from))
    count, width = len(known) * values_PTD.shape[1], values_PTD.shape[2]
    total_D, outer_DD = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for part in torch.split(known, AT_ONCE):
        rows = values_PTD[part].flatten(0, 1).double()
        total_D += rows.sum(dim=0)
        outer_DD += rows.T @ rows
    mean_D = total_D / count
    variances, directions = torch.linalg.eigh(outer_DD / count - mean_D[:, None] * mean_D)
    kept = variances.flip(0)[:COMPONENTS] > max(SMALLEST * float(variances[-1]), torch.finfo(torch.float64).tiny)
    scale = directions.flip(1)[:, :COMPONENTS][:, kept] / variances.flip(0)[:COMPONENTS][kept].sqrt()
    parts = [((part.double() - mean_D) @ scale).float() for part in torch.split(values_PTD, AT_ONCE)]
    return torch.cat(parts)


def places_of(height: int, width: int) -> Tensor:
    """x, y, x², y², xy of each token's middle, from -1.5 to 1.5, the squares less their mean; float32 [T, 5]."""
    y, x = torch.meshgrid(*((torch.arange(n) + 0.5) / n * 2 - 1 for n in (height, width)), indexing="ij")
    return 1.5 * torch.stack([x, y, x**2 - 1 / 3, y**2 - 1 / 3, x * y], dim=-1).flatten(0, 1)
