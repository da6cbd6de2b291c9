"""The page itself: one HTML file without scripts, fonts or links, every string from outside escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eupe.evaluate.page import fill_template
from eupe.evaluate.viz_chart import Series, svg_chart
from eupe.evaluate.viz_history import Cosine, History

TEMPLATE = "viz_page.html"
JPEG_QUALITY = 90


@dataclass(frozen=True)
class PictureCell:
    """The first cell of a row."""

    key: str
    label: str | None
    held_out: bool
    pixels: NDArray[np.uint8]
    """[S, S, 3]: the view that all models saw."""


@dataclass(frozen=True)
class ModelColumn:
    """A column: a model, and its map of every picture."""

    name: str
    kind: str
    """store, run or teacher."""
    about: str
    """Whose features these are, where the name does not say."""
    size: int
    grid: int
    dim: int
    explained: float
    """Share of the tokens' variance that the colours show."""
    maps_PhwC: NDArray[np.uint8]


def render_page(
    pictures: Sequence[PictureCell], models: Sequence[ModelColumn], histories: Sequence[tuple[str, History]]
) -> str:
    """The whole page; `histories` are the runs among the models, by name."""
    names = ", ".join(model.name for model in models)
    return fill_template(
        TEMPLATE,
        title=escape(f"Dense features of {names}"),
        names=escape(names),
        counts=f"{_count(len(models), 'model')}, {_count(len(pictures), 'picture')}",
        columns=len(models) + 1,
        held_out=HELD_OUT_LEGEND if any(picture.held_out for picture in pictures) else "",
        heads="\n".join(_head(model) for model in models),
        rows="\n".join(_row(picture, i, models) for i, picture in enumerate(pictures)),
        runs="\n".join(_run(name, history) for name, history in histories),
    )


HELD_OUT_LEGEND = '<li><span class="tag">held out</span> never trained on by any run shown here</li>'


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _head(model: ModelColumn) -> str:
    facts = (
        f"{model.size} px",
        f"{model.grid}×{model.grid} cells",
        f"{model.dim} channels",
        f"{model.explained:.0%} of variance",
    )
    about = [f'<span class="about">{escape(model.about)}</span>'] if model.about else []
    spans = " ".join([*about, *(f"<span>{fact}</span>" for fact in facts)])
    return (
        f'<div class="head"><b title="{escape(model.name)}">{escape(model.name)}</b>'
        f'<span class="kind {model.kind}">{model.kind}</span><p>{spans}</p></div>'
    )


def _row(picture: PictureCell, i: int, models: Sequence[ModelColumn]) -> str:
    label = f'<span class="label">{escape(picture.label)}</span>' if picture.label is not None else ""
    tag = '<span class="tag">held out</span>' if picture.held_out else ""
    what = escape(picture.key)
    view = _figure("the view", f'<img src="{jpeg_uri(picture.pixels)}" alt="The view of {what}">')
    maps = "\n".join(_map(model, i, what) for model in models)
    return f"<article><h3>{what}{label}{tag}</h3>\n<div class='cells'>\n{view}\n{maps}\n</div></article>"


def _map(model: ModelColumn, i: int, what: str) -> str:
    name, source = escape(model.name), png_uri(model.maps_PhwC[i])
    return _figure(name, f'<img class="map" src="{source}" alt="PCA map of {what} by {name}">')


def _figure(caption: str, image: str) -> str:
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def png_uri(pixels: NDArray[np.uint8]) -> str:
    """A small map, exactly."""
    return _data_uri(pixels, "png", optimize=True)


def jpeg_uri(pixels: NDArray[np.uint8]) -> str:
    """A photograph, nearly."""
    return _data_uri(pixels, "jpeg", quality=JPEG_QUALITY)


def _data_uri(pixels: NDArray[np.uint8], kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _run(name: str, history: History) -> str:
    charts = []
    if history.losses:
        charts.append(_chart("Training loss", history.losses, name, "loss", allow_log=True))
    if history.cosines:
        charts.append(_chart("Validation on held-out pictures", history.cosines, name, "normalised cosine"))
    facts = f"<p>{escape(history.facts)}</p>" if history.facts else ""
    body = "\n".join(charts) or "<p>This run has no log.</p>"
    return (
        f'<section class="training"><h2>Training of {escape(name)}</h2>{facts}\n'
        f'<div class="charts">{body}</div>\n{_outcome(history.outcome)}</section>'
    )


def _chart(title: str, series: Sequence[Series], run: str, y_label: str, *, allow_log: bool = False) -> str:
    drawn = svg_chart(series, label=f"{title}: {run}", y_label=y_label, x_label="step", allow_log=allow_log)
    keys = "".join(
        '<li><svg viewBox="0 0 26 8" aria-hidden="true">'
        f'<line class="{one.css}" x1="1" x2="25" y1="4" y2="4"/></svg>'
        f"{escape(one.name)} <b>{one.points[-1][1]:.3g}</b></li>"
        for one in series
    )
    return f'<figure><h3>{escape(title)}</h3>{drawn}<ul class="keys">{keys}</ul></figure>'


def _outcome(rows: Sequence[Cosine]) -> str:
    if not rows:
        return ""
    return OUTCOME_TABLE.format(body="\n".join(_outcome_row(row) for row in rows))


def _outcome_row(row: Cosine) -> str:
    gain = row.raw - row.mean_raw
    return (
        f'<tr><th scope="row">{escape(row.target)}</th><td>{escape(row.tokens)}</td>'
        f"<td>{row.normalised:.4f}</td><td>{row.raw:.4f}</td><td>{row.mean_raw:.4f}</td>"
        f'<td class="{"better" if gain > 0 else "worse"}">{gain:+.4f}</td></tr>'
    )


OUTCOME_TABLE = """<div class="scroll"><table>
<caption>Cosine between what the finished student predicts and what the teacher said, on held-out pictures.
<i>Normalised</i>: channels standardised as in the loss, where always saying the teacher's mean feature
scores about 0.
<i>Mean feature</i>: what that constant answer scores on the raw features.</caption>
<thead><tr><th scope="col">target</th><th scope="col">tokens</th>
<th scope="col">normalised</th><th scope="col">raw</th><th scope="col">mean feature</th>
<th scope="col">raw − mean feature</th></tr></thead>
<tbody>
{body}
</tbody></table></div>"""
