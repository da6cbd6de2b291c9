"""The student with its heads, which turns a batch into losses, and the average of its weights.

The heads are not part of the exported student.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from eupe.common.compute import Tokens, autocast, compute_dtype, normalise
from eupe.models.encoder import Encoder, build_encoder, keep_batch_norms
from eupe.store.layout import DENSE, KINDS, SUMMARY, layer_kind
from eupe.train.config import BANK_SIZE, BANK_TEMPERATURE, FROZEN_NORMS
from eupe.train.layers import LAST, LAYERS, Pair, pairs_of
from eupe.train.losses import dense_loss, draws, keep_teachers, match_grids, summary_loss
from eupe.train.normalise import Normaliser, normalisers
from eupe.train.relations import BANK, RELATIONS, related, summary_bank
from eupe.train.run_spec import RunSpec, loss_weights, method_of
from eupe.train.targets import Batch, Request, TargetBatch, TargetSet


class AdapterHead(nn.Sequential):
    """A head from [..., in_dim] to [..., out_dim]: linear (no bias), LayerNorm, GELU, linear (no bias).

    Source: EUPE, arXiv 2603.22387, adapter heads; hidden width 1536 for the proxy, 3072 for students.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__(
            nn.Linear(in_dim, hidden_dim, bias=False),
            nn.LayerNorm(hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, out_dim, bias=False),
        )


class TargetHeads(nn.Module):
    """The heads of one target: for the summary, for dense tokens, and for each map of an earlier layer.

    A width of 0 leaves that head out.
    """

    def __init__(
        self, student: tuple[int, int], target: tuple[int, int], hidden_dim: int, pairs: Sequence[Pair] = ()
    ) -> None:
        """Build the heads; `student` and `target` are (summary width, dense width)."""
        super().__init__()
        self.pairs = pairs
        self.summary = AdapterHead(student[0], hidden_dim, target[0]) if target[0] else None
        self.dense = AdapterHead(student[1], hidden_dim, target[1]) if target[1] else None
        heads = {pair.name: AdapterHead(pair.width, hidden_dim, pair.dim) for pair in pairs}
        # without pairs no module at all, so that the other heads are numbered as ever
        self.layers = nn.ModuleDict(heads) if heads else None

    def forward(self, tokens: Tokens) -> tuple[Tensor | None, Tensor | None]:
        """Predict the target's summary [B, Ds] and dense tokens [B, h, w, D], on the student's grid."""
        summary = None if self.summary is None else self.summary(tokens.summary)
        dense = None if self.dense is None else self.dense(tokens.dense)
        return summary, dense

    def layer_maps(self, tokens: Tokens) -> dict[str, Tensor]:
        """Predict the target's maps [B, h, w, D] of each pair, by its name, on the grid of the student's layer."""
        if self.layers is None:
            return {}
        return {pair.name: self.layers[pair.name](tokens.layers[pair.student]) for pair in self.pairs}


Predictions = list[tuple[Tensor | None, Tensor | None]]
"""Per target: summary [B, Ds] and dense [B, h, w, D], both normalised, dense on the student's grid."""


Banks = list[dict[int, Tensor]]
"""Per target and input size: normalised summaries [N, Ds] of other views; empty for a target without summary."""


@dataclass(frozen=True)
class Losses:
    """Losses of one batch of B views."""

    total: Tensor
    """float32 scalar with gradient: weighted losses, summed over targets and kinds, averaged over views."""
    each: list[dict[str, Tensor]]
    """Per target and kind of token or relation: the mean over views, not weighted, without gradient."""


class Distiller(nn.Module):
    """The student, one pair of heads per target, and the targets' normalisers."""

    def __init__(
        self,
        spec: RunSpec,
        encoder: Encoder,
        norms: list[dict[int, dict[str, Normaliser]]],
        *,
        dtype: torch.dtype,
        banks: Banks | None = None,
    ) -> None:
        """Build the heads for a student and the targets of a spec.

        Args:
            norms: normalisers per target, by input size and kind of token.
            banks: see `summary_banks`; None if the spec has no such loss.
        """
        super().__init__()
        self.encoder = encoder
        widths = (encoder.spec.summary_dim, encoder.spec.dense_dim)
        self.heads = nn.ModuleList(
            TargetHeads(
                widths, (target["summary_dim"], target["dense_dim"]), spec.config["head_width"], pairs_of(target)
            )
            for target in spec.targets
        )
        self.pairs = [pairs_of(target) for target in spec.targets]
        """Per target: which maps of the student learn from which of its layers."""
        self._layers = sorted({pair.student for pairs in self.pairs for pair in pairs})
        self.norms = norms
        self.banks = banks or [{} for _ in norms]
        self.dtype = dtype
        self.memory_format = torch.contiguous_format
        """Memory format of the encoder's input."""
        self.encoder_frozen = False
        """Whether the encoder is a fixed function at present: the heads alone are trained."""
        self.batch_norms_frozen = spec.config.get("batch_norms") == FROZEN_NORMS
        """Whether the encoder's batch norms keep their running statistics, and use them in training."""
        self._config = spec.config
        self._weights = loss_weights(spec)
        self._relations = {name: weight for name in RELATIONS if (weight := spec.config.get(name))}
        # all pairs of a target together weigh as much as one kind of token
        self._factors = [
            weights | self._relations | {pair.name: weights[LAYERS] / len(pairs) for pair in pairs}
            for weights, pairs in zip(self._weights, self.pairs, strict=True)
        ]

    def use_memory_format(self, memory_format: torch.memory_format) -> None:
        """Lay out the encoder's weights and inputs in a memory format, which changes its speed and its rounding."""
        self.encoder.to(memory_format=memory_format)
        self.memory_format = memory_format

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules; a frozen encoder, and batch norms that are frozen, stay in evaluation mode.

        These batch norms use the running statistics that belong to the encoder's weights, and leave them as they are.
        So the heads learn from the features that the encoder is known for, whatever the statistics of these views.
        """
        super().train(mode)
        if self.encoder_frozen:
            self.encoder.eval()
        if self.batch_norms_frozen:
            keep_batch_norms(self.encoder)
        return self

    @property
    def kinds(self) -> list[list[str]]:
        """Return, per target, the kinds of token that it has."""
        return [[kind for kind in weights if kind in KINDS] for weights in self._weights]

    def predict(self, pixels_u8_BSSC: Tensor) -> Predictions:
        """Predict every target's tokens from views."""
        with autocast(self.dtype, pixels_u8_BSSC.device):
            tokens = self._tokens(pixels_u8_BSSC)
            return [head(tokens) for head in self.heads]

    def _tokens(self, pixels_u8_BSSC: Tensor, layers: Sequence[int] = ()) -> Tokens:
        spec = self.encoder.spec
        pixels = normalise(pixels_u8_BSSC, spec.mean, spec.std, memory_format=self.memory_format)
        # as one argument where there is no other: a compiled encoder is compiled for what it gets
        tokens: Tokens = self.encoder(pixels, layers) if layers else self.encoder(pixels)
        return tokens

    def _predicted(self, pixels_u8_BSSC: Tensor) -> tuple[Tokens, Predictions, list[dict[str, Tensor]]]:
        """Return the student's tokens, and per target the predictions of its tokens, and of maps of its layers."""
        with autocast(self.dtype, pixels_u8_BSSC.device):
            tokens = self._tokens(pixels_u8_BSSC, self._layers)
            maps = [heads.layer_maps(tokens) for heads in self.heads if isinstance(heads, TargetHeads)]
            return tokens, [heads(tokens) for heads in self.heads], maps

    def forward(self, batch: Batch) -> Losses:
        """Compute the losses of a batch on this device."""
        tokens, predictions, maps = self._predicted(batch.pixels)
        per_view = []
        for i, (prediction, target, norms, banks) in enumerate(
            zip(predictions, batch.targets, self.norms, self.banks, strict=True)
        ):
            teacher = normalised(target, norms[target.size])
            losses = target_losses(prediction, teacher)
            losses |= {
                pair.name: dense_loss(*match_grids(maps[i][pair.name], teacher[pair.kind])) for pair in self.pairs[i]
            }
            if self._relations:
                bank, heat = banks.get(target.size), self._config["bank_temperature"] or BANK_TEMPERATURE
                losses |= related(self._relations, tokens, prediction[0], teacher, bank, temperature=heat)
            per_view.append(losses)
        weighted_TB = torch.stack(
            [
                torch.stack([weights[name] * loss_B for name, loss_B in losses.items()]).sum(dim=0)
                for losses, weights in zip(per_view, self._factors, strict=True)
            ]
        )
        if self._config["drop"]:
            weighted_TB = weighted_TB * self._kept(weighted_TB.detach(), batch.request)
        each = [{name: loss_B.detach().mean() for name, loss_B in losses.items()} for losses in per_view]
        return Losses(weighted_TB.sum(dim=0).mean(), each)

    def _kept(self, losses_TB: Tensor, request: Request) -> Tensor:
        config, (num_targets, num_views) = self._config, losses_TB.shape
        # drawn for the whole batch, so that the split over workers and microbatches does not matter
        mine = slice(request.first, request.first + num_views)
        drawn = draws(config["seed"], request.step, num_targets, mine, config["batch_size"])
        return keep_teachers(losses_TB, drawn.to(losses_TB.device), drop=config["drop"])


def build_distiller(spec: RunSpec, targets: TargetSet, device: torch.device) -> Distiller:
    """Build student and heads as at step 0, in evaluation mode; seed torch's generators with the run's seed."""
    # every worker must draw the same weights: FSDP2 does not broadcast them
    torch.manual_seed(spec.config["seed"])
    encoder = build_encoder(spec.config["student"], size=spec.size)
    norms = [
        {
            size: normalisers(
                store,
                size,
                device,
                spec.config["normalise"],
                floored=method_of(spec) > 1,
                layers={pair.layer for pair in pairs_of(target)} - {LAST},
            )
            for size in sizes
        }
        for store, sizes, target in zip(targets.stores, spec.target_sizes, spec.targets, strict=True)
    ]
    dtype = compute_dtype(spec.config["dtype"], device)
    banks = summary_banks(spec, targets, norms) if spec.config.get(BANK) else None
    return Distiller(spec, encoder, norms, dtype=dtype, banks=banks).to(device).eval()


def summary_banks(spec: RunSpec, targets: TargetSet, norms: list[dict[int, dict[str, Normaliser]]]) -> Banks:
    """Draw a bank of cached summaries for each target that has any, and each size, normalised."""
    count, seed = spec.config["bank_size"] or BANK_SIZE, spec.config["seed"]
    return [
        {
            size: kinds[SUMMARY](
                summary_bank(targets, i, size, count=count, seed=seed).to(kinds[SUMMARY].centre.device)
            )
            for size, kinds in sizes.items()
            if SUMMARY in kinds
        }
        for i, sizes in enumerate(norms)
    ]


def normalised(target: TargetBatch, norms: dict[str, Normaliser]) -> dict[str, Tensor]:
    """Return a target's tokens as the losses compare them, by kind: [B, Ds] and [B, h, w, D]."""
    stored = {SUMMARY: target.summary, DENSE: target.dense}
    stored |= {layer_kind(number): tokens for number, tokens in target.layers.items()}
    return {kind: norms[kind](tokens) for kind, tokens in stored.items() if tokens is not None}


def target_losses(prediction: tuple[Tensor | None, Tensor | None], teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the paper's losses for one target, float32 [B] each, dense ones on the larger of the two grids.

    Args:
        teacher: the target's normalised tokens by kind.
    """
    summary, dense = prediction
    losses: dict[str, Tensor] = {}
    if summary is not None and SUMMARY in teacher:
        losses[SUMMARY] = summary_loss(summary, teacher[SUMMARY])
    if dense is not None and DENSE in teacher:
        losses[DENSE] = dense_loss(*match_grids(dense, teacher[DENSE]))
    return losses


class Ema:
    """Averages, in float32, of every floating-point parameter and buffer, including BatchNorm's running statistics."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Start from the module's current values."""
        self.decay = decay
        # the module's live tensors, so that `update` and `applied` see and set its current values
        state = module.state_dict(keep_vars=True)
        self._values = {name: value.detach() for name, value in state.items() if value.is_floating_point()}
        self._averages = {name: value.float().clone() for name, value in self._values.items()}
        # torch._foreach functions do not take sharded and whole tensors together
        spread = {name for name, value in self._values.items() if isinstance(value, DTensor)}
        self._alike = [sorted(names) for names in (spread, self._values.keys() - spread) if names]

    def update(self, step: int | None = None) -> None:
        """Update the averages: average = decay * average + (1 - decay) * value.

        Args:
            step: number of the update, from 0; the decay rises with it as (1 + step) / (10 + step), up to `decay`. The
                random initial values are then forgotten at once, while a fixed 0.9999 keeps a third of them for 10,000
                steps. None for a fixed decay. Source: `num_updates` of TensorFlow's ExponentialMovingAverage.
        """
        decay = self.decay if step is None else min(self.decay, (1 + step) / (10 + step))
        for names in self._alike:
            averages = [self._averages[name] for name in names]
            torch._foreach_lerp_(averages, [self._values[name].float() for name in names], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the module for a while; afterwards its own values are back, bit for bit."""
        own = {name: value.clone() for name, value in self._values.items()}
        _copy(self._averages, self._values)
        try:
            yield
        finally:
            _copy(own, self._values)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages by the module's names."""
        return dict(self._averages)


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, value in source.items():
        target[name].copy_(value)
