"""Rotary positions of DINOv3 whose grid stays dynamic in a traced graph; timm's own are traced for one size only.

Shapes: h w cells, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import RotaryEmbeddingDinoV3
from torch import Tensor, nn


class TracedRotary(nn.Module):
    """A `RotaryEmbeddingDinoV3` in evaluation mode that computes with tensors instead of Python numbers."""

    periods: Tensor

    def __init__(self, rope: RotaryEmbeddingDinoV3) -> None:
        super().__init__()
        self.register_buffer("periods", rope.periods)
        self.offset = rope.grid_offset
        self.is_x_first = rope.grid_indexing == "xy"
        self.is_split = rope.rotate_half

    def get_embed(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Return the sines and cosines [h * w, 2 D] of a grid of h x w cells."""
        down, across = (_centred(cells, self.offset) for cells in shape)
        y, x = torch.meshgrid(down, across, indexing="ij")
        coordinates = torch.stack((x, y) if self.is_x_first else (y, x), dim=-1).flatten(0, 1)
        angles = (2 * math.pi * coordinates[:, :, None] / self.periods).flatten(1)
        waves = [angles.sin(), angles.cos()]
        spread = [wave.tile(2) if self.is_split else wave.repeat_interleave(2, dim=-1) for wave in waves]
        return torch.cat(spread, dim=-1).to(dtype)


def _centred(cells: int, offset: float) -> Tensor:
    """Return the centre of each cell, in coordinates from -1 to 1 over the whole side."""
    return 2 * (torch.arange(cells, dtype=torch.float32) + 0.5 + offset) / cells - 1


@contextmanager
def traced_rotary(model: Any) -> Iterator[None]:
    """Give a timm model rotary positions that can be traced for any size, until the context ends."""
    rope = getattr(model, "rope", None)
    if not isinstance(rope, RotaryEmbeddingDinoV3) or rope.normalize_coords != "separate":
        yield
        return
    model.rope = TracedRotary(rope)
    try:
        yield
    finally:
        model.rope = rope
