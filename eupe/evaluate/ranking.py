"""Places in a ranking, deterministic also among ties.

Shapes: Q queries, M candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor


def best_places(similarity_QM: Tensor, own_QM: Tensor) -> Tensor:
    """Return per query how many candidates rank ahead of the best of its own; ties go to the earlier candidate.

    Args:
        own_QM: bool; candidates that belong to the query, at least one in each row.
    Returns: int64 [Q], 0 for the first place.
    """
    best_Q1 = similarity_QM.masked_fill(~own_QM, -torch.inf).amax(dim=1, keepdim=True)
    first_Q1 = (own_QM & (similarity_QM == best_Q1)).int().argmax(dim=1, keepdim=True)
    earlier_QM = torch.arange(similarity_QM.shape[1], device=similarity_QM.device) < first_Q1
    ahead_QM = (similarity_QM > best_Q1) | ((similarity_QM == best_Q1) & earlier_QM)
    return ahead_QM.sum(dim=1)


def share_within(places: Tensor, k: int) -> float:
    """Return the share of queries that have one of their own among the first k."""
    return float((places < k).double().mean())
