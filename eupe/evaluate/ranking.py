"""Places in a ranking, the same each time, equals or not.

Shapes: Q queries, M candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor


def best_places(similarity_QM: Tensor, own_QM: Tensor) -> Tensor:
    """Per query, how many candidates rank ahead of the best of its own; among equals the earlier candidate does.

    Args:
        own_QM: bool, at least one true in each row.
    Returns: int64 [Q], 0 for the first place.
    """
    best_Q1 = similarity_QM.masked_fill(~own_QM, -torch.inf).amax(dim=1, keepdim=True)
    first_Q1 = (own_QM & (similarity_QM == best_Q1)).int().argmax(dim=1, keepdim=True)
    earlier_QM = torch.arange(similarity_QM.shape[1], device=similarity_QM.device) < first_Q1
    ahead_QM = (similarity_QM > best_Q1) | ((similarity_QM == best_Q1) & earlier_QM)
    return ahead_QM.sum(dim=1)


def share_within(places: Tensor, k: int) -> float:
    """Of the queries, how many have one of their own among the first k."""
    return float((places < k).double().mean())
