"""The rows and columns of the page as one figure for a paper: a white PNG with nothing but maps and headings.

Shapes: P pictures, S pixels along a side, h w cells, C colours.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from eupe.common.outputs import FIGURE_MARK
from eupe.errors import ConfigError
from eupe.report.feature_maps import ModelColumn, PictureCell

CELL_PX = 224
"""Default side of a cell."""
MIN_CELL_PX = 32
MAX_PIXELS = 200_000_000
"""Most pixels of a figure, which is held in memory as a whole."""

PAPER = (255, 255, 255)
BLANK = (236, 236, 236)
"""Colour of the transparent parts of a map."""
INK = (20, 20, 24)
SOFT = (98, 101, 110)
SHORTENED = "..."

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Layout:
    """The positions of all parts of a figure, in pixels."""

    rows: int
    columns: int
    cell: int

    @property
    def gap(self) -> int:
        """Return the space between cells, and around the figure."""
        return max(2, self.cell // 32)

    @property
    def name_px(self) -> int:
        """Return the font size of a column's name."""
        return max(9, self.cell // 12)

    @property
    def facts_px(self) -> int:
        """Return the font size of the line below the name."""
        return max(8, self.cell // 16)

    @property
    def head(self) -> int:
        """Return the height of the headings."""
        return round(1.35 * (self.name_px + self.facts_px)) + self.gap

    @property
    def size(self) -> tuple[int, int]:
        """Return width and height of the figure."""
        step = self.cell + self.gap
        return self.gap + self.columns * step, self.gap + self.head + self.rows * step

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Return left and top of a cell."""
        step = self.cell + self.gap
        return self.gap + column * step, self.gap + self.head + row * step


def plan_figure(rows: int, columns: int, cell_px: int | None) -> Layout:
    """Lay out a figure.

    Args:
        columns: number of models, plus one for the pictures themselves.
    Raises: ConfigError if the cells are too small to read, or the figure is too big to draw.
    """
    layout = Layout(rows, columns, CELL_PX if cell_px is None else cell_px)
    if layout.cell < MIN_CELL_PX:
        raise ConfigError(f"--cell must be at least {MIN_CELL_PX} px, got {layout.cell}")
    width, height = layout.size
    if width * height > MAX_PIXELS:
        raise ConfigError(
            f"the figure would have {width:,} x {height:,} pixels, more than {MAX_PIXELS:,} in all; "
            "give a smaller --cell or --limit"
        )
    return layout


def draw_figure(layout: Layout, pictures: Sequence[PictureCell], models: Sequence[ModelColumn]) -> bytes:
    """Draw a PNG with one row per picture: the view, then each model's map of it, smoothed as on the page."""
    figure = Image.new("RGB", layout.size, PAPER)
    heads = [("picture", ""), *((model.name, _facts(model)) for model in models)]
    for column, (name, facts) in enumerate(heads):
        _draw_head(figure, layout, column, name, facts)
    for row, picture in enumerate(pictures):
        cells = [picture.pixels, *(model.colours.maps_PhwC[row] for model in models)]
        for column, pixels in enumerate(cells):
            figure.paste(enlarged(pixels, layout.cell), layout.corner(row, column))
    buffer = io.BytesIO()
    mark = PngInfo()
    mark.add_text(*FIGURE_MARK)
    figure.save(buffer, "png", pnginfo=mark)
    return buffer.getvalue()


def enlarged(pixels: NDArray[np.uint8], side: int) -> Image.Image:
    """Resize a map or a view [h, w, 3 or 4] to an RGB image of `side` pixels; transparent parts become `BLANK`."""
    image = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    if image.mode != "RGBA":
        return image
    blank = Image.new("RGBA", image.size, (*BLANK, 255))
    return Image.alpha_composite(blank, image).convert("RGB")


def _facts(model: ModelColumn) -> str:
    missing = ", no foreground found" if model.colours.note else ""
    return f"{model.size} px, {model.grid} x {model.grid} cells{missing}"


def _draw_head(figure: Image.Image, layout: Layout, column: int, name: str, facts: str) -> None:
    """Draw name and facts centred over a column, one gap above its cells."""
    pen = ImageDraw.Draw(figure)
    left, top = layout.corner(0, column)
    middle, bottom = left + layout.cell / 2, top - layout.gap
    _draw_line(pen, (middle, bottom - round(1.35 * layout.facts_px)), name, layout.name_px, INK, layout.cell)
    _draw_line(pen, (middle, bottom), facts, layout.facts_px, SOFT, layout.cell)


def _draw_line(
    pen: ImageDraw.ImageDraw,
    foot: tuple[float, float],
    words: str,
    size_px: int,
    ink: tuple[int, int, int],
    width: int,
) -> None:
    """Draw one line of text, centred on `foot`; if it is too long for `width`, use a smaller font, then cut its middle.

    Characters outside of ASCII become question marks: the font that comes with Pillow would draw empty boxes.
    """
    words = words.encode("ascii", "replace").decode()
    for smaller in range(size_px, max(7, round(0.7 * size_px)) - 1, -1):
        font = ImageFont.load_default(smaller)
        if font.getlength(words) <= width:
            break
    pen.text(foot, shorten(words, font, width), fill=ink, font=font, anchor="md")


def shorten(words: str, font: Font, width: float) -> str:
    """Return the words if they fit, else their longest beginning and end that do, with dots in between."""
    if font.getlength(words) <= width:
        return words
    for kept in range(len(words) - 1, 1, -1):
        shortened = f"{words[: (kept + 1) // 2]}{SHORTENED}{words[len(words) - kept // 2 :]}"
        if font.getlength(shortened) <= width:
            return shortened
    return SHORTENED
