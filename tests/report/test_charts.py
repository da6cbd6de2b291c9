"""Charts: what is drawn is what was given, inside its frame, in nothing that concerns the page around it."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from importlib.resources import files
from itertools import pairwise
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from charts import curves, places, titled, values

from eupe.report.charts import (
    LEAST_BAR_PX,
    MAX_POINTS,
    VARIABLES,
    Series,
    Spot,
    colour_stops,
    front,
    heat_map,
    histogram,
    line_chart,
    linear_ticks,
    log_ticks,
    scatter_chart,
    thin,
)

LABELS = {"label": "l", "x_label": "x", "y_label": "y"}
HOSTILE = "<img src=x onerror=alert(1)>&\"'$x^2$ ${name} \x1b\udcff 写真 -->"


def lines(*series: Series, allow_log: bool = False) -> ElementTree.Element:
    return ElementTree.fromstring(line_chart(series, **LABELS, allow_log=allow_log))


def words(svg: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in svg.iter("text")]


class TestAxes:
    def test_ticks_are_round_and_cover_the_values(self) -> None:
        for low, high in itertools.product((-0.3, 0.0, 0.0123), (0.4, 1.0, 7.7, 123456.0)):
            ticks = linear_ticks(low, high)
            assert ticks[0] <= low and high <= ticks[-1] and 3 <= len(ticks) <= 9
            digits = {f"{tick:.6e}".split("e")[0].rstrip("0") for tick in np.diff(ticks)}
            assert digits <= {"1.", "2.", "5."}

    @pytest.mark.parametrize("low,high", [(0.7, 3.4), (0.01, 5.0), (1e-5, 1e3)])
    def test_log_axis(self, low: float, high: float) -> None:
        ticks = log_ticks(low, high)
        assert 3 <= len(ticks) <= 10 and low <= ticks[0] and ticks[-1] <= high
        (curve,) = curves(lines(Series("a", [(1, low), (2, (low * high) ** 0.5), (4, high)], 0), allow_log=True))
        assert curve[1, 1] == pytest.approx((curve[0, 1] + curve[2, 1]) / 2, abs=0.02)

    def test_log_only_where_it_is_allowed_and_helps(self) -> None:
        def is_log(*heights: float, allow_log: bool = True) -> bool:
            return "y (log scale)" in words(lines(Series("a", list(enumerate(heights))), allow_log=allow_log))

        assert is_log(0.1, 5)
        assert not is_log(0.1, 5, allow_log=False)
        assert not is_log(1, 1.5) and not is_log(-1, 5) and not is_log(0, 5)
        assert "0" in words(lines(Series("a", [(1, 0.2), (2, 0.3)])))


class TestCurves:
    def test_a_long_curve_is_thinned_to_means(self) -> None:
        points = [(float(i), float(i % 2)) for i in range(10 * MAX_POINTS)]
        thinned = thin(points)
        assert len(thinned) == MAX_POINTS
        assert {y for _, y in thinned} == {0.5}
        assert thinned[0][0] == 4.5
        assert thin(points[:5]) == points[:5]
        noise = np.random.default_rng(0).normal(size=5000)
        (curve,) = curves(lines(Series("a", list(enumerate(noise.tolist())))))
        assert MAX_POINTS / 2 < len(curve) <= MAX_POINTS

    @pytest.mark.parametrize("points", [[(0, 0.0)], [(1, 2.0)], [(10, -1.0), (20, 3.0)]])
    def test_curves_stay_inside(self, points: list[tuple[float, float]]) -> None:
        svg = line_chart([Series("a<b", points)], **LABELS, allow_log=True)
        assert "a<b" not in svg
        drawn = ElementTree.fromstring(svg)
        assert len(titled(drawn)) == len(points)
        for path in drawn.iter("path"):
            assert ((places(path) >= 0) & (places(path) <= (460, 250))).all()

    def test_points_are_where_their_values_are(self) -> None:
        points = [(0, 0.21), (5, -0.4), (20, 0.77), (40, 0.5)]
        drawn = lines(Series("total", points), Series("t/dense", [(40, 0.1)], 0, dashed=True))
        curve, _ = curves(drawn)
        np.testing.assert_allclose(values(drawn, curve[:, 1]), [y for _, y in points], atol=2e-3)
        np.testing.assert_allclose(np.diff(curve[:, 0]) / np.ptp(curve[:, 0]), np.diff([0, 5, 20, 40]) / 40, atol=1e-3)
        assert list(titled(drawn)) == [
            *("total: 0.21 at 0", "total: -0.4 at 5", "total: 0.77 at 20", "total: 0.5 at 40", "t/dense: 0.1 at 40")
        ]

    def test_many_points_are_not_marked(self) -> None:
        assert not titled(lines(Series("a", [(float(i), float(i)) for i in range(13)])))


class TestScatter:
    SPOTS = (Spot("fast", 5, 0.4), Spot("beaten", 9, 0.3), Spot("slow", 50, 0.9), Spot("middle", 9, 0.6))

    def test_the_front_is_of_those_that_none_beats(self) -> None:
        assert [spot.name for spot in front(self.SPOTS, lower_is_better=False)] == ["fast", "middle", "slow"]
        assert [spot.name for spot in front(self.SPOTS, lower_is_better=True)] == ["fast", "beaten"]
        alone = front([*self.SPOTS, Spot("otherwise", 1, 1.0, compared=False)], lower_is_better=False)
        assert [spot.name for spot in alone] == ["fast", "middle", "slow"]

    def test_points_are_where_their_values_are_and_the_line_joins_the_front(self) -> None:
        drawn = ElementTree.fromstring(scatter_chart(self.SPOTS, **LABELS, lower_is_better=False))
        dots = {title: places(path).mean(axis=0) for title, path in titled(drawn).items()}
        assert list(dots) == [f"{spot.name}: {spot.quality} at {spot.cost}" for spot in self.SPOTS]
        heights = np.array([centre[1] for centre in dots.values()])
        np.testing.assert_allclose(values(drawn, heights), [spot.quality for spot in self.SPOTS], atol=5e-3)
        (line,) = curves(drawn)
        np.testing.assert_allclose(values(drawn, line[:, 1]), [0.4, 0.6, 0.9], atol=2e-3)
        assert {"fast", "beaten", "slow", "middle"} <= set(words(drawn))

    @pytest.mark.parametrize("names", [("a", "b"), ("a" * 40, "b" * 40), ("x" * 90, "<b>")])
    def test_points_and_names_stay_inside_and_apart(self, names: tuple[str, str]) -> None:
        spots = [Spot(names[i % 2], 10 + i / 100, 0.5 + i / 1000) for i in range(6)]
        drawn = ElementTree.fromstring(scatter_chart(spots, **LABELS, lower_is_better=False))
        _, _, width, height = map(float, drawn.attrib["viewBox"].split())
        dots = [group[1] for group in drawn.iter("g")]
        assert len(dots) == 6
        assert all(((places(dot) >= 0) & (places(dot) <= (width, height))).all() for dot in dots)
        said = [str(group[0].text) for group in drawn.iter("g")]
        assert [title.split(":")[0] for title in said] == [names[i % 2] for i in range(6)]
        labels = [t for t in drawn.iter("text") if t.text in names]
        tops = sorted(float(t.attrib["y"]) for t in labels)
        assert all(8 <= top <= height for top in tops)
        assert all(below - above > 10 for above, below in pairwise(tops)) or len(names[0]) < 5

    @pytest.mark.parametrize("length", [4, 8, 11, 12])
    def test_no_name_stands_above_or_below_the_chart(self, length: int) -> None:
        fast, beaten, _, middle = self.SPOTS
        spots = [fast, beaten, Spot("s" * length, 50, 0.9), middle, Spot("odd", 30, 0.95, compared=False)]
        drawn = ElementTree.fromstring(scatter_chart(spots, **LABELS, lower_is_better=False))
        heights = [float(text.attrib["y"]) for text in drawn.iter("text") if text.text in {spot.name for spot in spots}]
        assert len(heights) >= 4 and min(heights) > 10 and max(heights) < 215

    def test_a_single_point_and_equal_values(self) -> None:
        for spots in ([Spot("a", 1, 0.5)], [Spot("a", 1, 0.5), Spot("b", 1, 0.5)]):
            assert "nan" not in scatter_chart(spots, **LABELS, lower_is_better=True)


@pytest.mark.parametrize("rates", [[[0.5]], [[0.0, 1e-4], [0.0, 0.0]], np.eye(64).tolist()])
def test_a_heat_map_stays_in_its_frame(rates: list[list[float]]) -> None:
    svg = ElementTree.fromstring(heat_map(rates, label="map"))
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    for path in svg.iter("path"):
        assert ((places(path) >= 0) & (places(path) <= (width, height))).all()
    assert len(titled(svg)) == np.count_nonzero(rates)


def test_a_cell_of_a_heat_map_is_as_strong_as_its_share() -> None:
    cells = titled(ElementTree.fromstring(heat_map([[0.0, 0.1], [0.4, 0.2]], label="map")))
    opacity = {title: re.findall(r"opacity: ([\d.]+)", path.attrib["style"]) for title, path in cells.items()}
    assert opacity == {
        "row 0, column 1: 10.00% of views": ["0.25"],
        "row 1, column 0: 40.00% of views": [],
        "row 1, column 1: 20.00% of views": ["0.5"],
    }
    upper, left, right = map(places, cells.values())
    assert left[:, 0].max() < right[:, 0].min() and upper[:, 1].max() < right[:, 1].min()


@pytest.mark.parametrize("counts", [[0, 3, 0, 0], [1, 0, 0, 10**6], [1, 1, 1, 1]])
def test_bars_are_shares_and_the_rare_is_seen(counts: list[int]) -> None:
    edges = [2 ** (i / 4) for i in range(5)]
    svg = ElementTree.fromstring(histogram(edges, counts, mark=1.3, **LABELS))
    bars = [places(path) for path in titled(svg).values()]
    heights = [float(np.ptp(bar[:, 1])) for bar in bars]
    assert len(heights) == np.count_nonzero(counts)
    assert min(heights) >= LEAST_BAR_PX
    assert heights[int(np.argmax([c for c in counts if c]))] == max(heights)
    tops = np.array([bar[:, 1].min() for bar in bars])
    np.testing.assert_allclose(values(svg, tops), [c / sum(counts) for c in counts if c], atol=1e-2)
    assert any(re.fullmatch(r"[\d.]+", word) for word in words(svg))


def all_charts(name: str) -> list[str]:
    labels = {"label": name, "x_label": name, "y_label": name}
    return [
        line_chart([Series(name, [(1, 2.0), (2, 3.0)], 1, dashed=True)], **labels),
        histogram([1, 2, 4], [3, 5], mark=2.5, **labels),
        heat_map([[0.0, 0.5]], label=name),
        scatter_chart([Spot(name, 1, 0.5), Spot("b", 9, 0.7, compared=False)], **labels, lower_is_better=False),
    ]


class TestInAPage:
    @pytest.mark.filterwarnings("error")
    def test_names_are_text_whatever_they_hold(self) -> None:
        printable = HOSTILE.replace("\x1b\udcff", "\ufffd\ufffd")
        curves_, bars, heat, spots = map(ElementTree.fromstring, all_charts(HOSTILE))
        assert printable in words(curves_) and f"{printable}: 2 at 1" in titled(curves_)
        assert printable in words(bars) and heat.attrib["aria-label"] == printable
        assert f"{printable}: 0.5 at 1" in titled(spots)

    def test_nothing_in_a_chart_reaches_out_of_it(self) -> None:
        for svg in all_charts("a"):
            tags = {element.tag for element in ElementTree.fromstring(svg).iter()}
            assert tags <= {"svg", "g", "title", "path", "text"}
            assert not re.search(r"http|url\(|href|xmlns|\bid=|class=\"(?!chart)|font-family|#", svg)

    def test_its_colours_are_the_pages_in_light_and_in_dark(self) -> None:
        style = (files("eupe.report") / "templates" / "base.html").read_text()
        for variable in VARIABLES.values():
            assert len(re.findall(rf"{variable}: #", style)) == 2
        assert all(set(re.findall(r"var\((.*?)\)", svg)) <= set(VARIABLES.values()) for svg in all_charts("a"))

    def test_the_same_values_give_the_same_bytes_whatever_the_readers_settings(self) -> None:
        plain = all_charts("a")
        with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
            before = dict(matplotlib.rcParams)
            assert all_charts("a") == plain
            assert dict(matplotlib.rcParams) == before

    @pytest.mark.slow
    def test_nothing_is_loaded_before_something_is_drawn(self) -> None:
        modules = "eupe.cli, eupe.extract.job, eupe.train.loop, eupe.report.report_page, eupe.report.stats_page"
        code = (
            f"import sys, {modules}, eupe.report.viz_page; print('matplotlib' in sys.modules); "
            "eupe.report.charts.heat_map([[1.0]], label=''); print('matplotlib.pyplot' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["False", "False"], "nor is the global state of pyplot used"


def test_ramps_rise_in_lightness() -> None:
    for name in ("viridis", "magma"):
        stops = np.array([list(bytes.fromhex(stop[1:])) for stop in colour_stops(name)])
        assert len(stops) == 10 and (np.diff(stops @ (0.2126, 0.7152, 0.0722)) > 0).all()
