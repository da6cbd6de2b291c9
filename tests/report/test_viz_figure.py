"""The figure for papers: its heads and its size; its cells are compared with the page's in test_viz.py."""

from __future__ import annotations

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFont

from eupe.report.feature_maps import ModelColumn, PictureCell, colour_maps
from eupe.report.png_figure import CELL_PX, Layout, draw_figure, plan_figure, shorten

LONG = "timm:" + "vit_so400m_patch14_siglip_gap_896" * 3


def drawn(layout: Layout, names: list[str]) -> NDArray[np.uint8]:
    dense = np.random.default_rng(0).normal(size=(layout.rows, 4, 4, 8)).astype(np.float32)
    pictures = [
        PictureCell(f"{i}", None, False, np.zeros((layout.cell,) * 2 + (3,), np.uint8)) for i in range(layout.rows)
    ]
    models = [ModelColumn(name, "teacher", "", 64, dense, colour_maps(dense, foreground=False)) for name in names]
    return np.asarray(Image.open(io.BytesIO(draw_figure(layout, pictures, models))))


@pytest.mark.parametrize("cell_px", [32, 100, None])
def test_heads_stand_above_their_own_column_on_white(cell_px: int | None) -> None:
    layout = plan_figure(2, 4, cell_px)
    assert layout.cell == (cell_px or CELL_PX)
    figure = drawn(layout, ["dinov2", LONG, "proxy"])
    top = layout.corner(0, 0)[1]
    assert (figure[top - 1] == 255).all() and (figure[0] == 255).all()
    for column in range(4):
        left = layout.corner(0, column)[0]
        head = figure[:top, left : left + layout.cell]
        assert head.min() < 120
        assert (figure[:, left - layout.gap : left] == 255).all()
    assert (figure[top:, layout.corner(0, 0)[0] : layout.corner(0, 0)[0] + layout.cell][: layout.cell] == 0).all()


def test_names_too_long_lose_their_middle() -> None:
    font = ImageFont.load_default(12)
    shortened = shorten(LONG, font, 150)
    start, end = shortened.split("...")
    assert LONG.startswith(start) and LONG.endswith(end) and abs(len(start) - len(end)) <= 1
    assert 130 < font.getlength(shortened) <= 150
    assert shorten("dinov2", font, 150) == "dinov2"
    assert shorten(LONG, font, 1) == "..."


def test_letters_that_the_font_lacks_are_question_marks() -> None:
    layout = plan_figure(1, 2, 100)
    np.testing.assert_array_equal(drawn(layout, ["é 写真"]), drawn(layout, ["? ??"]))
    assert (drawn(layout, ["é"]) != drawn(layout, ["e"])).any()
