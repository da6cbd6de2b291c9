"""The learning rate of each step."""

from __future__ import annotations

import math

LR_SCALINGS = ("sqrt",)


def peak_rate(lr: float, *, scaling: str | None, batch_size: int) -> float:
    """Return the peak of the learning rate.

    Args:
        scaling: `sqrt` if `lr` is a base rate for a batch of 64; None to take `lr` as it is.
    Source: `scaling_rule: sqrt_wrt_1024` of DINOv3's and EUPE's released configurations.
    """
    return lr if scaling is None else lr * 4 * math.sqrt(batch_size / 1024)


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate: linear warm-up to `peak`, then half a cosine to 0 at `total_steps`.

    Args:
        step: 0-based; the update about to be made.
    """
    if step < warmup_steps:
        # step + 1, so that the first step has a rate above 0
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
