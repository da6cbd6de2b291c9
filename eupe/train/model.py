"""The student with its heads, which turns a batch into losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eupe.device import autocast, compute_dtype
from eupe.encoder import Encoder, build_encoder
from eupe.store.layout import DENSE, SUMMARY
from eupe.tokens import normalise
from eupe.train.batch import Batch, Request, TargetBatch
from eupe.train.card import RunCard, loss_weights, method_of
from eupe.train.dropping import draws, keep_teachers
from eupe.train.heads import TargetHeads
from eupe.train.losses import dense_loss, match_grids, summary_loss
from eupe.train.normalise import Normaliser, normalisers
from eupe.train.targets import TargetSet

Predictions = list[tuple[Tensor | None, Tensor | None]]
"""Per target: summary [B, Ds] and dense [B, h, w, D], both normalised, dense on the student's grid."""


@dataclass(frozen=True)
class Losses:
    """Losses of one batch of B views."""

    total: Tensor
    """float32 scalar with gradient: weighted losses, summed over targets and kinds, averaged over views."""
    each: list[dict[str, Tensor]]
    """Per target and kind of token: the mean over views, not weighted, without gradient."""


class Distiller(nn.Module):
    """The student, one pair of heads per target, and the targets' normalisers."""

    def __init__(
        self, card: RunCard, encoder: Encoder, norms: list[dict[int, dict[str, Normaliser]]], *, dtype: torch.dtype
    ) -> None:
        """Build the heads for a student and the targets of a card.

        Args:
            norms: normalisers per target, by input size and kind of token.
        """
        super().__init__()
        self.encoder = encoder
        widths = (encoder.card.summary_dim, encoder.card.dense_dim)
        self.heads = nn.ModuleList(
            TargetHeads(widths, (target["summary_dim"], target["dense_dim"]), card.config["head_width"])
            for target in card.targets
        )
        self.norms = norms
        self.dtype = dtype
        self._config = card.config
        self._weights = loss_weights(card)

    @property
    def kinds(self) -> list[list[str]]:
        """Return, per target, the kinds of token that it has."""
        return [list(weights) for weights in self._weights]

    def predict(self, pixels_u8_BSSC: Tensor) -> Predictions:
        """Predict every target's tokens from views."""
        card = self.encoder.card
        with autocast(self.dtype, pixels_u8_BSSC.device):
            tokens = self.encoder(normalise(pixels_u8_BSSC, card.mean, card.std))
            return [head(tokens) for head in self.heads]

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses of a batch on this device."""
        per_view = [
            target_losses(prediction, target, norms[target.size])
            for prediction, target, norms in zip(self.predict(batch.pixels), batch.targets, self.norms, strict=True)
        ]
        weighted_TB = torch.stack(
            [
                torch.stack([weights[kind] * loss_B for kind, loss_B in losses.items()]).sum(dim=0)
                for losses, weights in zip(per_view, self._weights, strict=True)
            ]
        )
        if self._config["drop"]:
            weighted_TB = weighted_TB * self._kept(weighted_TB.detach(), batch.request)
        each = [{kind: loss_B.detach().mean() for kind, loss_B in losses.items()} for losses in per_view]
        return Losses(weighted_TB.sum(dim=0).mean(), each)

    def _kept(self, losses_TB: Tensor, request: Request) -> Tensor:
        config, (num_targets, num_views) = self._config, losses_TB.shape
        # drawn for the whole batch, so that the split over workers and microbatches does not matter
        mine = slice(request.first, request.first + num_views)
        drawn = draws(config["seed"], request.step, num_targets, mine, config["batch_size"])
        return keep_teachers(losses_TB, drawn.to(losses_TB.device), drop=config["drop"])


def build_distiller(card: RunCard, targets: TargetSet, device: torch.device) -> Distiller:
    """Build student and heads as at step 0, in evaluation mode; seed torch's generators with the run's seed."""
    # every worker must draw the same weights: FSDP2 does not broadcast them
    torch.manual_seed(card.config["seed"])
    encoder = build_encoder(card.config["student"], size=card.size)
    norms = [
        {
            size: normalisers(store, size, device, card.config["normalise"], floored=method_of(card) > 1)
            for size in sizes
        }
        for store, sizes in zip(targets.stores, card.target_sizes, strict=True)
    ]
    dtype = compute_dtype(card.config["dtype"], device)
    return Distiller(card, encoder, norms, dtype=dtype).to(device).eval()


def target_losses(
    prediction: tuple[Tensor | None, Tensor | None], target: TargetBatch, norms: dict[str, Normaliser]
) -> dict[str, Tensor]:
    """Return the paper's losses for one target, float32 [B] each.

    They are computed on normalised features, dense ones on the larger of the two grids.
    """
    summary, dense = prediction
    losses: dict[str, Tensor] = {}
    if summary is not None and target.summary is not None:
        losses[SUMMARY] = summary_loss(summary, norms[SUMMARY](target.summary))
    if dense is not None and target.dense is not None:
        losses[DENSE] = dense_loss(*match_grids(dense, norms[DENSE](target.dense)))
    return losses
