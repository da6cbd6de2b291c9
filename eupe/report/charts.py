"""Charts as inline SVG, drawn by matplotlib: curves, histograms, heat maps, and models by cost and quality.

Text stays text, in the page's font. Colours are the page's CSS variables, so charts follow light and dark. The same
values give the same bytes. The `label` of a chart is its description for screen readers.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

# matplotlib is imported where it draws: statistics are printed, and reports written as Markdown, without it.
if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 40
"""Size of a chart and the margins around its axes, in px."""
DPI = 72
"""At 72 dots an inch, a point of matplotlib's is a pixel of the SVG."""
INK, SOFT, LINE, CARD = "#1b1c20", "#62656e", "#e1e1dc", "#ffffff"
SERIES = ("#3b5bdb", "#d9480f", "#2b8a3e", "#9c36b5", "#0b7285", "#a16207")
HEAT = SERIES[1]
VARIABLES = {
    INK: "--ink",
    SOFT: "--soft",
    LINE: "--line",
    CARD: "--card",
    **{colour: f"--c{i}" for i, colour in enumerate(SERIES)},
}
"""CSS variable of the page that takes the place of each colour."""
STYLE: dict[Any, object] = {
    "font.size": 12,
    "text.color": SOFT,
    "text.parse_math": False,  # names may have dollar signs
    "axes.labelcolor": SOFT,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "lines.scale_dashes": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "eupe",
}
UNPRINTABLE = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML cannot contain: control characters, and the surrogates of file names that are not UTF-8."""

TITLE = "title: "
"""Beginning of the ids by which a group of the SVG gets its title."""
KEPT = ("d", "x", "y", "transform", "style")
"""Attributes of matplotlib's SVG that are kept."""

MAX_POINTS = 300
"""A curve with more points is drawn as this many means of consecutive points."""
LOG_FROM = 3.0
"""Positive values get a logarithmic axis, if allowed, when the largest is at least this many times the smallest."""
LOG_TICKS = ((20.0, (1, 1.5, 2, 3, 5, 7)), (1000.0, (1, 2, 5)), (math.inf, (1,)))
"""Largest ratio of an axis's ends, and the factors of powers of ten that get ticks up to that ratio."""
MARKED_POINTS = 12
"""A curve with at most this many points shows each of them."""
LEAST_BAR_PX = 1.5
"""Least height of a bar that is not zero, so that rare values can be seen."""
PADDING_BINS = 3
"""Number of empty bins shown on either side of a histogram."""
HEAT_STEPS = 24
"""Number of steps in a heat map's scale."""
RADIUS = 4.5
"""Radius of a model's point."""
LINE_PX = 13.0
NAME_SHIFTS = (0, -1, 1, -2, 2, -3, 3)
"""Offsets of a name from its point, in lines, tried in turn."""
BACKDROP = {"facecolor": CARD, "edgecolor": "none", "pad": 1}
"""Box behind a name, which keeps it apart from the lines of the grid."""
MARGIN = 0.06
"""Share of the range of values that is left free at both ends."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A curve of a chart."""

    name: str
    points: Sequence[Point]
    """Points with rising x, all values finite."""
    colour: int | None = None
    """Number of one of the page's colours; None for its ink, drawn thicker."""
    dashed: bool = False

    @property
    def drawn_colour(self) -> str:
        """Return the colour that the curve is drawn in."""
        return INK if self.colour is None else SERIES[self.colour % len(SERIES)]

    @property
    def variable(self) -> str:
        """Return the CSS variable of the colour."""
        return VARIABLES[self.drawn_colour]


@dataclass(frozen=True)
class Spot:
    """A model's point."""

    name: str
    cost: float
    """Cost of the model, above 0."""
    quality: float
    compared: bool = True
    """False if its feature settings differ from the others'; it is then drawn hollow and is not part of the line."""


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """Return the points; if there are more than `most`, that many means of consecutive points."""
    if len(points) <= most:
        return list(points)
    means = [np.mean(part, axis=0) for part in np.array_split(np.asarray(points, dtype=float), most)]
    return [(float(x), float(y)) for x, y in means]


def linear_ticks(low: float, high: float, *, most: int = 6) -> list[float]:
    """Return about `most` round numbers, from the one at or below `low` to the one at or above `high`."""
    from matplotlib.ticker import MaxNLocator

    if high <= low:
        low, high = low - 0.5, low + 0.5
    return [float(tick) for tick in MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(low, high)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return the round numbers from `low` to `high`, denser on a shorter range."""
    from matplotlib.ticker import LogLocator

    factors = next(chosen for ratio, chosen in LOG_TICKS if high / low <= ratio)
    ticks = LogLocator(subs=factors, numticks=20).tick_values(low, high)
    return [float(tick) for tick in ticks if low <= tick <= high]


def needs_log(values: Sequence[float]) -> bool:
    """Return whether values are positive and their range is wide enough for a logarithmic axis."""
    return min(values) > 0 and max(values) / min(values) >= LOG_FROM


def line_chart(series: Sequence[Series], *, label: str, y_label: str, x_label: str, allow_log: bool = False) -> Markup:
    """Draw curves over a horizontal axis that starts at 0.

    Args:
        series: at least one, each with at least one point.
        allow_log: use a logarithmic axis if the values' range is wide enough; the axis's label then says so.
    """
    curves = [np.asarray(thin(one.points), dtype=float) for one in series]
    values = np.concatenate([curve[:, 1] for curve in curves]).tolist()
    log = allow_log and needs_log(values)
    with _new_axes(x_label, f"{y_label} (log scale)" if log else y_label) as axes:
        last = max(1.0, *(curve[-1, 0] for curve in curves))  # exactly, so that the curves fill the chart
        axes.set_xlim(0, last)
        _set_ticks(axes, "x", [tick for tick in linear_ticks(0, last) if tick <= last and tick.is_integer()])
        if log:
            _set_log(axes, "y", min(values), max(values))
        else:
            _set_linear(axes, "y", min(*values, 0.0), max(*values, 0.0))
        for one, curve in zip(series, curves, strict=True):
            _draw_curve(axes, one, curve)
        return _to_svg(axes, label)


def _draw_curve(axes: Axes, series: Series, points: NDArray[np.float64]) -> None:
    dashes = (0, (5, 3.5)) if series.dashed else "solid"
    width = 2.4 if series.colour is None else 1.8
    axes.plot(*points.T, color=series.drawn_colour, linestyle=dashes, linewidth=width)
    for x, y in points if len(points) <= MARKED_POINTS else ():
        face = CARD if series.dashed else series.drawn_colour
        _draw_dot(axes, (x, y), 3.2, face, series.drawn_colour, f"{series.name}: {y:.4g} at {x:g}")


def histogram(
    edges: Sequence[float], counts: Sequence[int], *, mark: float, label: str, x_label: str, y_label: str
) -> Markup:
    """Draw bars over a logarithmic axis, each the share of one bin in the total; empty bins at both ends are cut.

    Args:
        edges: one more than `counts`, rising by a constant factor.
        counts: at least one is not zero.
        mark: value at which a dashed line is drawn.
    """
    used = np.flatnonzero(counts).tolist()
    step, total = edges[1] / edges[0], sum(counts)
    low, high = edges[used[0]] * step**-PADDING_BINS, edges[used[-1] + 1] * step**PADDING_BINS
    with _new_axes(x_label, y_label) as axes:
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        _set_ticks(axes, "x", log_ticks(low, high))
        _set_linear(axes, "y", 0.0, max(counts) / total)
        least = LEAST_BAR_PX / (HEIGHT - TOP - BOTTOM) * axes.get_ylim()[1]
        for i in used:
            # a twentieth of the bin stays free on either side
            left, right = edges[i] * step**0.05, edges[i + 1] * step**-0.05
            title = f"{edges[i]:.4g} to {edges[i + 1]:.4g}: {counts[i]:,} ({counts[i] / total:.3%})"
            bar = axes.bar(left, max(counts[i] / total, least), right - left, align="edge", color=SERIES[0])
            bar[0].set_gid(f"{TITLE}{title}")
        axes.axvline(mark, color=INK, linewidth=1.5, linestyle=(0, (5, 3.5)))
        return _to_svg(axes, label)


def heat_map(rates: Sequence[Sequence[float]], *, label: str) -> Markup:
    """Draw a grid of cells, each with the opacity of its share, beside a scale from 0 to the largest share.

    Args:
        rates: rows of shares, at least one of them above 0.
    """
    rows, columns, largest = len(rates), len(rates[0]), max(map(max, rates))
    side = min((HEIGHT - TOP - BOTTOM) / rows, (WIDTH - 2 * LEFT - 80) / columns)
    with _new_axes() as axes:
        axes.set_position(_share(LEFT, HEIGHT - TOP - side * rows, side * columns, side * rows))
        axes.set(xlim=(0, columns), ylim=(rows, 0), xlabel="column", ylabel="row")
        axes.set_xticks([0.5, columns - 0.5], labels=["0", str(columns - 1)])
        axes.set_yticks([0.5, rows - 0.5], labels=["0", str(rows - 1)])
        axes.grid(False)
        _draw_box(axes, (0, 0), columns, rows, LINE)
        for (i, j), rate in np.ndenumerate(rates):
            if rate > 0:
                title = f"row {i}, column {j}: {rate:.2%} of views"
                _draw_box(axes, (j + 0.04, i + 0.04), 0.92, 0.92, HEAT, alpha=rate / largest, title=title)
        _draw_scale(axes, LEFT + side * columns + 40, side * rows, largest)
        return _to_svg(axes, label)


def _draw_scale(axes: Axes, left: float, height: float, largest: float) -> None:
    scale = axes.figure.add_axes(_share(left, HEIGHT - TOP - height, 14, height))
    _clear(scale)
    scale.set(xlim=(0, 1), ylim=(0, 1), xticks=[])
    scale.yaxis.tick_right()
    scale.set_yticks([0, 0.5, 1], labels=[f"{100 * share * largest:.3g}%" for share in (0, 0.5, 1)])
    _draw_box(scale, (0, 0), 1, 1, LINE)
    for i in range(HEAT_STEPS):
        _draw_box(scale, (0, i / HEAT_STEPS), 1, 1 / HEAT_STEPS, HEAT, alpha=(i + 0.5) / HEAT_STEPS)


def front(spots: Sequence[Spot], *, lower_is_better: bool) -> list[Spot]:
    """Return the Pareto front by rising cost: spots that no other beats in one measure without losing in the other."""
    sign = -1.0 if lower_is_better else 1.0
    kept: list[Spot] = []
    compared = [spot for spot in spots if spot.compared]
    for spot in sorted(compared, key=lambda spot: (spot.cost, -sign * spot.quality)):
        if not kept or sign * spot.quality > sign * kept[-1].quality:
            kept.append(spot)
    return kept


def scatter_chart(spots: Sequence[Spot], *, label: str, x_label: str, y_label: str, lower_is_better: bool) -> Markup:
    """Draw a named point for each model, cost to the right and quality upwards, and a line through the Pareto front.

    There is at least one spot, and all values are finite. If lower is better, better points are further down.
    """
    costs, qualities = [spot.cost for spot in spots], [spot.quality for spot in spots]
    log = needs_log(costs)
    with _new_axes(f"{x_label} (log scale)" if log else x_label, y_label) as axes:
        if log:
            _set_log(axes, "x", min(costs) / 1.2, max(costs) * 1.2)
        else:
            _set_linear(axes, "x", 0.0, max(costs) * (1 + MARGIN))
        spare = MARGIN * (max(qualities) - min(qualities))
        _set_linear(axes, "y", min(qualities) - spare, max(qualities) + spare)
        best = front(spots, lower_is_better=lower_is_better)
        line = [(spot.cost, spot.quality) for spot in best]
        axes.plot(*zip(*line, strict=True), color=SERIES[0], linestyle=(0, (2, 4)), linewidth=1.8, alpha=0.7)
        for spot in spots:
            colour = SERIES[0] if spot in best else SOFT
            title = f"{spot.name}: {spot.quality:.4g} at {spot.cost:.4g}"
            face = colour if spot.compared else CARD
            _draw_dot(axes, (spot.cost, spot.quality), RADIUS, face, colour, title)
        _write_names(axes, spots, line)
        return _to_svg(axes, label)


def _write_names(axes: Axes, spots: Sequence[Spot], line: Sequence[Point]) -> None:
    """Write names beside their points, clear of all points, names and the line; leave out those that have no place."""
    from matplotlib.path import Path as Outline
    from matplotlib.transforms import Bbox

    centres = axes.transData.transform([(spot.cost, spot.quality) for spot in spots])
    taken = [Bbox.from_bounds(x - RADIUS, y - RADIUS, 2 * RADIUS, 2 * RADIUS) for x, y in centres]
    outline = Outline(axes.transData.transform(line))
    for spot, (x, y) in zip(spots, centres, strict=True):
        written = axes.text(0, 0, _printable(spot.name), transform=None, va="center_baseline", bbox=BACKDROP)
        for left, align, shift in _name_places(x, written.get_window_extent().width):
            written.set(x=left, y=y - shift * LINE_PX, ha=align)
            box = written.get_window_extent().padded(2)
            is_inside = box.y0 >= BOTTOM and box.y1 <= HEIGHT
            if is_inside and not box.count_overlaps(taken) and not outline.intersects_bbox(box, filled=False):
                taken.append(box)
                break
        else:
            written.remove()


def _name_places(x: float, width: float) -> Iterator[tuple[float, str, int]]:
    """Yield places for a name beside a point: x, alignment and offset in lines; the best first."""
    gap = RADIUS + 5
    sides = [(x + gap, "left", x + gap), (x - gap, "right", x - gap - width)]
    if x + gap + width > WIDTH - RIGHT:
        sides.reverse()
    for shift in NAME_SHIFTS:
        for at, align, start in sides:
            if LEFT <= start <= WIDTH - RIGHT - width:
                yield at, align, shift


@contextmanager
def _new_axes(x_label: str = "", y_label: str = "") -> Iterator[Axes]:
    """Yield empty axes in our style, which does not depend on the user's matplotlibrc, with labels at the edges."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        # letters that matplotlib's font lacks are in the reader's
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI)
        figure.patch.set_visible(False)
        axes = figure.add_axes(_share(LEFT, BOTTOM, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM))
        _clear(axes)
        axes.grid(axis="y", color=LINE, linewidth=1)
        middle, centre = (LEFT + WIDTH - RIGHT) / 2 / WIDTH, (BOTTOM + HEIGHT - TOP) / 2 / HEIGHT
        figure.text(middle, 4 / HEIGHT, _printable(x_label), ha="center", va="baseline")
        written = figure.text(11 / WIDTH, centre, _printable(y_label), ha="center", va="baseline", rotation=90)
        written.set_rotation_mode("anchor")
        yield axes


def _clear(axes: Axes) -> None:
    """Leave nothing of the axes but the numbers."""
    axes.patch.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=6)
    axes.set_axisbelow(True)


def _share(left: float, bottom: float, width: float, height: float) -> tuple[float, float, float, float]:
    """Return a box in px as shares of the chart."""
    return left / WIDTH, bottom / HEIGHT, width / WIDTH, height / HEIGHT


def _set_linear(axes: Axes, which: str, low: float, high: float) -> None:
    """Let an axis run from one round number to another, around both values."""
    ticks = linear_ticks(low, high, most=5)
    axes.set(**{f"{which}lim": (ticks[0], ticks[-1])})
    _set_ticks(axes, which, ticks)
    if which == "y" and ticks[0] <= 0 <= ticks[-1]:
        axes.axhline(0, color=SOFT, linewidth=1, zorder=0.9)


def _set_log(axes: Axes, which: str, low: float, high: float) -> None:
    """Let an axis be logarithmic and extend a little beyond both values."""
    low, high = low / 1.08, high * 1.08
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    _set_ticks(axes, which, log_ticks(low, high))


def _set_ticks(axes: Axes, which: str, ticks: Sequence[float]) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks([], minor=True)
    axis.set_ticks(ticks, labels=[short_number(tick) for tick in ticks])


def _draw_dot(axes: Axes, place: Point, radius: float, face: str, edge: str, title: str) -> None:
    """Draw a circle of a radius in px with words for the pointer; a marker of matplotlib's could have none."""
    from matplotlib.patches import Circle

    x, y = map(float, axes.transData.transform(place))
    gid = f"{TITLE}{_printable(title)}"
    axes.add_patch(
        Circle((x, y), radius, transform=None, facecolor=face, edgecolor=edge, linewidth=1.6, zorder=3, gid=gid)
    )


def _draw_box(
    axes: Axes, corner: Point, width: float, height: float, colour: str, *, alpha: float = 1.0, title: str | None = None
) -> None:
    from matplotlib.patches import Rectangle

    gid = None if title is None else f"{TITLE}{title}"
    axes.add_patch(Rectangle(corner, width, height, facecolor=colour, alpha=alpha, gid=gid))


def colour_stops(name: str, num_stops: int = 10) -> list[str]:
    """Return the colours of one of matplotlib's colour maps at equal steps from 0 to 1, as `#rrggbb`."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colour) for colour in colormaps[name](np.linspace(0, 1, num_stops))]


def short_number(value: float) -> str:
    """Format a number in short: 12000 as 12k, 0.5 as 0.5, 0.0001 as 1e-4."""
    if 0 < abs(value) < 0.01:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def _printable(words: str) -> str:
    return UNPRINTABLE.sub("\ufffd", words)


def _to_svg(axes: Axes, label: str) -> Markup:
    """Return the chart as an `svg` element without ids, links and style sheets, which would concern the whole page."""
    from matplotlib.figure import Figure

    written = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    assert isinstance(axes.figure, Figure)
    axes.figure.savefig(written, format="svg", metadata=no_metadata)
    drawn = ElementTree.fromstring(written.getvalue())
    svg = ElementTree.Element("svg", {"class": "chart", "viewBox": drawn.attrib["viewBox"], "role": "img"})
    svg.set("aria-label", _printable(label))
    _copy(drawn, svg)
    return Markup(ElementTree.tostring(svg, encoding="unicode"))


def _copy(source: ElementTree.Element, target: ElementTree.Element) -> None:
    """Copy paths and text; of matplotlib's groups, only those with a title stay."""
    for child in source:
        tag = child.tag.rpartition("}")[2]
        if tag == "g":
            _, has_title, title = child.get("id", "").partition(TITLE)
            into = ElementTree.SubElement(target, "g") if has_title else target
            if has_title:
                ElementTree.SubElement(into, "title").text = title
            _copy(child, into)
        elif tag in ("path", "text"):
            attributes = {name: _shortened(child.attrib[name]) for name in KEPT if name in child.attrib}
            if attributes.get("transform", "").startswith("rotate(-0 "):
                del attributes["transform"]
            ElementTree.SubElement(target, tag, attributes).text = child.text


def _shortened(value: str) -> str:
    """Shorten an attribute of matplotlib's SVG, and leave font and colours to the page."""
    value = re.sub(r"font-family: [^;]*;", "", value)
    value = re.sub(r"#[0-9a-f]{6}", lambda colour: f"var({VARIABLES[colour[0]]})", value)
    value = re.sub(r"\d+\.\d+", lambda number: f"{round(float(number[0]), 2):g}", value)
    return " ".join(value.split())
