"""Nearest neighbours that two feature spaces share."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eupe.errors import ConfigError

NEIGHBOURS = 10
BLOCK_ROWS = 1024


def mutual_neighbours(a_ND: Tensor, b_ND: Tensor, *, k: int, groups_N: Tensor | None = None) -> float | None:
    """Return the mean share of a row's k nearest neighbours by cosine that two spaces have in common.

    Args:
        a_ND, b_ND: [N, Da] and [N, Db]; row i of both is the same view.
        groups_N: int64; rows of one group, such as views of one picture, are not neighbours of each other. Default:
            each row is its own group.
    Returns: None if all rows are in one group, so that none has a neighbour.
    Raises: ConfigError if some row has fewer than k neighbours.
    Source: Huh et al., "The Platonic Representation Hypothesis" (2024), mutual nearest-neighbour metric.
    """
    groups = torch.arange(len(a_ND)) if groups_N is None else groups_N
    if len(a_ND) == most_together(groups):
        return None
    k = fitting_k(k, groups)
    near_a, near_b = _nearest(a_ND, k, groups), _nearest(b_ND, k, groups).sort(dim=1).values
    # a search in sorted rows avoids an [N, k, k] table; it returns k past the last entry, hence the clamp
    places = torch.searchsorted(near_b, near_a).clamp(max=k - 1)
    return float((near_b.gather(1, places) == near_a).double().mean())


def fitting_k(k: int | None, groups_N: Tensor) -> int:
    """Return `k`, or its default: 10, or all neighbours if there are fewer.

    Raises: ConfigError if some row has fewer than `k` neighbours.
    """
    most = len(groups_N) - most_together(groups_N)
    if k is not None and k > max(1, most):
        raise ConfigError(f"--k {k} does not fit {len(groups_N)} views; give 1 to {most}")
    return max(1, min(NEIGHBOURS, most)) if k is None else k


def most_together(groups_N: Tensor) -> int:
    """Return the number of rows in the largest group."""
    return int(np.unique(groups_N.numpy(), return_counts=True)[1].max()) if len(groups_N) else 0


def _nearest(features_ND: Tensor, k: int, groups_N: Tensor) -> Tensor:
    unit = F.normalize(features_ND.float(), dim=1)
    blocks = []
    # a block of rows at a time, so that the [N, N] similarities are never in memory
    for start in range(0, len(unit), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        similarity = unit[rows] @ unit.T
        similarity[groups_N[rows, None] == groups_N[None, :]] = -torch.inf
        blocks.append(similarity.topk(k, dim=1).indices)
    return torch.cat(blocks)
