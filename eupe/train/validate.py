"""How well a student predicts targets that it never trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eupe.device import autocast
from eupe.encoder import Encoder, normalise
from eupe.store import Store
from eupe.store.layout import DENSE, SUMMARY
from eupe.train.losses import dense_loss, match_grids, summary_loss
from eupe.train.targets import Batch, TargetBatch

Predictions = list[tuple[Tensor | None, Tensor | None]]
"""Per target: summary [B, Ds] and dense [B, h, w, D], normalised, dense on the student's grid."""


@dataclass(frozen=True)
class Normaliser:
    """One kind of token of one target: to and from zero mean and unit variance per channel."""

    mean: Tensor
    std: Tensor
    """float32 [D]; 1 for a channel that never changes."""

    def __call__(self, stored: Tensor) -> Tensor:
        """float16 [..., D] as stored, to float32 as the loss sees it."""
        return (stored.float() - self.mean) / self.std

    def inverse(self, normalised: Tensor) -> Tensor:
        """A head's output [..., D] as the teacher would have said it, float32."""
        return normalised.float() * self.std + self.mean


def normalisers(store: Store, device: torch.device) -> dict[str, Normaliser]:
    """By kind of token, from the store's statistics at its first size."""
    made = {}
    for kind in store.spec.tokens:
        stats = store.stats(store.spec.sizes[0], kind)
        mean = torch.tensor(stats.mean, dtype=torch.float32, device=device)
        std = torch.tensor(stats.std, dtype=torch.float32, device=device)
        made[kind] = Normaliser(mean, torch.where(std > 0, std, 1.0))
    return made


class Distiller(nn.Module):
    """The student, one pair of heads per target, and the targets' normalisers: from a batch to losses."""

    def __init__(
        self, encoder: Encoder, heads: nn.ModuleList, norms: list[dict[str, Normaliser]], *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = heads
        self.norms = norms
        self.dtype = dtype

    def predict(self, pixels_u8_BSSC: Tensor) -> Predictions:
        """Every target's tokens, predicted from views."""
        card = self.encoder.card
        with autocast(self.dtype, pixels_u8_BSSC.device):
            tokens = self.encoder(normalise(pixels_u8_BSSC, card.mean, card.std))
            return [head(tokens) for head in self.heads]

    def forward(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Per target, the loss of each kind of token: float32 scalars."""
        return [
            target_losses(prediction, target, norms)
            for prediction, target, norms in zip(self.predict(batch.pixels), batch.targets, self.norms, strict=True)
        ]


def target_losses(
    prediction: tuple[Tensor | None, Tensor | None], target: TargetBatch, norms: dict[str, Normaliser]
) -> dict[str, Tensor]:
    """The paper's losses for one target, on normalised features and the larger of the two grids."""
    summary, dense = prediction
    losses: dict[str, Tensor] = {}
    if summary is not None and target.summary is not None:
        losses[SUMMARY] = summary_loss(summary, norms[SUMMARY](target.summary))
    if dense is not None and target.dense is not None:
        losses[DENSE] = dense_loss(*match_grids(dense, norms[DENSE](target.dense)))
    return losses


@dataclass
class Cosines:
    """Sums over held-out views of one kind of token of one target."""

    normalised: float = 0.0
    """Cosine in the loss's space: 0 for the mean-feature predictor, by construction."""
    raw: float = 0.0
    """Cosine between features as the teacher gives them."""
    mean_raw: float = 0.0
    """The same for the predictor that always says the store's mean."""
    views: int = 0

    def add(self, predicted: Tensor, stored: Tensor, norm: Normaliser) -> None:
        """Both [B, ..., D] on one grid; `predicted` normalised, `stored` raw."""
        raw = stored.float()
        self.views += len(raw)
        share = len(raw)
        self.normalised += share * _mean_cosine(predicted, norm(raw))
        self.raw += share * _mean_cosine(norm.inverse(predicted), raw)
        self.mean_raw += share * _mean_cosine(norm.mean.expand_as(raw), raw)

    def means(self) -> dict[str, float]:
        """Averages over the views."""
        names = ("normalised", "raw", "mean_raw")
        return {name: getattr(self, name) / self.views for name in names}


def _mean_cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.float(), b, dim=-1).mean())


@torch.inference_mode()
def held_out_cosines(
    distiller: Distiller,
    batches: Iterable[Batch],
    device: torch.device,
    *,
    on_summary: Callable[[int, Tensor, Tensor], None] = lambda target, predicted, stored: None,
) -> list[dict[str, Cosines]]:
    """Per target and kind of token, over all batches. Leaves the modules in the mode they were in.

    Args:
        on_summary: called per batch and target with the predicted summaries, denormalised, and the stored ones.
    """
    was_training = distiller.training
    distiller.eval()
    totals: list[dict[str, Cosines]] = [{kind: Cosines() for kind in norms} for norms in distiller.norms]
    for batch in batches:
        moved = batch.to(device)
        for i, (prediction, target) in enumerate(zip(distiller.predict(moved.pixels), moved.targets, strict=True)):
            norms, (summary, dense) = distiller.norms[i], prediction
            if summary is not None and target.summary is not None:
                totals[i][SUMMARY].add(summary, target.summary, norms[SUMMARY])
                on_summary(i, norms[SUMMARY].inverse(summary), target.summary.float())
            if dense is not None and target.dense is not None:
                matched, stored = match_grids(dense.float(), target.dense.float())
                totals[i][DENSE].add(matched, stored, norms[DENSE])
    distiller.train(was_training)
    return totals
