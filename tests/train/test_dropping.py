"""Teacher dropping against a loop over views, and its draws over ranks."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eupe.train.losses import draws, keep_teachers


def slow_mask(losses: Tensor, uniform: Tensor, drop: float) -> list[list[float]]:
    """One view after another, one teacher after another."""
    mask = [[1.0] * losses.shape[1] for _ in losses]
    for view in range(losses.shape[1]):
        of_view = losses[:, view].tolist()
        hardest = of_view.index(max(of_view))
        for teacher in range(len(losses)):
            if teacher != hardest and uniform[teacher, view].item() < drop:
                mask[teacher][view] = 0.0
    return mask


@given(
    teachers=st.integers(1, 5),
    views=st.integers(1, 9),
    drop=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_mask_is_that_of_a_slow_loop(teachers: int, views: int, drop: float, seed: int, dtype: torch.dtype) -> None:
    losses = torch.rand(teachers, views, generator=torch.Generator().manual_seed(seed)).to(dtype)
    losses += torch.arange(teachers)[:, None]  # no two alike
    losses = losses[torch.randperm(teachers, generator=torch.Generator().manual_seed(seed))]
    uniform = draws(seed, 0, teachers, slice(0, views), views)
    mask = keep_teachers(losses, uniform, drop=drop)
    assert mask.dtype == torch.float32
    assert mask.tolist() == slow_mask(losses, uniform, drop)


def test_every_view_keeps_exactly_its_hardest_teacher_where_all_others_are_dropped() -> None:
    losses = torch.tensor([[0.1, 0.9, 0.5], [0.2, 0.3, 0.5], [0.7, 0.1, 0.5]])
    mask = keep_teachers(losses, torch.full((3, 3), 0.99), drop=1.0)
    assert mask[:, :2].tolist() == [[0, 1], [0, 0], [1, 0]]
    assert mask.sum(dim=0).tolist() == [1, 1, 1], "of equal losses, one counts"


def test_the_others_are_dropped_as_often_as_asked() -> None:
    losses = torch.tensor([[2.0], [1.0], [0.0]]).expand(3, 20_000)
    mask = keep_teachers(losses, draws(0, 7, 3, slice(0, 20_000), 20_000), drop=0.3)
    assert mask[0].min() == 1
    assert mask[1:].mean(dim=1).tolist() == pytest.approx([0.7, 0.7], abs=0.02)
    assert (mask[1] * mask[2]).mean().item() == pytest.approx(0.49, abs=0.02), "each by itself"


def test_a_loss_that_is_no_number_is_not_dropped_unseen() -> None:
    losses = torch.tensor([[5.0], [torch.nan]])
    assert keep_teachers(losses, torch.zeros(2, 1), drop=1.0).tolist() == [[0], [1]]


def test_gradients_flow_through_the_losses_that_count_and_never_through_the_mask() -> None:
    losses = torch.tensor([[1.0, 2.0], [3.0, 1.0]], requires_grad=True)
    mask = keep_teachers(losses, torch.tensor([[0.1, 0.1], [0.1, 0.9]]), drop=0.5)
    assert not mask.requires_grad
    (mask * losses).sum().backward()
    assert losses.grad is not None
    assert losses.grad.tolist() == mask.tolist() == [[0, 1], [1, 1]]


@given(
    seed=st.integers(0, 2**40),
    step=st.integers(0, 2**40),
    teachers=st.integers(1, 4),
    views=st.integers(1, 40),
    ranks=st.integers(1, 5),
)
def test_ranks_have_the_draws_of_the_whole_batch(seed: int, step: int, teachers: int, views: int, ranks: int) -> None:
    whole = draws(seed, step, teachers, slice(None), views)
    assert whole.shape == (teachers, views) and whole.dtype == torch.float32
    assert whole.min() >= 0 and whole.max() < 1
    cuts = [views * rank // ranks for rank in range(ranks + 1)]
    parts = [draws(seed, step, teachers, slice(*ends), views) for ends in pairwise(cuts)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_seeds_and_steps_and_teachers_draw_apart_and_apart_from_the_epochs() -> None:
    drawn = [draws(seed, step, 2, slice(0, 50), 50) for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1))]
    rows = [row.tolist() for both in drawn for row in both]
    epoch = np.random.Generator(np.random.Philox(key=[0, 0])).random((50, 2), dtype=np.float32).T.tolist()
    assert all(a != b for i, a in enumerate(rows) for b in [*rows[:i], *epoch])
