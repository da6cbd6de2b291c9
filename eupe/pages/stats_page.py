"""A store's statistics as one HTML page without scripts, fonts or links; every string from outside is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eupe.errors import ConfigError
from eupe.pages.page import fill_template, make_place, write_whole
from eupe.pages.stats_words import NOTES, identity, outlier_place, token_facts, token_title
from eupe.pages.viz_chart import MAX_POINTS, Point, Series, svg_chart, svg_heat_map, svg_histogram
from eupe.store.summary import StoreSummary, TokenSummary

TEMPLATE = "stats_page.html"
NOISE = 1e-9
"""Eigenvalues below this share of the variance are rounding errors of the covariance, and are not drawn."""
ABSENT = "–"


def require_page_name(out: Path) -> None:
    """Raise ConfigError unless the name ends in .html, by which browsers recognise a page."""
    if out.suffix != ".html":
        raise ConfigError(f"--out {out} must end in .html")


def write_stats_page(summary: StoreSummary, out: Path, *, overwrite: bool = False) -> int:
    """Write the page, and return its size in bytes.

    Args:
        overwrite: replace what is there, whoever made it.
    Raises: ConfigError if `out` does not end in .html, or is there and may not be replaced; StorageError if it cannot
        be written.
    """
    require_page_name(out)
    return write_whole(make_place(out, overwrite=overwrite), render_stats_page(summary).encode(errors="replace"))


def render_stats_page(summary: StoreSummary) -> str:
    """Return the whole page."""
    name = summary.path.rpartition("/")[2]
    return fill_template(
        TEMPLATE,
        title=escape(f"Statistics of {name}"),
        name=escape(name),
        path=escape(summary.path),
        identity="\n".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in identity(summary)),
        notes="".join(f"<p>{escape(note)}</p>" for note in NOTES),
        heads="".join(f'<th scope="col">{escape(token_title(token))}</th>' for token in summary.tokens),
        rows=_rows(summary.tokens),
        sections="\n".join(_section(token) for token in summary.tokens),
    )


def _rows(tokens: Sequence[TokenSummary]) -> str:
    """Return one row for each fact, with one column for each kind of token at each size."""
    columns = [dict(token_facts(token)) for token in tokens]
    names = max(columns, key=len)  # dense tokens have facts that summaries lack
    return "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(column.get(name, ABSENT))}</td>" for column in columns)
        + "</tr>"
        for name in names
    )


def _section(token: TokenSummary) -> str:
    title = token_title(token)
    figures = [_norms(token, title), _stds(token, title), _spectrum(token, title)]
    if token.outliers is not None:
        figures.append(_outliers(token, title))
    body = "\n".join(figure for figure in figures if figure)
    return f'<section class="tokens"><h2>{escape(title)}</h2>\n<div class="charts">\n{body}\n</div></section>'


def _norms(token: TokenSummary, title: str) -> str:
    drawn = svg_histogram(
        token.norm_edges.tolist(),
        token.norms.tolist(),
        mark=token.median_norm,
        label=f"Histogram of norms: {title}",
        x_label="L2 norm of a token (log scale)",
        y_label="share of tokens",
    )
    return _figure("Norms", drawn, f"Bins of a quarter octave. Dashed: the median, {token.median_norm:.4g}.")


def _stds(token: TokenSummary, title: str) -> str:
    alive = np.sort(token.std[token.std > 0])[::-1]
    drawn = _falling_line(alive, f"Standard deviation of the channels: {title}", "std", "channel, most varying first")
    dead = len(token.std) - len(alive)
    return _figure("Standard deviation by channel", drawn, f"Not drawn: constant channels ({dead})." if dead else "")


def _spectrum(token: TokenSummary, title: str) -> str:
    shares = token.variance_shares
    drawn = _falling_line(shares[shares > NOISE], f"Eigenvalues: {title}", "share of variance", "principal component")
    note = f"Effective rank {token.effective_rank:.1f} of {token.num_channels}."
    return _figure("Eigenvalues of the covariance", drawn, note)


def _falling_line(values: NDArray[np.float64], label: str, y_label: str, x_label: str) -> str:
    if not len(values):
        return '<p class="note">Nothing varies.</p>'
    series = Series(y_label, thin_out(values), colour=0)
    return svg_chart([series], label=label, y_label=y_label, x_label=x_label, allow_log=True)


def thin_out(values: NDArray[np.float64]) -> list[Point]:
    """Return values over their rank from 1: all of them, or a selection that is denser towards the first."""
    last = len(values)
    if last <= MAX_POINTS:
        ranks = np.arange(1, last + 1)
    else:
        half = MAX_POINTS // 2
        chosen = np.concatenate([np.geomspace(1, last, half), np.linspace(1, last, half)])
        ranks = np.unique(np.rint(chosen).astype(np.int64))
    return [(float(rank), float(values[rank - 1])) for rank in ranks]


def _outliers(token: TokenSummary, title: str) -> str:
    name = "Outlier tokens by position"
    rates = token.outlier_rates
    if rates is None or not rates.any():
        return _figure(name, "", "No token of any view is an outlier.")
    drawn = svg_heat_map(rates.tolist(), label=f"{name}: {title}")
    note = f"Share of views in which a cell's token is an outlier; most in {outlier_place(token)}."
    return _figure(name, drawn, note)


def _figure(title: str, drawn: str, note: str) -> str:
    caption = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<figure><h3>{escape(title)}</h3>{drawn}{caption}</figure>"
