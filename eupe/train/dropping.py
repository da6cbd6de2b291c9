"""Teacher dropping: for each view, teachers that the student already follows well are dropped at random.

Shapes: T teachers, B views.
Source: Sariyildiz et al., "UNIC: Universal Classification Models via Multi-teacher Distillation", ECCV 2024.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

COUNTER = (0, 0, 0, 1)
"""First counter of the draws; sets them apart from a Philox generator that has the same key and starts at 0."""


@torch.no_grad()
def keep_teachers(losses_TB: Tensor, draws_TB: Tensor, *, drop: float) -> Tensor:
    """Return which teachers count for which view: always the one with the largest loss, others unless they are dropped.

    Of equal losses one counts as the largest; a NaN counts as larger than any number, so it is never hidden.

    UNIC divides the sum of the kept losses by their number in the batch, so every kept loss has the same weight, and a
    view's weight depends on what was dropped for other views (and on their rank). Here nothing is rescaled: the total,
    the mean over views of the kept losses, summed over teachers, is on average smaller than without dropping, and ranks
    need not know each other's draws.

    Args:
        losses_TB: one loss per teacher and view, any float dtype.
        draws_TB: uniform in [0, 1), see `draws`; a teacher is dropped if its draw is below `drop`.
        drop: probability, 0 to 1.
    Returns: float32 [T, B], 1 for a loss that is kept and 0 for one that is dropped; it has no gradient.
    """
    largest = torch.zeros_like(losses_TB, dtype=torch.bool).scatter_(0, losses_TB.argmax(dim=0, keepdim=True), True)
    return (largest | (draws_TB >= drop)).float()


def draws(seed: int, step: int, num_teachers: int, views: slice, batch_size: int) -> Tensor:
    """Return uniform numbers for some of a step's views; they are the same however the batch is split over ranks.

    Args:
        views: positions in the global batch of `batch_size` views.
    Returns: float32 [T, views], on the CPU; a pure function of the arguments.
    """
    bits = np.random.Philox(key=[seed, step], counter=COUNTER)
    # drawn for all views and then sliced, so that every rank slices the same numbers
    uniform = np.random.Generator(bits).random((batch_size, num_teachers), dtype=np.float32)
    return torch.from_numpy(uniform[views].T.copy())
