"""An exponential moving average of a module's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Ema:
    """Averages, in float32, of every floating parameter and buffer (the running statistics of BatchNorm, too)."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Begins with the module's values as they are."""
        self.decay = decay
        state = module.state_dict(keep_vars=True)
        self._values = {name: value.detach() for name, value in state.items() if value.is_floating_point()}
        self._averages = {name: value.float().clone() for name, value in self._values.items()}
        spread = {name for name, value in self._values.items() if isinstance(value, DTensor)}
        self._alike = [sorted(names) for names in (spread, self._values.keys() - spread) if names]

    def update(self, step: int | None = None) -> None:
        """average = decay * average + (1 - decay) * value.

        Args:
            step: of the update, from 0 on, by which the decay rises: (1 + step) / (10 + step), at most `decay`. So the
                random values of the beginning are forgotten at once, where a fixed 0.9999 would keep a third of them
                for 10,000 steps. Source: TensorFlow's ExponentialMovingAverage, `num_updates`. None for a fixed decay.
        """
        decay = self.decay if step is None else min(self.decay, (1 + step) / (10 + step))
        for names in self._alike:
            averages = [self._averages[name] for name in names]
            torch._foreach_lerp_(averages, [self._values[name].float() for name in names], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module has its averages; afterwards its own values again, to the bit."""
        own = {name: value.clone() for name, value in self._values.items()}
        _copy(self._averages, self._values)
        try:
            yield
        finally:
            _copy(own, self._values)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the module's names."""
        return dict(self._averages)


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, value in source.items():
        target[name].copy_(value)
