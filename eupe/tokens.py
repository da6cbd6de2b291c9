"""Inputs and outputs of every encoder, in torch alone: model libraries take seconds to import.

Shapes: B batch, C channels, H W pixels, h w cells of the dense grid, D width of a dense token, Ds width of the summary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Outputs of an encoder for a batch of pictures."""

    summary: Tensor | None
    """[B, Ds]; None if the encoder has no summary."""
    dense: Tensor
    """[B, h, w, D], row by row from the top left."""


def normalise(views_u8_BHWC: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return uint8 [B, H, W, C] pictures as normalised float32 [B, C, H, W], on the same device."""
    assert views_u8_BHWC.dtype == torch.uint8
    device = views_u8_BHWC.device
    pixels = views_u8_BHWC.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 255
    mean_C11 = torch.tensor(mean, device=device).view(-1, 1, 1)
    std_C11 = torch.tensor(std, device=device).view(-1, 1, 1)
    return (pixels - mean_C11) / std_C11
