"""What a training step is given: views, and their targets as they are stored."""

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
    """Features of B views as they are stored; decoded on the device that uses them."""

    stored: Tensor
    """float16 [B, ..., D], or int8 [B, ..., D + 2] with the token's float16 scale in the last two."""
    mean: Tensor | None = None
    std: Tensor | None = None
    """float32 [D], the calibration of int8; None for float16."""

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
        """As the teacher gave them, float32 [B, ..., D]."""
        if self.mean is None or self.std is None:
            return self.stored.float()
        return self._scaled().mul_(self.std).add_(self.mean)

    def standardised(self, mean: Tensor, std: Tensor) -> Tensor:
        """(tokens - mean) / std, float32 [B, ..., D], with as few passes over them as the precision allows.

        Args:
            mean, std: float32 [D].
        """
        if self.mean is None or self.std is None:
            return _float_like(self.stored).sub_(mean).div_(std)
        return self._scaled().mul_(self.std / std).add_((self.mean - mean) / std)

    def _scaled(self) -> Tensor:
        """int8 times its scale: tokens standardised by the calibration, float32 [B, ..., D]."""
        scale = self.stored[..., -2:].contiguous().view(torch.float16).float()
        return _float_like(self.stored[..., :-2]).mul_(scale)


def _float_like(tokens: Tensor) -> Tensor:
    """A float32 copy of [B, ..., D], channels before cells as they are stored.

    On a CPU in memory of NumPy's, which the system backs with large pages; torch's is faulted in anew for every batch.
    """
    channels_first = tokens.movedim(-1, 1)
    if tokens.device.type != "cpu":
        return channels_first.to(torch.float32, memory_format=torch.contiguous_format).movedim(1, -1)
    floats = torch.from_numpy(np.empty(channels_first.shape, np.float32))
    return floats.copy_(channels_first).movedim(1, -1)


@dataclass(frozen=True)
class TargetBatch:
    """One target's features for B views, as stored: not normalised."""

    size: int
    """Side in pixels of what the teacher saw."""
    summary: TargetTokens | None
    """Of width Ds, [B, Ds] once decoded."""
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
    """B views of one corpus, and how they are wanted."""

    views: Views
    size: int
    """Side of the student's pixels."""
    target_sizes: tuple[int, ...] = ()
    """Per store; each store's first where empty."""
    corpus: int = 0
    step: int = 0
    first: int = 0
    """Place of the first of these views in the batch of the step, over all workers."""
    colours_seed: int | None = None
    """The student's views are recoloured, by this seed and the step."""
    colours_by_view: bool = True
    """Two views of one picture get colours of their own; the same in runs of the first method."""


@dataclass(frozen=True)
class Batch:
    """B views and their targets."""

    request: Request
    pixels: Tensor
    """uint8 [B, S, S, 3]: the views themselves."""
    targets: tuple[TargetBatch, ...]
    """One per store, in the order given."""
    keys: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """Copied to a device without waiting, where the memory is pinned."""
        if device.type == "cpu":
            return self
        pixels = self.pixels.to(device, non_blocking=True)
        return replace(self, pixels=pixels, targets=tuple(target.to(device) for target in self.targets))

    def pinned(self) -> Batch:
        """In page-locked memory, from which a GPU copies by itself."""
        targets = tuple(target.pinned() for target in self.targets)
        return replace(self, pixels=self.pixels.pin_memory(), targets=targets)

    def tensors(self) -> list[Tensor]:
        """All of them, wherever they lie."""
        return [self.pixels, *(tensor for target in self.targets for tensor in target.tensors())]
