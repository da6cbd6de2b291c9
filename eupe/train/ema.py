"""An exponential moving average of a module's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


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
