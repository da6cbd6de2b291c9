"""Nearest neighbours by exact distances, in blocks, and those that two feature spaces share."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eupe.common.compute import pick_device
from eupe.errors import ConfigError

NEIGHBOURS = 10
Metric = Literal["l2", "cosine"]
QUERIES, BANK = 1024, 65536
"""Rows of the queries and of the bank whose distances are in memory at a time."""
GROUP = 64
"""Blocks of queries that are on the device at once; the bank is moved there once per group of them."""


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
    near_a, near_b = (nearest(x_ND, x_ND, groups, k=k, metric="cosine") for x_ND in (a_ND, b_ND))
    near_b = near_b.sort(dim=1).values
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


def nearest(
    queries_ND: Tensor,
    bank_MD: Tensor,
    groups_N: Tensor | None,
    *,
    k: int,
    metric: Metric,
    exact: torch.dtype | None = None,
) -> Tensor:
    """Return each query's k nearest rows of the bank, nearest first, [N, k], leaving out those of its own group.

    The bank's mean is subtracted before distances are computed. It can be much longer than the differences between
    rows, and float32 would lose their digits.

    Args:
        groups_N: groups of the rows if the queries are the bank itself.
        exact: dtype of the distances; float64 on a CPU and float32 on a GPU by default.
    """
    device = pick_device()
    exact = exact or (torch.float64 if device.type == "cpu" else torch.float32)
    blocks = torch.split(bank_MD, BANK)
    mean = torch.stack([_scaled(block, metric).sum(dim=0) for block in blocks]).sum(dim=0) / len(bank_MD)
    found: list[Tensor] = []
    for group in torch.split(torch.arange(len(queries_ND)), GROUP * QUERIES):
        parts = torch.split(group, QUERIES)
        queries = [(_scaled(queries_ND[part], metric) - mean).to(device, exact) for part in parts]
        best = [part.new_empty(len(part), 0) for part in queries]
        at = [torch.empty(len(part), 0, dtype=torch.int64, device=device) for part in queries]
        for number, block in enumerate(blocks):
            first, last = number * BANK, number * BANK + len(block)
            rows = (_scaled(block, metric) - mean).to(device, exact)
            for i, part in enumerate(parts):
                distance = torch.cdist(queries[i], rows)
                if groups_N is not None:
                    own = groups_N[part, None] == groups_N[None, first:last]
                    distance.masked_fill_(own.to(device), torch.inf)
                # The best so far compete with this block, so only k distances per query are kept.
                distance = torch.cat([best[i], distance], dim=1)
                numbers = torch.cat([at[i], torch.arange(first, last, device=device).expand(len(part), -1)], dim=1)
                best[i], picked = distance.topk(min(k, distance.shape[1]), largest=False)
                at[i] = numbers.gather(1, picked)
        found += [part.cpu() for part in at]
    return torch.cat(found)


def _scaled(features: Tensor, metric: Metric) -> Tensor:
    exact = features.double()
    return F.normalize(exact, dim=1) if metric == "cosine" else exact
