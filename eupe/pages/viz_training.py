"""The training of the runs on a page, as HTML: their curves and outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from eupe.pages.viz_chart import Series, svg_chart
from eupe.pages.viz_history import Cosine, History


def render_training(name: str, history: History) -> str:
    """Return the section of one run."""
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
<caption>Cosine between the finished student's predictions and the teacher's features, on held-out pictures.
<i>Normalised</i>: channels standardised as in the loss, where always predicting the teacher's mean feature
scores about 0.
<i>Mean feature</i>: the score of that constant prediction on the raw features.</caption>
<thead><tr><th scope="col">target</th><th scope="col">tokens</th>
<th scope="col">normalised</th><th scope="col">raw</th><th scope="col">mean feature</th>
<th scope="col">raw − mean feature</th></tr></thead>
<tbody>
{body}
</tbody></table></div>"""
