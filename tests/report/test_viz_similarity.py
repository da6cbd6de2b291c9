"""Features in the page: how near their cosines are, and what a reader sees who chooses a patch."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, needs_browser
from numpy.typing import NDArray
from sklearn.decomposition import TruncatedSVD
from sklearn.metrics.pairwise import cosine_similarity

from eupe.report import feature_maps
from eupe.report.charts import colour_stops
from eupe.report.feature_maps import (
    MAX_KEPT,
    MAX_TEXT_BYTES,
    MIN_KEPT,
    ModelColumn,
    PictureCell,
    channels_to_keep,
    colour_maps,
    embed,
)
from eupe.report.viz_page import render_maps

Cosines = NDArray[np.float64]

GRIDS, DIM, PICTURES = (6, 4, 9), 24, 2


def features(grid: int, dim: int = DIM, *, pictures: int = PICTURES, seed: int = 0) -> NDArray[np.float32]:
    """Return features that have, like real ones, a mean, few strong directions, and tokens of many lengths."""
    rng = np.random.default_rng(seed)
    dense = rng.normal(size=(pictures, grid, grid, dim)) * np.geomspace(3, 0.05, dim) + 0.5
    return (dense * rng.uniform(0.1, 10, size=(pictures, grid, grid, 1))).astype(np.float32)


def cosines_of(dense_hwD: NDArray[np.generic]) -> Cosines:
    """Return the cosines of all pairs of cells: [N, N]."""
    cosines: Cosines = cosine_similarity(dense_hwD.reshape(-1, dense_hwD.shape[-1]).astype(float))
    return cosines


class TestEmbedding:
    def test_all_channels_keep_all_cosines_but_for_rounding(self) -> None:
        dense = features(5)
        embedding = embed(dense, DIM)
        assert embedding.codes_PNK.shape == (PICTURES, 25, DIM) and embedding.codes_PNK.dtype == np.int8
        for codes, map_hwD in zip(embedding.codes_PNK, dense, strict=True):
            np.testing.assert_allclose(cosines_of(codes), cosines_of(map_hwD), atol=0.02)

    @pytest.mark.parametrize("dim", [DIM, 200], ids=["more tokens", "more channels"])
    def test_few_channels_are_those_of_a_truncated_svd_of_unit_tokens(self, dim: int) -> None:
        dense = features(5, dim)
        tokens = dense.reshape(-1, dim).astype(float)
        tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
        oracle = TruncatedSVD(4, algorithm="arpack").fit_transform(tokens).reshape(PICTURES, -1, 4)
        for codes, reduced in zip(embed(dense, 4).codes_PNK, oracle, strict=True):
            np.testing.assert_allclose(cosines_of(codes), cosine_similarity(reduced), atol=0.03)

    @pytest.mark.parametrize("kept", [2, 5, DIM])
    def test_the_differences_told_are_those_of_all_pairs_of_a_picture(self, kept: int) -> None:
        dense = features(4)
        embedding = embed(dense, kept)
        differences = [
            abs(float(cosine_similarity(codes[i : i + 1], codes[j : j + 1])[0, 0]) - cosines_of(map_hwD)[i, j])
            for codes, map_hwD in zip(embedding.codes_PNK.astype(float), dense, strict=True)
            for i in range(16)
            for j in range(16)
        ]
        assert embedding.largest_error == pytest.approx(max(differences))
        assert embedding.mean_error == pytest.approx(np.mean(differences))

    def test_a_token_of_zeros_is_like_none(self) -> None:
        dense = features(3)
        dense[0, 1, 1] = 0
        embedding = embed(dense, DIM)
        assert not embedding.codes_PNK[0, 4].any() and embedding.largest_error < 0.02

    def test_fewer_channels_than_asked_for_are_all_kept(self) -> None:
        assert embed(features(3, 2), 16).codes_PNK.shape[-1] == 2

    def test_channels_are_as_many_as_fit_the_page(self) -> None:
        for num_tokens in (1, 2_000, 46_000, 93_750):
            kept = channels_to_keep(num_tokens)
            assert kept is not None and MIN_KEPT <= kept <= MAX_KEPT
            assert kept * num_tokens * 4 / 3 <= MAX_TEXT_BYTES
            assert kept == MAX_KEPT or (kept + 1) * num_tokens * 4 / 3 > MAX_TEXT_BYTES
        assert channels_to_keep(93_751) is None


def columns() -> list[ModelColumn]:
    """Three models of different grids; in the last, one token is zeros."""
    made = [features(grid, seed=grid) for grid in GRIDS]
    made[-1][0, 2, 5] = 0
    return [
        ModelColumn(f"model{grid}", "teacher", "", 64, dense, colour_maps(dense, foreground=False))
        for grid, dense in zip(GRIDS, made, strict=True)
    ]


def page_of(models: Sequence[ModelColumn]) -> str:
    pixels = np.full((64, 64, 3), 90, dtype=np.uint8)
    return render_maps([PictureCell(f"{i}.png", None, False, pixels) for i in range(PICTURES)], models, [])


def codes_in(page: str) -> list[NDArray[np.int8]]:
    """Return the codes of every map in the page, picture by picture: [N, K]."""
    found = re.findall(r'data-grid="(\d+)" data-features="([^"]*)"', page)
    return [np.frombuffer(base64.b64decode(text), np.int8).reshape(int(grid) ** 2, -1) for grid, text in found]


class TestStatement:
    def test_the_page_tells_channels_and_differences_of_each_model(self) -> None:
        models = columns()
        page = page_of(models)
        for model in models:
            embedding = embed(model.dense_PhwD, MAX_KEPT)
            told = f"<td>{DIM} of {DIM}</td><td>{embedding.mean_error:.4f}</td><td>{embedding.largest_error:.4f}</td>"
            assert f'<th scope="row">{model.name}</th>{told}' in re.sub(r">\s+<", "><", page)
        texts = re.findall(r'data-features="([^"]*)"', page)
        assert f"from {sum(map(len, texts)) / 1e6:.2f} MB of features (4 MB at most)" in page

    def test_codes_are_those_of_the_embedding(self) -> None:
        models = columns()
        embeddings = [embed(model.dense_PhwD, MAX_KEPT) for model in models]
        expected = [embedding.codes_PNK[i] for i in range(PICTURES) for embedding in embeddings]
        for found, codes in zip(codes_in(page_of(models)), expected, strict=True):
            np.testing.assert_array_equal(found, codes)

    def test_a_page_without_room_for_features_has_no_script(self, monkeypatch: pytest.MonkeyPatch) -> None:
        num_tokens = PICTURES * sum(grid**2 for grid in GRIDS)
        monkeypatch.setattr(feature_maps, "MAX_TEXT_BYTES", num_tokens * MIN_KEPT * 4 // 3 - 1)
        page = page_of(columns())
        assert "There are too many maps to embed the features" in page and "show fewer pictures" in page
        assert not codes_in(page) and "<script" not in page and "script-src" not in page
        assert "How exact" not in page


def along(ramp: Sequence[str], share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Colours [..., 3] of shares from 0 to 1."""
    stops = np.array([list(bytes.fromhex(stop[1:])) for stop in ramp])
    places = np.linspace(0, 1, len(ramp))
    return np.stack([np.interp(share, places, stops[:, channel]) for channel in range(3)], axis=-1)


def frame(row: int, column: int) -> str:
    """JavaScript for a frame of the page; column 0 is the view."""
    return f"document.querySelectorAll('article')[{row}].querySelectorAll('.frame')[{column}]"


def shown_cosines(browser: Browser, row: int) -> list[Cosines]:
    """Return the cosines that the browser has for every map of a row."""
    frames = [f"Array.from({frame(row, 1 + i)}.querySelector('canvas').cosines)" for i in range(len(GRIDS))]
    return [np.array(browser.run(expression)) for expression in frames]


def readings(browser: Browser, row: int) -> list[str]:
    return [str(browser.run(f"{frame(row, 1 + i)}.querySelector('output').innerText")) for i in range(len(GRIDS))]


def expected_cosines(page: str, row: int, x: float, y: float) -> list[Cosines]:
    """Return, for every map of a row, the cosines with the patch at a place; x and y are shares of the side."""
    of_row = codes_in(page)[row * len(GRIDS) : (row + 1) * len(GRIDS)]
    return [
        cosine_similarity(codes.astype(float))[int(y * grid) * grid + int(x * grid)]
        for codes, grid in zip(of_row, GRIDS, strict=True)
    ]


def assert_shown(browser: Browser, page: str, row: int, x: float, y: float) -> None:
    for shown, expected in zip(shown_cosines(browser, row), expected_cosines(page, row, x, y), strict=True):
        np.testing.assert_allclose(shown, expected, atol=1e-12)


def chosen_rows(browser: Browser) -> list[bool]:
    chosen = "[...document.querySelectorAll('article')].map(article => article.classList.contains('chosen'))"
    return [bool(row) for row in browser.run(chosen)]


@needs_browser
class TestInABrowser:
    @pytest.fixture
    def page(self, tmp_path: Path, browser: Browser) -> str:
        (tmp_path / "page.html").write_text(page_of(columns()))
        browser.open(tmp_path / "page.html")
        return (tmp_path / "page.html").read_text()

    @pytest.mark.parametrize("column,x,y", [(0, 0.51, 0.11), (1, 0.01, 0.99), (2, 0.7, 0.3), (3, 0.62, 0.27)])
    def test_a_click_shows_each_models_cosines_to_the_patch_at_that_place(
        self, page: str, browser: Browser, column: int, x: float, y: float
    ) -> None:
        """The last place is a token of zeros in one of the models."""
        browser.click(frame(0, column), x, y)
        assert chosen_rows(browser) == [True, False]
        assert_shown(browser, page, 0, x, y)
        for i, (grid, expected) in enumerate(zip(GRIDS, expected_cosines(page, 0, x, y), strict=True)):
            span = np.ptp(expected) or 1.0
            canvas = f"{frame(0, 1 + i)}.querySelector('canvas')"
            painted = browser.run(f"Array.from({canvas}.getContext('2d').getImageData(0, 0, {grid}, {grid}).data)")
            shares = (expected - expected.min()) / span if np.ptp(expected) else np.ones(grid**2)
            colours = np.array(painted).reshape(-1, 4)
            assert (
                np.abs(colours[:, :3] - along(colour_stops("magma"), shares)).max() <= 0.51
                and (colours[:, 3] == 255).all()
            )
            assert browser.run(f"getComputedStyle({canvas}).display") == "block"
        assert not browser.complaints()

    @pytest.mark.parametrize("column", [0, 1, 2, 3])
    def test_the_patch_is_marked_in_the_view_and_in_every_map(self, page: str, browser: Browser, column: int) -> None:
        browser.click(frame(0, 1), 0.4, 0.6)
        browser.point("document.querySelector('h1')", 0.5, 0.5)
        grid = max(GRIDS) if column == 0 else GRIDS[column - 1]
        drawn = browser.look(frame(0, column))
        side = drawn.shape[0] / grid
        left, top = int(int(0.4 * grid) * side) + 1, int(int(0.6 * grid) * side) + 1
        for y, x in [(top, left + side / 2), (top + side - 2, left + side / 2), (top + side / 2, left)]:
            assert (drawn[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2].min(axis=-1) == 255).any()

    def test_what_is_under_the_pointer_is_read_from_every_map(self, page: str, browser: Browser) -> None:
        browser.click(frame(1, 1), 0.2, 0.2)
        browser.point(frame(1, 2), 0.9, 0.6)
        cells = [int(0.6 * grid) * grid + int(0.9 * grid) for grid in GRIDS]
        expected = expected_cosines(page, 1, 0.2, 0.2)
        assert readings(browser, 1) == [f"{cosines[i]:.3f}" for cosines, i in zip(expected, cells, strict=True)]
        browser.point("document.querySelector('h1')", 0.5, 0.5)
        assert readings(browser, 1) == [f"{cosines.min():.2f} to {cosines.max():.2f}" for cosines in expected]

    def test_keys_choose_a_patch_as_the_pointer_does(self, page: str, browser: Browser) -> None:
        browser.run(f"{frame(1, 2)}.focus()")
        browser.press("ArrowRight", "ArrowRight", "ArrowUp", "Enter")  # from the middle of 4 x 4 cells, not beyond
        assert chosen_rows(browser) == [False, True]
        assert_shown(browser, page, 1, 3.5 / 4, 1.5 / 4)
        browser.press("Escape")
        assert chosen_rows(browser) == [False, False]
        assert not browser.complaints()

    def test_the_maps_come_back_by_a_button_and_with_another_component(self, page: str, browser: Browser) -> None:
        for way_back in ("document.querySelectorAll('.back')[0]", "document.querySelector('label[for=second]')"):
            browser.click(frame(0, 1))
            assert chosen_rows(browser) == [True, False]
            browser.click(way_back)
            assert chosen_rows(browser) == [False, False]

    def test_without_scripts_nothing_promises_what_they_do(self, tmp_path: Path, browser: Browser) -> None:
        (tmp_path / "page.html").write_text(page_of(columns()))
        browser.open(tmp_path / "page.html", scripts=False)
        assert "Click a patch" not in browser.run("document.body.innerText")
        assert browser.run("document.querySelectorAll('[tabindex], .mark, button').length") == 0
        browser.open(tmp_path / "page.html")
        assert "Click a patch" in browser.run("document.body.innerText")

    @pytest.mark.parametrize("scripts", [True, False])
    def test_one_component_alone_is_its_shade_along_the_scale(
        self, tmp_path: Path, browser: Browser, scripts: bool
    ) -> None:
        """The colours are compared as they are drawn on the screen, cell by cell."""
        models = columns()
        (tmp_path / "page.html").write_text(page_of(models))
        browser.open(tmp_path / "page.html", scripts=scripts)
        browser.click("document.querySelector('label[for=cells]')")
        for component, name in [(0, "first"), (2, "third")]:
            browser.click(f"document.querySelector('label[for={name}]')")
            expected = along(colour_stops("viridis"), models[0].colours.maps_PhwC[1, ..., component] / 255)
            assert np.abs(cells_of(browser.look(frame(1, 1)), GRIDS[0]) - expected).max() <= 4
        browser.click("document.querySelector('label[for=all]')")
        drawn = cells_of(browser.look(frame(1, 1)), GRIDS[0])
        assert np.abs(drawn - models[0].colours.maps_PhwC[1]).max() <= 1

    def test_background_is_blank_in_every_component(self, tmp_path: Path, browser: Browser) -> None:
        dense = np.random.default_rng(1).normal(size=(PICTURES, 6, 6, 8)).astype(np.float32)
        dense[:, 1:5, 2:5] += 8
        model = ModelColumn("model", "teacher", "", 64, dense, colour_maps(dense, foreground=True))
        (tmp_path / "page.html").write_text(page_of([model]))
        browser.open(tmp_path / "page.html")
        browser.click("document.querySelector('label[for=cells]')")
        background = np.ones((6, 6), dtype=bool)
        background[1:5, 2:5] = False
        around = browser.look("document.body")[-1, -1]
        for name in ("all", "first"):
            browser.click(f"document.querySelector('label[for={name}]')")
            cells = cells_of(browser.look(frame(0, 1)), 6)
            (blank,) = {tuple(map(int, cell)) for cell in cells[background]}
            assert (
                np.ptp(blank) < 12
                and blank != tuple(map(int, around))
                and (np.ptp(cells[~background], axis=-1) > 20).mean() > 0.8
            )


def cells_of(drawn: NDArray[np.uint8], grid: int) -> NDArray[np.int64]:
    """The middle of each cell: [grid, grid, 3]."""
    height, width = drawn.shape[:2]
    middles = (np.arange(grid) + 0.5) / grid
    return drawn[(middles * height).astype(int)[:, None], (middles * width).astype(int)].astype(int)
