"""Interpolation by matrices is PyTorch's own, and so is its gradient."""

import pytest
import torch
import torch.nn.functional as F

from eupe.common.resize import interpolation_matrix


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("before", "after"), [((3, 5), (8, 7)), ((1, 4), (6, 4)), ((9, 8), (4, 30))])
def test_two_matrices_interpolate(mode: str, before: tuple[int, int], after: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *before, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rows, columns = (
        interpolation_matrix(old, new, mode=mode, device=images.device) for old, new in zip(before, after, strict=True)
    )
    ours = rows @ images @ columns.T
    theirs = F.interpolate(images, size=after, mode=mode, align_corners=False)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    pushed = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
    (our_gradient,) = torch.autograd.grad(ours, images, pushed)
    (their_gradient,) = torch.autograd.grad(theirs, images, pushed)
    torch.testing.assert_close(our_gradient, their_gradient, atol=1e-5, rtol=1e-5)
