"""A store's statistics in words, for the terminal, and as one HTML page without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from eupe.errors import ConfigError
from eupe.report.charts import MAX_POINTS, Point, Series, heat_map, histogram, line_chart
from eupe.report.page import count, make_place, render_template, write_whole
from eupe.store.stats import OUTLIER_RATIO
from eupe.store.summary import FIRST_COMPONENTS, StoreSummary, TokenSummary

NOISE = 1e-9
"""Eigenvalues below this share of the variance are rounding errors of the covariance, and are not drawn."""
ABSENT = "–"
SHOWN_CHANNELS = 5
NOTES = (
    "* from a histogram in quarter octaves; the mean is accurate to 9%.",
    "† participation ratio of the covariance's eigenvalues, (Σλ)² / Σλ².",
    f"‡ norm above {OUTLIER_RATIO:g} times the median of the token's view; rows and columns count from 0.",
)

Facts = list[tuple[str, str]]
"""Names and values, in reading order."""


class Drawing(NamedTuple):
    """A chart, or the reason why there is none, with the heading above it and the note below it."""

    title: str
    drawn: str | Markup
    note: str = ""


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
    return write_whole(make_place(out, overwrite=overwrite), render_stats_page(summary))


def render_stats_page(summary: StoreSummary) -> str:
    """Return the whole page."""
    name = summary.path.rpartition("/")[2]
    return render_template(
        "stats.html",
        title=f"Statistics of {name}",
        name=name,
        path=summary.path,
        identity=identity(summary),
        notes=NOTES,
        kinds=[token_title(token) for token in summary.tokens],
        rows=_rows(summary.tokens),
        sections=[(token_title(token), _drawings(token)) for token in summary.tokens],
    )


def _rows(tokens: Sequence[TokenSummary]) -> list[tuple[str, list[str]]]:
    """Return each fact with its value for each kind of token at each size."""
    columns = [dict(token_facts(token)) for token in tokens]
    names = max(columns, key=len)  # dense tokens have facts that summaries lack
    return [(name, [column.get(name, ABSENT) for column in columns]) for name in names]


def _drawings(token: TokenSummary) -> list[Drawing]:
    title = token_title(token)
    drawn = [_norms(token, title), _stds(token, title), _spectrum(token, title)]
    return drawn if token.outliers is None else [*drawn, _outliers(token, title)]


def _norms(token: TokenSummary, title: str) -> Drawing:
    drawn = histogram(
        token.norm_edges.tolist(),
        token.norms.tolist(),
        mark=token.median_norm,
        label=f"Histogram of norms: {title}",
        x_label="L2 norm of a token (log scale)",
        y_label="share of tokens",
    )
    return Drawing("Norms", drawn, f"Bins of a quarter octave. Dashed: the median, {token.median_norm:.4g}.")


def _stds(token: TokenSummary, title: str) -> Drawing:
    alive = np.sort(token.std[token.std > 0])[::-1]
    drawn = _falling_line(alive, f"Standard deviation of the channels: {title}", "std", "channel, most varying first")
    dead = len(token.std) - len(alive)
    return Drawing("Standard deviation by channel", drawn, f"Not drawn: constant channels ({dead})." if dead else "")


def _spectrum(token: TokenSummary, title: str) -> Drawing:
    shares = token.variance_shares
    drawn = _falling_line(shares[shares > NOISE], f"Eigenvalues: {title}", "share of variance", "principal component")
    note = f"Effective rank {token.effective_rank:.1f} of {token.num_channels}."
    return Drawing("Eigenvalues of the covariance", drawn, note)


def _falling_line(values: NDArray[np.float64], label: str, y_label: str, x_label: str) -> str | Markup:
    """Draw values over their rank, if there are any."""
    if not len(values):
        return "Nothing varies."
    series = Series(y_label, thin_out(values), colour=0)
    return line_chart([series], label=label, y_label=y_label, x_label=x_label, allow_log=True)


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


def _outliers(token: TokenSummary, title: str) -> Drawing:
    name = "Outlier tokens by position"
    rates = token.outlier_rates
    if rates is None or not rates.any():
        return Drawing(name, "No token of any view is an outlier.")
    drawn = heat_map(rates.tolist(), label=f"{name}: {title}")
    note = f"Share of views in which a cell's token is an outlier; most in {outlier_place(token)}."
    return Drawing(name, drawn, note)


def identity(summary: StoreSummary) -> Facts:
    """Return facts about the store as a whole."""
    spec, teacher = summary.spec, summary.spec.teacher
    return [
        ("teacher", f"{teacher['name']} ({teacher['backend']}: {teacher['model']}), {teacher['dtype']}"),
        ("licence of the weights", str(teacher["licence"])),
        ("pictures", _pictures(summary)),
        ("views", _views(summary)),
        ("sizes", ", ".join(f"{s} px ({_grid(g)})" for s, g in zip(spec.sizes, spec.grids, strict=True))),
        *([("earlier layers", _layers(spec.layers))] if spec.layers else []),
        ("precision", ", ".join(f"{kind} {spec.precision[kind]}" for kind in spec.tokens)),
        ("fidelity measured", _fidelity(summary)),
        ("on disk", f"{_bytes(summary.stored_bytes)}, {summary.stored_share:.1%} of raw float16"),
        ("completeness", f"finished, all {count(spec.num_parts, 'part')}"),
        ("values clipped / not finite", f"{summary.num_clipped:,} / {summary.num_nonfinite:,}"),
    ]


def _pictures(summary: StoreSummary) -> str:
    failed = f", {summary.num_failed:,} of them failed" if summary.num_failed else ", all with features"
    return f"{summary.spec.num_samples:,}{failed}"


def _views(summary: StoreSummary) -> str:
    views = summary.spec.views
    if views["policy"] != "rrc":
        return {"center": "the centre of each picture", "squash": "each whole picture, squashed"}[views["policy"]]
    return f"{count(summary.spec.num_views, 'random resized crop')} of each picture, seed {views['seed']}"


def _grid(side: int) -> str:
    return f"{side} × {side} cells"


def _layers(layers: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(
        f"{number} of {layer['of']} ({', '.join(map(_grid, layer['grids']))})" for number, layer in layers.items()
    )


def _fidelity(summary: StoreSummary) -> str:
    measured = [(token.fidelity["p5"], token.path) for token in summary.tokens if token.fidelity is not None]
    if not measured:
        return "not measured"
    worst, path = min(measured)
    return f"95% of tokens at a cosine of at least {worst:.6g} ({path})"


def token_title(token: TokenSummary) -> str:
    """Return a title like `224 px dense`."""
    return f"{token.size} px {token.kind}"


def token_facts(token: TokenSummary) -> Facts:
    """Return facts about one kind of token at one size."""
    facts = [
        ("vectors", f"{token.count:,}"),
        ("channels", str(token.num_channels)),
        ("norm, mean / median*", f"{token.mean_norm:.4g} / {token.median_norm:.4g}"),
        ("std of channels, least / median / largest", " / ".join(f"{std:.4g}" for std in token.std_range)),
        ("dead channels", _dead_channels(token)),
        ("effective rank†", f"{token.effective_rank:.1f} of {token.num_channels}"),
        (
            f"variance of the first {' / '.join(map(str, FIRST_COMPONENTS))} components",
            " / ".join(f"{token.explained(k):.1%}" for k in FIRST_COMPONENTS),
        ),
    ]
    if token.fidelity is not None:
        cosines = f"{token.fidelity['mean']:.6g} / {token.fidelity['p5']:.6g}"
        facts.insert(2, ("cosine to the teacher, mean / 5th percentile", cosines))
    if token.outliers is not None:
        share = f"{token.outlier_share:.3%}" if token.outlier_share else "none"
        facts += [("outlier tokens‡", share), ("cell with most outliers (share of views)", outlier_place(token))]
    return facts


def _dead_channels(token: TokenSummary) -> str:
    dead = token.dead_channels
    if not dead:
        return "none"
    more = ", …" if len(dead) > SHOWN_CHANNELS else ""
    return f"{len(dead)} ({', '.join(map(str, dead[:SHOWN_CHANNELS]))}{more})"


def outlier_place(token: TokenSummary) -> str:
    """Return in words the cell with the most outliers, and the share of views in which its token is one."""
    cell, rates = token.outlier_cell, token.outlier_rates
    if cell is None or rates is None:
        return "no cell"
    return f"row {cell[0]}, column {cell[1]} ({rates[cell]:.1%})"


def _bytes(number: int) -> str:
    value, unit = float(number), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
