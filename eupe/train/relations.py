"""Losses on how tokens relate to each other, beside those on the tokens themselves: pure functions of tensors.

None of them needs a store of its own. Shapes: B views that a worker takes at once, h w cells of a grid, P = h w, D
width, N vectors of a bank.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eupe.common.compute import Tokens
from eupe.store.layout import DENSE, SUMMARY
from eupe.train.losses import match_grids
from eupe.train.targets import TargetSet

RELATIONAL, GRAM, BANK = "relational", "gram", "bank"
RELATIONS = {RELATIONAL: SUMMARY, GRAM: DENSE, BANK: SUMMARY}
"""Kind of the tokens that each loss compares, by its name, which is also that of its option and of its log."""


def related(
    names: Collection[str],
    tokens: Tokens,
    predicted: Tensor | None,
    teacher: Mapping[str, Tensor],
    bank_ND: Tensor | None,
    *,
    temperature: float,
) -> dict[str, Tensor]:
    """Return the requested losses that a target has the tokens for, float32 [B] each.

    Args:
        names: of `RELATIONS`.
        tokens: the student's own.
        predicted: the head's output for the target's summary.
        teacher: the target's normalised tokens by kind.
        bank_ND: normalised summaries of other views; None if `bank` is not requested.
    """
    losses: dict[str, Tensor] = {}
    if RELATIONAL in names and SUMMARY in teacher:
        assert tokens.summary is not None
        losses[RELATIONAL] = relational_loss(tokens.summary, teacher[SUMMARY])
    if GRAM in names and DENSE in teacher:
        losses[GRAM] = gram_loss(*match_grids(tokens.dense, teacher[DENSE]))
    if predicted is not None and bank_ND is not None:
        losses[BANK] = bank_loss(predicted, teacher[SUMMARY], bank_ND, temperature=temperature)
    return losses


def summary_bank(targets: TargetSet, store: int, size: int, *, count: int, seed: int) -> Tensor:
    """Return summaries of training views that a generator with this seed draws, float32 [N, D], not normalised.

    Args:
        store: index of the target.
        count: largest N; it is smaller if there are fewer training views.
    """
    views = targets.views_of(~targets.held_out)
    chosen = np.random.default_rng(seed).choice(len(views), size=min(count, len(views)), replace=False)
    return torch.from_numpy(targets.read_summaries(store, views[np.sort(chosen)], size=size)).float()


def relational_loss(student_BD: Tensor, teacher_BE: Tensor) -> Tensor:
    """Return how far the similarities of each view's summary to those of all views are from the teacher's.

    The row of a view in the matrix of products of summaries is scaled to length 1; the loss is the mean square of the
    difference between the student's and the teacher's rows, times B, so that it does not shrink with B.

    Args:
        student_BD: the student's own summaries; they receive the gradient.
        teacher_BE: the teacher's, normalised; of any width.
    Returns: float32 [B].
    Source: Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, equations 1 to 4.
    """
    ours_BB, theirs_BB = (F.normalize(x.float() @ x.float().T, dim=1) for x in (student_BD, teacher_BE))
    return (ours_BB - theirs_BB).square().sum(dim=1)


def gram_loss(student_BhwD: Tensor, teacher_BhwE: Tensor) -> Tensor:
    """Return the mean squared difference between the cosines of all pairs of cells, the student's and the teacher's.

    Args:
        student_BhwD: the student's own dense tokens; they receive the gradient.
        teacher_BhwE: the teacher's, normalised, on the same grid; of any width.
    Returns: float32 [B].
    Source: Simeoni et al., "DINOv3", arXiv 2508.10104, Gram anchoring, as a mean over the P x P pairs, not their sum.
    """
    ours_BPP, theirs_BPP = (_cosines(x) for x in (student_BhwD, teacher_BhwE))
    return (ours_BPP - theirs_BPP).square().mean(dim=(1, 2))


def bank_loss(student_BD: Tensor, teacher_BD: Tensor, bank_ND: Tensor, *, temperature: float) -> Tensor:
    """Return the divergence between the distributions of similarities to a bank of summaries.

    Args:
        student_BD: head output in the teacher's space; it receives the gradient.
        teacher_BD: the teacher's summaries, normalised.
        bank_ND: summaries of other views from the cache, normalised.
        temperature: divides the cosines, for both.
    Returns: float32 [B], the Kullback-Leibler divergence of the student's distribution from the teacher's.
    Source: Fang et al., "SEED: Self-supervised Distillation for Visual Representation", ICLR 2021, equation 3, with a
        bank that stays as it is instead of a queue.
    """
    bank = F.normalize(bank_ND.float(), dim=1)
    ours_BN, theirs_BN = (
        F.log_softmax(F.normalize(x.float(), dim=1) @ bank.T / temperature, dim=1) for x in (student_BD, teacher_BD)
    )
    return (theirs_BN.exp() * (theirs_BN - ours_BN)).sum(dim=1)


def _cosines(tokens_BhwD: Tensor) -> Tensor:
    unit_BPD = F.normalize(tokens_BhwD.float().flatten(1, 2), dim=-1)
    return unit_BPD @ unit_BPD.mT
