"""Pictures of a student's dense tokens beside the targets: held-out views, and both maps in PCA colours.

Shapes: P views, S pixels, h w cells, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from eupe.models.pca import fit_pca
from eupe.store.layout import DENSE
from eupe.train.model import Distiller
from eupe.train.targets import Batch
from eupe.train.validate import pairs

SHOWN_VIEWS = 4
CELL_PX = 160
GAP_PX = 4
TITLE_PX = 18

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class DenseMaps:
    """Dense maps of one target, normalised, on one grid: float32 [P, h, w, D] each."""

    stored: NDArray[np.float32]
    predicted: NDArray[np.float32]


def dense_maps(
    distiller: Distiller, batches: Sequence[Batch], names: Sequence[str], device: torch.device
) -> dict[str, DenseMaps]:
    """Return the stored and the predicted maps of every target that has dense tokens, by name.

    Every worker must call this, because the student may be sharded. Afterwards the modules are in their
    previous mode again.
    """
    found: dict[str, list[tuple[NDArray[np.float32], NDArray[np.float32]]]] = {}
    for i, kind, predicted, stored, norm in pairs(distiller, batches, device):
        if kind == DENSE:
            found.setdefault(names[i], []).append((norm(stored).cpu().numpy(), predicted.cpu().numpy()))
    return {name: DenseMaps(*map(np.concatenate, zip(*each, strict=True))) for name, each in found.items()}


def draw_maps(batches: Sequence[Batch], maps: Mapping[str, DenseMaps]) -> Image.Image:
    """Draw a row for each view: the view, then each target's map and the student's, in colours fitted to the target.

    The three components, and the scores that are drawn as black and white, are the target's; a student that predicts
    it exactly has the same colours.
    """
    views = np.concatenate([batch.pixels.cpu().numpy() for batch in batches])
    columns: dict[str, Pixels] = {"view": views}
    for name, both in maps.items():
        pca = fit_pca(both.stored)
        columns |= {name: pca.rgb(both.stored), f"student: {name}": pca.rgb(both.predicted)}
    step = CELL_PX + GAP_PX
    grid = Image.new("RGB", (step * len(columns) - GAP_PX, TITLE_PX + step * len(views) - GAP_PX))
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default()
    for i, (title, cells) in enumerate(columns.items()):
        pen.text((step * i + GAP_PX, GAP_PX), title, fill="white", font=font)
        for j, cell in enumerate(cells):
            how = Image.Resampling.BICUBIC if title == "view" else Image.Resampling.NEAREST
            shown = Image.fromarray(cell).resize((CELL_PX, CELL_PX), how)
            grid.paste(shown, (step * i, TITLE_PX + step * j))
    return grid
