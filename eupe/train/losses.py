"""The distillation losses, and teacher dropping: pure functions of tensors.

Shapes: T teachers, B views of a batch, h w cells of a grid, D width.
Source of both losses: EUPE, arXiv 2603.22387, distillation objective.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eupe.common.resize import interpolation_matrix

COSINE_WEIGHT = 0.9
SMOOTH_L1_WEIGHT = 0.1


def summary_loss(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Return 1 - cosine of each view.

    Args:
        student_BD: head output, any float dtype; receives the gradient.
        teacher_BD: same shape, normalised by the store's statistics.
    Returns: float32 [B].
    """
    return cosine_distance(student_BD, teacher_BD)


def dense_loss(student_BhwD: Tensor, teacher_BhwD: Tensor) -> Tensor:
    """Return 0.9 (1 - cosine) + 0.1 smooth-L1 (transition at 1) of each view, averaged over its cells.

    Args: as for `summary_loss`, on the same grid.
    Returns: float32 [B].
    """
    cosine = cosine_distance(student_BhwD, teacher_BhwD).mean(dim=(1, 2))
    smooth_l1 = F.smooth_l1_loss(student_BhwD.float(), teacher_BhwD.float(), reduction="none").mean(dim=(1, 2, 3))
    return COSINE_WEIGHT * cosine + SMOOTH_L1_WEIGHT * smooth_l1


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - cosine over the last axis, float32.

    Raises: ValueError if the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape")
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)


def match_grids(student_BhwD: Tensor, teacher_BhwD: Tensor) -> tuple[Tensor, Tensor]:
    """Resize the smaller of two square grids to the larger, bicubic; a resized grid is float32."""
    student, teacher = student_BhwD.shape[1], teacher_BhwD.shape[1]
    if student < teacher:
        return resize_grid(student_BhwD, teacher), teacher_BhwD
    if teacher < student:
        return student_BhwD, resize_grid(teacher_BhwD, student)
    return student_BhwD, teacher_BhwD


def resize_grid(tokens_BhwD: Tensor, side: int) -> Tensor:
    """Resize a token grid to `side` x `side` cells by bicubic interpolation, float32 [B, side, side, D]."""
    before = tokens_BhwD.shape[1]
    matrix_Sh = interpolation_matrix(before, side, mode="bicubic", device=tokens_BhwD.device)
    with torch.autocast(tokens_BhwD.device.type, enabled=False):
        rows = matrix_Sh @ tokens_BhwD.float().flatten(2)
        return matrix_Sh @ rows.reshape(len(rows), side, before, -1)


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
    Source: Sariyildiz et al., "UNIC: Universal Classification Models via Multi-teacher Distillation", ECCV 2024.
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
