"""Statistics of a part, taken on the teacher's GPU to leave the cores to decoding and compressing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray

from eupe.common.compute import is_out_of_memory
from eupe.store.stats import Counted, Moments

FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
"""Compute capabilities with float64 at half of float32's rate (P100, V100, A100, H100, B200); others 1/32 or less."""


def counter(device: torch.device) -> Callable[[NDArray[Any]], Counted]:
    """Return the function that takes a part's statistics: on a GPU that is fast at float64, otherwise on the CPU."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) in FAST_FLOAT64:
        return partial(_count_where_there_is_room, device=device)
    return Counted.of


_one_at_a_time = threading.Lock()  # so that one float64 copy at a time is on the device, which the teacher shares


def _count_where_there_is_room(tokens: NDArray[Any], device: torch.device) -> Counted:
    """Count on the device, or on the CPU if the teacher leaves too little memory."""
    try:
        with _one_at_a_time:
            return count_on(tokens, device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return Counted.of(tokens)


def count_on(tokens: NDArray[Any], device: torch.device) -> Counted:
    """Compute `Counted.of` with torch on a device; equal except for the last bits.

    Args:
        tokens: [views, ..., D]; NaN in views without features.
    """
    exact = torch.from_numpy(tokens).to(device).double()
    norms = torch.linalg.vector_norm(exact, dim=-1)
    there = norms.flatten(1).isfinite().all(dim=1) if norms.ndim > 1 else norms.isfinite()
    vectors = exact[there].reshape(-1, tokens.shape[-1])
    kept = norms[there].cpu().numpy()
    if not len(vectors):
        return Counted.given(Moments.empty(tokens.shape[-1]), kept)
    mean = vectors.mean(dim=0)
    centred = vectors - mean
    moments = Moments(len(vectors), mean.cpu().numpy(), (centred.T @ centred).cpu().numpy())
    return Counted.given(moments, kept)
