"""A student and its heads as one module from pixels to outputs, for formats that store a graph.

Shapes: B pictures, H W pixels, h w cells, D width of a token, Ds width of the summary.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from torch import Tensor, nn

from eupe.export.source import Source
from eupe.models.hub import brief


class Graph(nn.Module):
    """A module from pixels to all outputs of an export, in their order."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.encoder = source.encoder
        self.heads = nn.ModuleList(source.heads.values())
        self.kinds = [source.kinds[name] for name in source.heads]

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Compute the summary [B, Ds], dense [B, h, w, D] and each head's output of normalised pixels [B, 3, H, W]."""
        tokens = self.encoder(pixels)
        said = [head(getattr(tokens, kind)) for head, kind in zip(self.heads, self.kinds, strict=True)]
        return (tokens.summary, tokens.dense, *said)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the logs, warnings and progress of tracers; the export is verified by its outputs instead."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def brief_root(error: BaseException) -> str:
    """Return the root cause of an error on one line."""
    return brief(error) if error.__cause__ is None else brief_root(error.__cause__)
