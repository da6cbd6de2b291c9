"""Validation: how well a student predicts targets that it never trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eupe.store.layout import DENSE, SUMMARY
from eupe.train.losses import match_grids
from eupe.train.model import Distiller
from eupe.train.normalise import Normaliser
from eupe.train.targets import Batch


@dataclass
class Cosines:
    """Sums over held-out views, for one kind of token of one target."""

    normalised: float = 0.0
    """Cosine in the loss's space; the mean feature has 0 by construction (not with normalisation `none`)."""
    raw: float = 0.0
    """Cosine between features as the teacher gives them, with the prediction scaled by its gain."""
    mean_raw: float = 0.0
    """The same for a predictor that always returns the store's mean."""
    views: int = 0

    def add(self, predicted: Tensor, stored: Tensor, norm: Normaliser, gain: float) -> None:
        """Add B views; both tensors are [B, ..., D] on one grid, `predicted` normalised and `stored` raw."""
        num_views = len(stored)
        self.views += num_views
        self.normalised += num_views * _mean_cosine(predicted, norm(stored))
        self.raw += num_views * _mean_cosine(norm.inverse(gain * predicted), stored)
        self.mean_raw += num_views * _mean_cosine(norm.mean.expand_as(stored), stored)

    def means(self) -> dict[str, float]:
        """Return the averages over the views."""
        return {name: getattr(self, name) / self.views for name in ("normalised", "raw", "mean_raw")}


def _mean_cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.float(), b, dim=-1).mean())


Gains = list[dict[str, float]]
"""Factors of the predictions, per target and kind of token."""


def fit_gains(distiller: Distiller, batches: Iterable[Batch], device: torch.device) -> Gains:
    """Fit the factors that bring predictions nearest to the normalised targets, by least squares over training views.

    A head that is trained by cosine predicts a direction, but no length; undoing the normalisation needs one.
    """
    dots: list[dict[str, float]] = [dict.fromkeys(kinds, 0.0) for kinds in distiller.kinds]
    squares: list[dict[str, float]] = [dict.fromkeys(kinds, 0.0) for kinds in distiller.kinds]
    for i, kind, predicted, stored, norm in pairs(distiller, batches, device):
        dots[i][kind] += float((predicted * norm(stored)).sum())
        squares[i][kind] += float(predicted.square().sum())
    return [{kind: dots[i][kind] / squares[i][kind] for kind in kinds} for i, kinds in enumerate(dots)]


def held_out_cosines(
    distiller: Distiller,
    batches: Iterable[Batch],
    device: torch.device,
    gains: Gains,
    *,
    on_tokens: Callable[[int, str, Tensor, Tensor], None] | None = None,
) -> list[dict[str, Cosines]]:
    """Return the cosines per target and kind of token, summed over all batches.

    Args:
        on_tokens: called per batch, target and kind with the predicted tokens in the teacher's own space and the stored
            ones, on one grid.
    """
    totals: list[dict[str, Cosines]] = [{kind: Cosines() for kind in kinds} for kinds in distiller.kinds]
    for i, kind, predicted, stored, norm in pairs(distiller, batches, device):
        gain = gains[i][kind]
        totals[i][kind].add(predicted, stored, norm, gain)
        if on_tokens is not None:
            on_tokens(i, kind, norm.inverse(gain * predicted), stored)
    return totals


@torch.inference_mode()
def pairs(
    distiller: Distiller, batches: Iterable[Batch], device: torch.device
) -> Iterator[tuple[int, str, Tensor, Tensor, Normaliser]]:
    """Yield target, kind, prediction (normalised) and stored features (raw), float32 on one grid, and their normaliser.

    Afterwards the modules are in their previous mode again.
    """
    was_training = distiller.training
    distiller.eval()
    for batch in batches:
        moved = batch.to(device)
        for i, (prediction, target) in enumerate(zip(distiller.predict(moved.pixels), moved.targets, strict=True)):
            summary, dense = prediction
            norms = distiller.norms[i][target.size]
            if summary is not None and target.summary is not None:
                yield i, SUMMARY, summary.float(), target.summary.decode(), norms[SUMMARY]
            if dense is not None and target.dense is not None:
                yield i, DENSE, *match_grids(dense.float(), target.dense.decode()), norms[DENSE]
    distiller.train(was_training)
