"""A student and its heads as one function of pixels, for formats that keep a graph.

Shapes: B pictures, H W pixels, h w cells, D width of a token, Ds of the summary.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from eupe.encoder import Encoder
from eupe.teachers.weights import brief


class Graph(nn.Module):
    """Pixels in, all outputs of an export out, in their order."""

    def __init__(self, encoder: Encoder, heads: Mapping[str, nn.Sequential]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(heads.values())
        self.kinds = [name.rpartition(".")[2] for name in heads]

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Normalised pixels [B, 3, H, W] to summary [B, Ds], dense [B, h, w, D], and each head's."""
        tokens = self.encoder(pixels)
        said = [head(getattr(tokens, kind)) for head, kind in zip(self.heads, self.kinds, strict=True)]
        return (tokens.summary, tokens.dense, *said)


@contextmanager
def quiet() -> Iterator[None]:
    """Tracers' remarks about themselves off: what matters of them is measured."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def brief_root(error: BaseException) -> str:
    """What an error began as, on one line."""
    return brief(error) if error.__cause__ is None else brief_root(error.__cause__)
