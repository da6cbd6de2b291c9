"""Losses and grids against slow references written out here."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from eupe.train.losses import dense_loss, match_grids, resize_grid, summary_loss


def slow_cosine_distance(a: Tensor, b: Tensor) -> float:
    x, y = a.double().numpy().reshape(-1, a.shape[-1]), b.double().numpy().reshape(-1, b.shape[-1])
    return float(np.mean([1 - u @ v / (np.sqrt(u @ u) * np.sqrt(v @ v)) for u, v in zip(x, y, strict=True)]))


def slow_smooth_l1(a: Tensor, b: Tensor) -> float:
    total = 0.0
    for u, v in zip(a.double().flatten().tolist(), b.double().flatten().tolist(), strict=True):
        d = abs(u - v)
        total += 0.5 * d * d if d < 1 else d - 0.5
    return total / a.numel()


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator), 2 * torch.randn(*shape, generator=generator)


def test_summary_loss_is_one_minus_cosine_of_each_view() -> None:
    student, teacher = pair(5, 7)
    expected = [slow_cosine_distance(s, t) for s, t in zip(student, teacher, strict=True)]
    assert summary_loss(student, teacher).tolist() == pytest.approx(expected, abs=1e-6)
    assert summary_loss(3 * teacher, teacher).tolist() == pytest.approx([0] * 5, abs=1e-6)
    assert summary_loss(-teacher, teacher).tolist() == pytest.approx([2] * 5, abs=1e-6)


def test_dense_loss_is_the_papers_mix_of_each_view() -> None:
    student, teacher = pair(4, 3, 3, 6)
    expected = [
        0.9 * slow_cosine_distance(s, t) + 0.1 * slow_smooth_l1(s, t) for s, t in zip(student, teacher, strict=True)
    ]
    assert dense_loss(student, teacher).tolist() == pytest.approx(expected, abs=1e-6)
    assert dense_loss(2 * teacher, teacher).min().item() > 0.05


def test_the_mean_over_views_is_the_mean_over_all_cells() -> None:
    """The loss of a batch, whatever it is cut into."""
    student, teacher = pair(4, 3, 3, 6)
    whole = 0.9 * slow_cosine_distance(student, teacher) + 0.1 * slow_smooth_l1(student, teacher)
    assert dense_loss(student, teacher).mean().item() == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize(("loss", "shape"), [(summary_loss, (3, 6)), (dense_loss, (3, 2, 2, 6))])
def test_losses_are_float32_and_differentiable_whatever_the_student_computes_in(
    loss: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    """A view's loss moves that view alone."""
    student, teacher = pair(*shape)
    half = student.bfloat16().requires_grad_()
    of_views = loss(half, teacher)
    of_views[1].backward()
    assert of_views.shape == (3,) and of_views.dtype == torch.float32
    assert half.grad is not None
    assert half.grad.float().flatten(1).abs().sum(dim=1).ne(0).tolist() == [False, True, False]


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        summary_loss(torch.ones(2, 3), torch.ones(2, 4))


@pytest.mark.parametrize(("student", "teacher"), [(7, 16), (16, 7), (8, 8)])
def test_the_smaller_grid_is_resized_to_the_larger(student: int, teacher: int) -> None:
    s, t = torch.randn(2, student, student, 5), torch.randn(2, teacher, teacher, 5)
    matched_s, matched_t = match_grids(s, t)
    side = max(student, teacher)
    assert matched_s.shape == matched_t.shape == (2, side, side, 5)
    if student >= teacher:
        assert matched_s is s
    if teacher >= student:
        assert matched_t is t


@pytest.mark.parametrize(("before", "side"), [(4, 7), (3, 8), (1, 2), (16, 18)])
def test_resizing_is_bicubic_per_channel(before: int, side: int) -> None:
    """Against a slow bicubic (a = -0.75, half-pixel centres, edges repeated), one channel at a time."""
    tokens = torch.randn(2, before, before, 3, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        resized = resize_grid(tokens.bfloat16(), side)
    assert resized.dtype == torch.float32
    for view, channel in product(range(2), range(3)):
        expected = slow_bicubic(tokens.bfloat16()[view, :, :, channel].double().numpy(), side)
        np.testing.assert_allclose(resized[view, :, :, channel].numpy(), expected, atol=1e-5)


def slow_bicubic(image: np.ndarray, side: int) -> np.ndarray:
    n = len(image)

    def weight(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    matrix = np.zeros((side, n))
    for i in range(side):
        centre = (i + 0.5) * n / side - 0.5
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[i, min(max(tap, 0), n - 1)] += weight(centre - tap)
    return matrix @ image @ matrix.T
