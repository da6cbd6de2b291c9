"""The page itself: one HTML file without fonts or links; every string from outside is escaped.

Its one script is allowed by its hash. The page also works without scripts, except that patches cannot be compared.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from html import escape
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eupe.pages.colour_ramps import MAGMA, VIRIDIS, Ramp, css_gradient, svg_component_filter
from eupe.pages.page import fill_template
from eupe.pages.viz_history import History
from eupe.pages.viz_maps import Colours, ModelColumn, PictureCell
from eupe.pages.viz_similarity import MAX_TEXT_BYTES, Embedding, channels_to_keep, embed
from eupe.pages.viz_training import render_training

TEMPLATE, SCRIPT = "viz_page.html", "viz_page.js"
JPEG_QUALITY = 90
COMPONENTS = ("first", "second", "third")


def render_page(
    pictures: Sequence[PictureCell], models: Sequence[ModelColumn], histories: Sequence[tuple[str, History]]
) -> str:
    """Return the whole page.

    Args:
        histories: names and histories of the runs among the models.
    """
    names = ", ".join(model.name for model in models)
    kept = channels_to_keep(sum(model.dense_PhwD[..., 0].size for model in models))
    embeddings = [embed(model.dense_PhwD, kept) if kept else None for model in models]
    rows = "\n".join(_row(picture, i, models, embeddings) for i, picture in enumerate(pictures))
    script = (files("eupe.pages") / SCRIPT).read_text(encoding="utf-8") if kept else ""
    return fill_template(
        TEMPLATE,
        title=escape(f"Dense features of {names}"),
        names=escape(names),
        counts=f"{_count(len(models), 'model')}, {_count(len(pictures), 'picture')}",
        columns=len(models) + 1,
        foreground=FOREGROUND_LEGEND if any(_asked_for_foreground(model.colours) for model in models) else "",
        held_out=HELD_OUT_LEGEND if any(picture.held_out for picture in pictures) else "",
        components_ramp=_ramp("components", VIRIDIS),
        similarity=SIMILARITY_LEGEND.format(ramp=_ramp("similarity", MAGMA)) if kept else NO_SIMILARITY_LEGEND,
        filters="".join(svg_component_filter(f"only-{name}", i, VIRIDIS) for i, name in enumerate(COMPONENTS)),
        heads="\n".join(_head(model) for model in models),
        rows=rows,
        exactness=_exactness(models, embeddings),
        runs="\n".join(render_training(name, history) for name, history in histories),
        megabytes=f"{len(rows) / 1e6:.2f}",
        policy=f"; script-src 'sha256-{_digest(script)}'" if script else "",
        script=f"<script>{script}</script>" if script else "",
    )


FOREGROUND_LEGEND = """<li>Only the <b>foreground</b> is in colour: the first component of all of a model's tokens is
split at its mean; the side that is more common along the pictures' borders is background and left blank, and the
colours show the components of the other tokens only.</li>"""

HELD_OUT_LEGEND = '<li><span class="tag">held out</span> not used for training by any run shown here</li>'

SIMILARITY_LEGEND = """<li class="scripted"><b>Click a patch</b> of any picture or map (or go there with Tab and the
arrow keys, and press Enter) to see how similar every model finds the picture's other patches to it: the cosine of their
features, coloured {ramp} from the least similar patch of a map to the patch itself.</li>"""

NO_SIMILARITY_LEGEND = f"""<li>There are too many maps to embed the features ({MAX_TEXT_BYTES / 1e6:.0f} MB at most)
that patches are compared by: show fewer pictures.</li>"""


def _asked_for_foreground(colours: Colours) -> bool:
    return colours.foreground is not None or bool(colours.note)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _digest(script: str) -> str:
    """Return the hash by which a content security policy allows a script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _ramp(name: str, ramp: Ramp) -> str:
    stops = " ".join(ramp)
    return f'<span class="ramp {name}" style="background:{css_gradient(ramp)}" data-stops="{stops}"></span>'


def _head(model: ModelColumn) -> str:
    colours = model.colours
    shares = "+".join(f"{100 * share:.0f}" for share in colours.explained)
    facts = [f"{model.size} px", f"{model.grid}×{model.grid} cells", f"{model.dim} channels"]
    if colours.foreground is None:
        facts.append(f"{shares}% of variance")
    else:
        facts += [f"{colours.foreground:.0%} foreground", f"{shares}% of its variance"]
    about = [f'<span class="long">{escape(model.about)}</span>'] if model.about else []
    note = f'<p class="note">{escape(colours.note)}</p>' if colours.note else ""
    spans = " ".join(
        [*about, *(f"<span>{fact}</span>" for fact in facts[:-1]), f'<span class="long">{facts[-1]}</span>']
    )
    return (
        f'<div class="head"><b title="{escape(model.name)}">{escape(model.name)}</b>'
        f'<span class="kind {model.kind}">{model.kind}</span><p>{spans}</p>{note}</div>'
    )


def _row(picture: PictureCell, i: int, models: Sequence[ModelColumn], embeddings: Sequence[Embedding | None]) -> str:
    label = f'<span class="label">{escape(picture.label)}</span>' if picture.label is not None else ""
    tag = '<span class="tag">held out</span>' if picture.held_out else ""
    what = escape(picture.key)
    view = _figure("the view", f'<img src="{jpeg_uri(picture.pixels)}" alt="The view of {what}">')
    maps = "\n".join(_map(*pair, i, what) for pair in zip(models, embeddings, strict=True))
    return f"<article><h3>{what}{label}{tag}</h3>\n<div class='cells'>\n{view}\n{maps}\n</div></article>"


def _map(model: ModelColumn, embedding: Embedding | None, i: int, what: str) -> str:
    name, source = escape(model.name), png_uri(model.colours.maps_PhwC[i])
    data = ""
    if embedding is not None:
        features = base64.b64encode(embedding.codes_PNK[i].tobytes()).decode()
        data = f' data-grid="{model.grid}" data-features="{features}"'
    return _figure(name, f'<img class="map" src="{source}" alt="PCA map of {what} by {name}">', data)


def _figure(caption: str, image: str, data: str = "") -> str:
    return f'<figure><div class="frame"{data}>{image}</div><figcaption>{caption}</figcaption></figure>'


def png_uri(pixels: NDArray[np.uint8]) -> str:
    """Encode a small map, without loss."""
    return _data_uri(pixels, "png", optimize=True)


def jpeg_uri(pixels: NDArray[np.uint8]) -> str:
    """Encode a photograph, with loss."""
    return _data_uri(pixels, "jpeg", quality=JPEG_QUALITY)


def _data_uri(pixels: NDArray[np.uint8], kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _exactness(models: Sequence[ModelColumn], embeddings: Sequence[Embedding | None]) -> str:
    """Return a table of how close the page's cosines are to those of the full features."""
    shown = [(model, embedding) for model, embedding in zip(models, embeddings, strict=True) if embedding is not None]
    if not shown:
        return ""
    num_bytes = sum(embedding.codes_PNK.nbytes for _, embedding in shown) * 4 / 3  # as base64
    body = "\n".join(
        f'<tr><th scope="row">{escape(model.name)}</th><td>{embedding.codes_PNK.shape[-1]} of {model.dim}</td>'
        f"<td>{embedding.mean_error:.4f}</td><td>{embedding.largest_error:.4f}</td></tr>"
        for model, embedding in shown
    )
    return EXACTNESS_SECTION.format(body=body, megabytes=num_bytes / 1e6, most=MAX_TEXT_BYTES / 1e6)


EXACTNESS_SECTION = """<section class="exactness scripted">
<h2>How exact the similarities are</h2>
<p>They are computed in this page, from {megabytes:.2f} MB of features ({most:.0f} MB at most): every patch keeps the
channels along which a model's patches are largest, rounded to 8 bits.</p>
<div class="scroll"><table>
<caption>Differences from the cosines of the full features, over all pairs of patches of a picture.</caption>
<thead><tr><th scope="col">model</th><th scope="col">channels kept</th><th scope="col">mean difference</th>
<th scope="col">largest difference</th></tr></thead>
<tbody>
{body}
</tbody></table></div></section>"""
