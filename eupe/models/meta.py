"""Modules without memory: only their shapes and names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextmanager
def built_on_meta() -> Iterator[None]:
    """Build modules on the meta device without drawing their weights, which would take most of the time there.

    It is only for building: in a forward pass, the model's own in-place functions would be skipped, too.
    """
    with torch.device("meta"), _NothingDrawn():
        yield


class _NothingDrawn(TorchFunctionMode):
    """A mode that skips in-place initialisation; on the meta device there are no values that it could change."""

    _DRAWS = frozenset(
        {Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, Tensor.fill_, Tensor.zero_}
        | {Tensor.clamp_, Tensor.add_, Tensor.mul_, Tensor.div_}
    )

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in self._DRAWS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))
