"""The input of one training step: views, and their targets as they are stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from eupe.store.reader import Tokens
from eupe.train.sampling import Views


@dataclass(frozen=True)
class TargetTokens:
    """Target tokens of B views as they are stored; they are decoded on the device that uses them."""

    stored: Tensor
    """float16 [B, ..., D]; or int8 [B, ..., D + 2], whose last two values are the token's float16 scale."""
    mean: Tensor | None = None
    std: Tensor | None = None
    """`mean` and `std`: float32 [D], the calibration of int8 tokens; None for float16."""

    @classmethod
    def of(cls, tokens: Tokens) -> TargetTokens:
        stored, calibration = torch.from_numpy(tokens.stored), tokens.calibration
        if calibration is None:
            return cls(stored)
        return cls(stored, torch.from_numpy(calibration.mean), torch.from_numpy(calibration.std))

    def to(self, device: torch.device) -> TargetTokens:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> TargetTokens:
        return self._each(Tensor.pin_memory)

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.stored, self.mean, self.std) if tensor is not None]

    def _each(self, move: Callable[[Tensor], Tensor]) -> TargetTokens:
        mean, std = (None if x is None else move(x) for x in (self.mean, self.std))
        return TargetTokens(move(self.stored), mean, std)

    def decode(self) -> Tensor:
        """Return the tokens as the teacher gave them, float32 [B, ..., D]."""
        if self.mean is None or self.std is None:
            return self.stored.float()
        return self._scaled().mul_(self.std).add_(self.mean)

    def standardised(self, mean: Tensor, std: Tensor) -> Tensor:
        """Return (tokens - mean) / std as float32 [B, ..., D], in as few passes over memory as the precision allows.

        Args:
            mean, std: float32 [D].
        """
        if self.mean is None or self.std is None:
            return _float_like(self.stored).sub_(mean).div_(std)
        # calibration and normalisation are folded into one factor and one offset, to save two passes
        return self._scaled().mul_(self.std / std).add_((self.mean - mean) / std)

    def _scaled(self) -> Tensor:
        """Return the int8 values times their scale: tokens standardised by the calibration, float32 [B, ..., D]."""
        # view() needs a contiguous last axis, which channel-first tokens do not have
        scale = self.stored[..., -2:].contiguous().view(torch.float16).float()
        return _float_like(self.stored[..., :-2]).mul_(scale)


def _float_like(tokens: Tensor) -> Tensor:
    """Return a float32 copy of [B, ..., D] that keeps the channel-first memory layout of the stored tokens.

    On a CPU its memory comes from NumPy, which the system backs with huge pages; torch's memory would be page-faulted
    again for every batch.
    """
    channels_first = tokens.movedim(-1, 1)
    if tokens.device.type != "cpu":
        return channels_first.to(torch.float32, memory_format=torch.contiguous_format).movedim(1, -1)
    floats = torch.from_numpy(np.empty(channels_first.shape, np.float32))
    return floats.copy_(channels_first).movedim(1, -1)


@dataclass(frozen=True)
class TargetBatch:
    """One target's features for B views as they are stored, not normalised."""

    size: int
    """Side of the teacher's input in pixels."""
    summary: TargetTokens | None
    """[B, Ds] once decoded; Ds is the summary's width."""
    dense: TargetTokens | None
    """[B, h, w, D] once decoded."""

    def to(self, device: torch.device) -> TargetBatch:
        return self._each(lambda tokens: tokens.to(device))

    def pinned(self) -> TargetBatch:
        return self._each(TargetTokens.pinned)

    def tensors(self) -> list[Tensor]:
        return [x for tokens in (self.summary, self.dense) if tokens is not None for x in tokens.tensors()]

    def _each(self, move: Callable[[TargetTokens], TargetTokens]) -> TargetBatch:
        return TargetBatch(self.size, *(None if t is None else move(t) for t in (self.summary, self.dense)))


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request for B views of one corpus."""

    views: Views
    size: int
    """Side of the student's input in pixels."""
    target_sizes: tuple[int, ...] = ()
    """Size of each store's features; each store's first size if empty."""
    corpus: int = 0
    step: int = 0
    first: int = 0
    """Position of the first of these views in the step's global batch."""
    colours_seed: int | None = None
    """Seed for recolouring the student's views, together with the step; None leaves their colours."""
    colours_by_view: bool = True
    """Whether the views of one picture get different colours; False in runs of method 1."""


@dataclass(frozen=True)
class Batch:
    """B views and their targets."""

    request: Request
    pixels: Tensor
    """uint8 [B, S, S, 3]: the rendered views."""
    targets: tuple[TargetBatch, ...]
    """One per store, in the order in which the stores were given."""
    keys: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device; from pinned memory, without waiting for the copy."""
        if device.type == "cpu":
            return self
        pixels = self.pixels.to(device, non_blocking=True)
        return replace(self, pixels=pixels, targets=tuple(target.to(device) for target in self.targets))

    def pinned(self) -> Batch:
        """Return a copy in page-locked memory, from which a GPU copies asynchronously."""
        targets = tuple(target.pinned() for target in self.targets)
        return replace(self, pixels=self.pixels.pin_memory(), targets=targets)

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the batch, whatever device they are on."""
        return [self.pixels, *(tensor for target in self.targets for tensor in target.tensors())]
