"""Tables of a report below its scores: agreement, teachers against each other, protocols, licences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from eupe.evaluate.result import Result
from eupe.evaluate.verdict import JUDGED, MEASURED
from eupe.pages.report import Cell, Column, Merged, Model
from eupe.pages.report_licences import Licence
from eupe.pages.report_words import ABSENT, Head, measure_title, number, said
from eupe.store.layout import KINDS

AGREEMENT_NOTE = """<p>On pictures that were held out of the run's training. <i>Normalised</i>: mean cosine in the
loss's space, where always predicting the teacher's mean feature scores about 0. <i>Cosine</i>: mean cosine of raw
features; <i>mean feature</i>: the score of that constant prediction. <i>CKA</i>: unbiased linear CKA of what the heads
predict; <i>own CKA</i>: of the student's own tokens. <i>Neighbours</i>: share of the nearest views that summaries have
in common.</p>"""
LICENCE_NOTE = """<p>As recorded in runs and stores; what they allow for a model that learned from such weights is
not stated here.</p>"""
AGREEMENT_MEASURES = {
    "normalised": "normalised",
    "cosine": "cosine",
    "mean_feature": "mean feature",
    "cka": "CKA",
    "cka_own": "own CKA",
}
CONFLICT_MEASURES = {"cka": "CKA", "r2": "R² A to B", "r2_back": "R² B to A"}


def agreement_section(results: Sequence[Result]) -> str:
    """Return a table of runs by measures, with a group of rows for each target; runs of one group are comparable."""
    if not results:
        return ""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(_judged_alike(result), []).append(result)
    names = [*AGREEMENT_MEASURES.values(), "neighbours"]
    body = "".join(_agreement_group(group, 2 + len(names)) for group in groups.values())
    return (
        '<section class="agreement"><h2>Agreement with targets</h2>\n'
        f"{_table(['run', 'tokens', *names], body, AGREEMENT_NOTE)}</section>"
    )


def _judged_alike(result: Result) -> str:
    """Return a key of a comparable group: targets, held-out pictures and settings, except the student's own size."""
    protocol = {name: value for name, value in result.protocol.items() if name != "size"}
    data = {name: value for name, value in result.data.items() if name != "path"}
    return repr((sorted(protocol.items()), sorted(data.items())))


def _agreement_group(group: Sequence[Result], width: int) -> str:
    data = group[0].data
    what = f"{data.get('target', ABSENT)}: {data.get('views', '?')} held-out views"
    rows = [f'<tr class="group"><th scope="rowgroup" colspan="{width}">{escape(what)}</th></tr>']
    for result in group:
        for kind in KINDS:
            if f"normalised/{kind}" not in result.scores:
                continue
            cells = [_value(result.scores, f"{measure}/{kind}") for measure in AGREEMENT_MEASURES]
            shared = _value(result.scores, "mutual_neighbours") if kind == KINDS[0] else ""
            css = ' class="soft"' if result.untrained else ""
            rows.append(f"<tr{css}>{_names(result.name, kind)}{_tds([*cells, shared])}</tr>")
    return f"<tbody>{''.join(rows)}</tbody>"


def conflict_section(results: Sequence[Result]) -> str:
    """Return a table of pairs of stores, with their measures and verdicts."""
    if not results:
        return ""
    body = []
    for result in results:
        first, _, second = result.subject.partition(" ~ ")
        rows = []
        for kind in KINDS:
            if any(name.endswith(f"/{kind}") for name in result.scores):
                cells = [_value(result.scores, f"{measure}/{kind}") for measure in CONFLICT_MEASURES]
                shared = _value(result.scores, "mutual_neighbours") if kind == KINDS[0] else ""
                rows.append(f"<tr>{_names(first, second, kind)}{_tds([*cells, shared])}</tr>")
        body.append(f"<tbody>{''.join(rows)}{_verdict(result)}</tbody>")
    names = ["A", "B", "tokens", *CONFLICT_MEASURES.values(), "neighbours"]
    notes = "".join(f"<p>{escape(note)}</p>" for note in (MEASURED, JUDGED))
    return (
        '<section class="conflict"><h2>Teachers against each other</h2>\n'
        f"{_table(names, ''.join(body), notes)}</section>"
    )


def _verdict(result: Result) -> str:
    verdict = result.data.get("verdict")
    if not isinstance(verdict, dict):
        return ""
    word, why = (escape(str(verdict.get(name, ABSENT))) for name in ("word", "why"))
    return f'<tr><td class="verdict" colspan="7"><b>{word}</b>: {why}</td></tr>'


def details_section(merged: Merged, named: Sequence[Head]) -> str:
    """Return the protocol, data and all scores of each column, collapsed until opened."""
    if not merged.columns:
        return ""
    opened = "\n".join(
        f"<details><summary>{escape(head.words)}</summary>\n{_facts(column)}\n{_all_scores(column, merged.models)}"
        "</details>"
        for column, head in zip(merged.columns, named, strict=True)
    )
    return f'<section class="details"><h2>Details by task</h2>\n{opened}</section>'


def _facts(column: Column) -> str:
    facts: dict[str, Any] = {**column.data, **column.features, **column.protocol}
    return "<dl>" + "".join(_fact(name, value) for name, value in facts.items() if value is not None) + "</dl>"


def _fact(name: str, value: Any) -> str:
    return f"<div><dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(said(value))}</dd></div>"


def _all_scores(column: Column, models: Sequence[Model]) -> str:
    measures = list(dict.fromkeys(name for cell in column.cells.values() for name in cell.result.scores))
    body = "".join(_score_row(models[i], cell, measures) for i, cell in column.cells.items())
    return _table(["model", *map(measure_title, measures)], f"<tbody>{body}</tbody>", "")


def _score_row(model: Model, cell: Cell, measures: Sequence[str]) -> str:
    mark = f"<sup>{cell.mark}</sup>" if cell.mark else ""
    cells = _tds([_value(cell.result.scores, name) for name in measures])
    return f'<tr><th scope="row">{escape(model.name)}{mark}</th>{cells}</tr>'


def licence_section(licences: Sequence[Licence]) -> str:
    """Return a table of the licences of the weights behind each model."""
    if not licences:
        return ""
    body = "".join(
        f"<tr>{_names(each.model, Path(each.teacher).name)}<td>{escape(each.through) or ABSENT}</td>"
        f"<td>{escape(each.licence)}</td></tr>"
        for each in licences
    )
    table = _table(["model", "teacher", "through", "licence"], f"<tbody>{body}</tbody>", LICENCE_NOTE)
    return f'<section class="licences"><h2>Licences of the weights that models learned from</h2>\n{table}</section>'


def _table(names: Sequence[str], body: str, caption: str) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    below = f"<caption>{caption}</caption>" if caption else ""
    return f'<div class="scroll"><table>{below}<thead><tr>{head}</tr></thead>{body}</table></div>'


def _names(first: str, *others: str) -> str:
    rest = "".join(f'<td class="word">{escape(word)}</td>' for word in others)
    return f'<th scope="row">{escape(first)}</th>{rest}'


def _tds(cells: Sequence[str]) -> str:
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _value(scores: Mapping[str, float], name: str) -> str:
    return number(scores[name]) if name in scores else ABSENT
