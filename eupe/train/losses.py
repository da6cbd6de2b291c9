"""The distillation losses: pure functions of tensors.

Shapes: B batch, h w cells of a grid, D width. Source of both losses: EUPE, arXiv 2603.22387, distillation objective.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

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
    channels_first = tokens_BhwD.movedim(-1, 1).float()
    resized = F.interpolate(channels_first, size=(side, side), mode="bicubic", align_corners=False)
    return resized.movedim(1, -1)
