"""What a page and a figure show: pictures, and each model's maps of them as colours.

Shapes: P pictures, S pixels along a side, h w cells, D channels, C = 3 colours, or 4 where background is transparent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eupe.pca import Maps, find_foreground, fit_pca

MIN_TOKENS = 16
"""Fewer tokens are outliers, not the foreground or the background of pictures."""


@dataclass(frozen=True)
class PictureCell:
    """The first cell of a row."""

    key: str
    label: str | None
    held_out: bool
    pixels: NDArray[np.uint8]
    """[S, S, 3]: the view that all models saw."""


@dataclass(frozen=True)
class Colours:
    """A model's maps of all pictures."""

    maps_PhwC: NDArray[np.uint8]
    explained: tuple[float, float, float]
    """Shares of the variance of the tokens in colour that red, green and blue show."""
    foreground: float | None
    """Share of the tokens that are in colour; None where all of them are."""
    note: str
    """Why there is no foreground although it was asked for."""


@dataclass(frozen=True)
class ModelColumn:
    """A column: a model, and what it says of every picture."""

    name: str
    kind: str
    """store, run or teacher."""
    about: str
    """Whose features these are, where the name does not say."""
    size: int
    dense_PhwD: NDArray[np.float32]
    colours: Colours

    @property
    def grid(self) -> int:
        """Cells along a side."""
        return int(self.dense_PhwD.shape[1])

    @property
    def dim(self) -> int:
        """Channels of a token."""
        return int(self.dense_PhwD.shape[-1])


def colour_maps(dense_PhwD: Maps, *, foreground: bool) -> Colours:
    """Three principal components as red, green and blue, of all tokens or of those in the foreground alone.

    Args:
        foreground: leave the background transparent; where it cannot be told, all tokens are in colour and the
            note says why.
    """
    mask_Phw = find_foreground(dense_PhwD) if foreground else None
    note = "" if mask_Phw is None else _complaint(mask_Phw)
    chosen = dense_PhwD if mask_Phw is None or note else dense_PhwD[mask_Phw][None, None]
    pca = fit_pca(chosen)
    red, green, blue = map(float, pca.explained_C)
    maps_Phw3 = pca.rgb(dense_PhwD)
    if mask_Phw is None or note:
        return Colours(maps_Phw3, (red, green, blue), None, note)
    alpha_Phw1 = np.where(mask_Phw, 255, 0).astype(np.uint8)[..., None]
    return Colours(np.concatenate([maps_Phw3, alpha_Phw1], axis=-1), (red, green, blue), float(mask_Phw.mean()), note)


def _complaint(mask_Phw: NDArray[np.bool_]) -> str:
    """Why a cut into foreground and background is none, or nothing."""
    if not mask_Phw.any():
        return "no foreground: all its tokens are alike"
    apart = int(min(mask_Phw.sum(), (~mask_Phw).sum()))
    if apart >= MIN_TOKENS:
        return ""
    return f"no foreground: its first component sets {apart} of {mask_Phw.size} tokens apart, fewer than {MIN_TOKENS}"
