"""A report as one HTML file without scripts, fonts or links; every string from outside is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from eupe.evaluate.agreement import TASK as AGREEMENT
from eupe.evaluate.conflict import TASK as CONFLICT
from eupe.evaluate.latency import TASK as LATENCY
from eupe.pages.page import fill_template
from eupe.pages.report import Cell, Column, Merged, Model
from eupe.pages.report_licences import Licence
from eupe.pages.report_maps import Maps
from eupe.pages.report_tables import agreement_section, conflict_section, details_section, licence_section
from eupe.pages.report_words import (
    ABSENT,
    AHEAD,
    AHEAD_LEGEND,
    BASELINES,
    BEST_LEGEND,
    MARK_LEGEND,
    Head,
    heads,
    number,
    rows,
    task_title,
)
from eupe.pages.scatter import Spot, svg_scatter
from eupe.pages.viz_page import jpeg_uri, png_uri

TEMPLATE = "report_page.html"
MOST_CHARTS = 6
FEWEST_SPOTS = 2


def render_report(
    merged: Merged, *, title: str, sources: Sequence[str], licences: Sequence[Licence], maps: Maps | None
) -> str:
    """Return the whole page.

    Args:
        sources: runs and files that the results came from, as the user named them.
        maps: maps of the runs, if pictures were given.
    """
    named = heads(merged.columns)
    tasks = dict.fromkeys(task_title(column.task) for column in merged.columns)
    models = sum(not model.is_baseline for model in merged.models)
    sections = [
        _scores(merged, named),
        _charts(merged, named),
        agreement_section(merged.apart.get(AGREEMENT, ())),
        conflict_section(merged.apart.get(CONFLICT, ())),
        "" if maps is None else _maps(maps),
        details_section(merged, named),
        licence_section(licences),
    ]
    return fill_template(
        TEMPLATE,
        title=escape(title),
        lead=escape(" · ".join([_count(models, "model"), *tasks])),
        sources=escape(", ".join(sources)),
        sections="\n".join(section for section in sections if section),
        columns=1 if maps is None else 1 + len(maps.runs),
    )


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _scores(merged: Merged, named: Sequence[Head]) -> str:
    if not merged.columns:
        return ""
    models, baselines = rows(merged)
    body = f"<tbody>\n{_rows(models)}\n</tbody>"
    if baselines:
        width = len(merged.columns) + 1
        body += (
            f'\n<tbody class="baselines"><tr><th scope="rowgroup" colspan="{width}">{BASELINES}</th></tr>\n'
            f"{_rows(baselines)}\n</tbody>"
        )
    columns = "".join(map(_column_head, named))
    return (
        '<section class="scores"><div class="scroll"><table>\n'
        f"<caption>{_legend(merged)}</caption>\n"
        f'<thead><tr><th scope="col">model</th>{columns}</tr></thead>\n{body}</table></div></section>'
    )


def _column_head(head: Head) -> str:
    spans = (f"<span>{escape(word)}</span>" for word in (head.data, head.measure, *head.apart) if word)
    return f'<th scope="col"><b>{escape(head.task)}</b>{"".join(spans)}</th>'


def _rows(members: Sequence[tuple[Model, list[Cell | None]]]) -> str:
    return "\n".join(
        f'<tr><th scope="row" title="{escape(model.subject)}">{escape(model.name)}'
        f'<span class="kind {escape(model.kind)}">{escape(model.kind)}</span></th>{"".join(map(_cell, cells))}</tr>'
        for model, cells in members
    )


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return f'<td class="absent">{ABSENT}</td>'
    css = "best" if cell.best else "ahead" if cell.ahead else "marked" if cell.mark else "plain"
    ahead = f'<span class="flag">{AHEAD}</span>' if cell.ahead else ""
    mark = f"<sup>{cell.mark}</sup>" if cell.mark else ""
    return f'<td class="{css}">{ahead}<span>{number(cell.value, largest=cell.largest)}</span>{mark}</td>'


def _legend(merged: Merged) -> str:
    cells = [cell for column in merged.columns for cell in column.cells.values()]
    legends = [f'<b class="best">bold</b> {BEST_LEGEND}'] if any(cell.best for cell in cells) else []
    legends += [f'<span class="flag">{AHEAD}</span> {AHEAD_LEGEND}'] if any(cell.ahead for cell in cells) else []
    legends += [f"<sup>{letter}</sup> {MARK_LEGEND}: {escape(words)}" for letter, words in merged.marks.items()]
    legends.append("Each data set and each protocol has its own column; see the details below.")
    return "".join(f"<p>{legend}</p>" for legend in legends)


def _charts(merged: Merged, named: Sequence[Head]) -> str:
    """Draw quality over latency: a chart for each column in which two models or more have both."""
    costs = [column for column in merged.columns if column.task == LATENCY]
    drawn = []
    for column, head in zip(merged.columns, named, strict=True):
        best = max(costs, key=lambda cost: len(_spots(merged, column, cost)), default=None)
        if column.task == LATENCY or best is None or len(spots := _spots(merged, column, best)) < FEWEST_SPOTS:
            continue
        cost = named[merged.columns.index(best)]
        x_label = f"ms per picture at {cost.data}" + "".join(f", {word}" for word in cost.apart)
        what = ", ".join(word for word in (head.task, head.data, *head.apart) if word)
        label = f"{what} over {x_label}"
        chart = svg_scatter(
            spots, label=label, x_label=x_label, y_label=head.measure, lower_is_better=column.lower_is_better
        )
        drawn.append(f"<figure><h3>{escape(what)}</h3>{chart}</figure>")
    if not drawn:
        return ""
    note = "The line joins the models that no other model beats in time or quality without being worse in the other."
    return (
        f'<section><h2>Quality and time</h2><p class="note">{note}</p>\n'
        f'<div class="charts">{"".join(drawn[:MOST_CHARTS])}</div></section>'
    )


def _spots(merged: Merged, column: Column, cost: Column) -> list[Spot]:
    """Return the points of models, not baselines, that have a score in both columns; marks are part of their names."""
    spots = []
    for i, model in enumerate(merged.models):
        if model.is_baseline or i not in column.cells or i not in cost.cells:
            continue
        marks = dict.fromkeys(mark for mark in (column.cells[i].mark, cost.cells[i].mark) if mark)
        name = f"{model.name} ({', '.join(marks)})" if marks else model.name
        spots.append(Spot(name, cost.cells[i].value, column.cells[i].value, compared=not marks))
    return [spot for spot in spots if math.isfinite(spot.quality) and math.isfinite(spot.cost) and spot.cost > 0]


def _maps(maps: Maps) -> str:
    names = "".join(
        f"<div><b>{escape(run.name)}</b><span>{run.size} px, {run.maps_PhwC.shape[1]}×{run.maps_PhwC.shape[2]} cells"
        "</span></div>"
        for run in maps.runs
    )
    body = []
    for i, picture in enumerate(maps.pictures):
        what = escape(picture.key)
        tag = '<span class="tag">held out</span>' if picture.held_out else ""
        cells = [f'<img src="{jpeg_uri(maps.views_PSSC[i])}" alt="The view of {what}">']
        cells += [
            f'<img class="map" src="{png_uri(run.maps_PhwC[i])}" alt="PCA map of {what} by {escape(run.name)}">'
            for run in maps.runs
        ]
        body.append(f'<h3>{what}{tag}</h3><div class="cells">{"".join(cells)}</div>')
    note = (
        "The three leading principal components of a run's patch tokens as red, green and blue; a run has one "
        "projection for all pictures, so compare down a column. All runs saw the centre of each picture."
    )
    return (
        f'<section class="maps"><h2>Dense features</h2><p class="note">{note}</p>\n<div class="cells names">'
        f"<div><b>picture</b></div>{names}</div>\n{''.join(body)}</section>"
    )
