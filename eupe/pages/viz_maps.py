"""The contents of a page or figure: pictures, and each model's maps of them as colours.

Shapes: P pictures, S pixels along a side, h w cells, D channels, C = 3 colours, or 4 where background is transparent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eupe.pca import Maps, find_foreground, fit_pca

MIN_TOKENS = 16
"""Fewer tokens than this are outliers, not the foreground or the background of pictures."""


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
    """Shares of variance that red, green and blue show, of the tokens in colour."""
    foreground: float | None
    """Share of the tokens that are in colour; None if all are."""
    note: str
    """Reason why there is no foreground although it was requested; else empty."""


@dataclass(frozen=True)
class ModelColumn:
    """A column: a model, and its features of every picture."""

    name: str
    kind: str
    """store, run, teacher or pixels."""
    about: str
    """Teacher of a store or architecture of a run; else empty."""
    size: int
    dense_PhwD: NDArray[np.float32]
    colours: Colours

    @property
    def grid(self) -> int:
        """Return the number of cells along a side."""
        return int(self.dense_PhwD.shape[1])

    @property
    def dim(self) -> int:
        """Return the number of channels of a token."""
        return int(self.dense_PhwD.shape[-1])


def colour_maps(dense_PhwD: Maps, *, foreground: bool) -> Colours:
    """Show three principal components as red, green and blue, fitted to all tokens or to the foreground only.

    Args:
        foreground: make the background transparent; if it cannot be found, all tokens are in colour and the note says
            why.
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
    """Return why a mask is not a usable foreground; empty if it is."""
    if not mask_Phw.any():
        return "no foreground: all its tokens are alike"
    apart = int(min(mask_Phw.sum(), (~mask_Phw).sum()))
    if apart >= MIN_TOKENS:
        return ""
    return f"no foreground: its first component sets {apart} of {mask_Phw.size} tokens apart, fewer than {MIN_TOKENS}"
