"""What a chart's SVG shows, read back from it."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from eupe.report.charts import LEFT

Places = NDArray[np.float64]


def drawn_in(page: str) -> dict[str, ElementTree.Element]:
    """Every chart of a page by its label."""
    found = [ElementTree.fromstring(svg) for svg in re.findall(r'<svg class="chart".*?</svg>', page, re.DOTALL)]
    return {svg.attrib["aria-label"]: svg for svg in found}


def titled(svg: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """Return the path of each mark that shows a title under the pointer, by title."""
    return {str(group[0].text): group[1] for group in svg.iter("g")}


def places(path: ElementTree.Element) -> Places:
    """Corners of a path: [N, 2]; of a curved one, what steers it too."""
    return np.array(re.findall(r"-?[\d.]+", path.attrib["d"]), dtype=float).reshape(-1, 2)


def curves(svg: ElementTree.Element) -> list[Places]:
    """Lines that are neither of the grid nor marks."""
    marks = set(titled(svg).values())
    lines = [path for path in svg.iter("path") if path.attrib["style"].startswith("fill: none") and path not in marks]
    return [places(path) for path in lines if not re.search(r"stroke: var\(--(line|soft)\)", path.attrib["style"])]


def values(svg: ElementTree.Element, heights: Places) -> Places:
    """Return the values at heights in px, as a linear vertical axis shows them."""
    grid = [places(path)[0, 1] for path in svg.iter("path") if "stroke: var(--line)" in path.attrib["style"]]
    beside = (text for text in svg.iter("text") if 20 < float(text.get("x", "0")) < LEFT)
    numbers = [float(text.text or "") for text in beside]
    slope, start = np.polyfit(grid, numbers, 1)
    return np.asarray(start + slope * heights)
