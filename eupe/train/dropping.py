"""Teacher dropping: for each view, the teachers that the student already follows count only now and then.

Shapes: T teachers, B views.
Source: Sariyildiz et al., "UNIC: Universal Classification Models via Multi-teacher Distillation", ECCV 2024.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

COUNTER = (0, 0, 0, 1)
"""Where the draws begin: epochs are permuted by keys of the same form, from a counter of 0."""


@torch.no_grad()
def keep_teachers(losses_TB: Tensor, draws_TB: Tensor, *, drop: float) -> Tensor:
    """Which teachers count for which view: the one with the largest loss always, each other unless its draw says no.

    Of equal losses one is the largest; a NaN is larger than any number, so it is never dropped unseen.

    UNIC divides the sum of the losses that count by how many count in the batch, so each of them weighs the same and a
    view's weight depends on what was dropped for others (and on which rank they are). Here the mask rescales nothing:
    mean over views of the masked losses, summed over teachers, is in the mean smaller than without dropping, and
    ranks need not know of each other's draws.

    Args:
        losses_TB: one loss per teacher and view, any float dtype.
        draws_TB: uniform in [0, 1), see `draws`; a teacher is dropped where its draw is below `drop`.
        drop: probability, 0 to 1.
    Returns: float32 [T, B], 1 for a loss that counts and 0 for one that is dropped; it has no gradient.
    """
    largest = torch.zeros_like(losses_TB, dtype=torch.bool).scatter_(0, losses_TB.argmax(dim=0, keepdim=True), True)
    return (largest | (draws_TB >= drop)).float()


def draws(seed: int, step: int, num_teachers: int, views: slice, batch_size: int) -> Tensor:
    """Uniform numbers for some of a step's views, the same however the batch is cut over ranks.

    Args:
        views: places in the global batch of `batch_size` views.
    Returns: float32 [T, views], on the CPU; a pure function of the arguments.
    """
    bits = np.random.Philox(key=[seed, step], counter=COUNTER)
    uniform = np.random.Generator(bits).random((batch_size, num_teachers), dtype=np.float32)
    return torch.from_numpy(uniform[views].T.copy())
