"""A report in words: what columns and numbers are called, the whole as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eupe.evaluate.latency import TASK as LATENCY
from eupe.evaluate.result import Result
from eupe.pages.report import Cell, Column, Merged, Model

TASKS = {
    "knn": "k-NN",
    "linear": "Linear probe",
    "zeroshot": "Zero-shot",
    "retrieval": "Retrieval",
    "vqa": "VQA",
    "segment": "Segmentation",
    "depth": "Depth",
    "correspond": "Correspondence",
    "latency": "Latency",
    "agreement": "Agreement with targets",
    "conflict": "Teachers against each other",
}
MEASURES = {"miou": "mIoU", "rmse": "RMSE", "pck": "PCK", "ms": "ms a picture"}
ABSENT = "–"
BASELINES = "baselines"
BEST_LEGEND = "the best of the models that may be compared"
AHEAD_LEGEND = "a baseline that is ahead of all of them"
MARK_LEGEND = "other features than the column's, compared with none"
AHEAD = "▲"


@dataclass(frozen=True)
class Head:
    """What a column is called."""

    task: str
    data: str
    """Last part of its place, and the side of what most of the models saw; of a cost only this."""
    measure: str
    """With an arrow to where it is better."""
    apart: tuple[str, ...]
    """What sets it apart from other columns of the same name."""

    @property
    def words(self) -> str:
        """On one line."""
        return ", ".join(word for word in (self.task, self.data, self.measure, *self.apart) if word)


def heads(columns: Sequence[Column]) -> list[Head]:
    """Names of the columns, no two of them alike."""
    plain = [_head(column) for column in columns]
    named = []
    for head, column in zip(plain, columns, strict=True):
        alike = [other for other, name in zip(columns, plain, strict=True) if name == head]
        named.append(Head(head.task, head.data, head.measure, _apart(column, alike)))
    return named


def _head(column: Column) -> Head:
    arrow = "↓" if column.lower_is_better else "↑"
    if column.task == LATENCY:
        data = f"{column.protocol.get('asked_size', '?')} px"
    else:
        size = [f"{column.features['size']} px"] if "size" in column.features else []
        data = ", ".join([Path(str(column.data.get("path", ""))).name, *size])
    return Head(task_title(column.task), data, f"{measure_title(column.measure)} {arrow}", ())


def _apart(column: Column, alike: Sequence[Column]) -> tuple[str, ...]:
    """What protocol, data or features say of a column that they do not say of all of the others."""

    def facts(one: Column) -> dict[str, Any]:
        return {**one.data, **one.features, **one.protocol}

    own = facts(column)
    names = dict.fromkeys(name for other in alike for name in facts(other))
    return tuple(
        f"{name.replace('_', ' ')} {said(own.get(name, ABSENT))}"
        for name in names
        if any(facts(other).get(name) != own.get(name) for other in alike)
    )


def task_title(task: str) -> str:
    """For people."""
    return TASKS.get(task, task)


def measure_title(measure: str) -> str:
    """For people."""
    return MEASURES.get(measure, measure.replace("_", " "))


def number(value: float, *, largest: float | None = None) -> str:
    """Four digits or so.

    Args:
        largest: of the numbers that are to have as many decimals.
    """
    size = abs(value) if largest is None else largest
    if not math.isfinite(value):
        return str(value)
    if size >= 1e6:
        return f"{value / 1e6:,.2f}M"
    return f"{value:.3f}" if size < 10 else f"{value:,.1f}"


def said(value: Any) -> str:
    """A constant of a protocol."""
    if isinstance(value, list):
        return ", ".join(map(said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def rows(merged: Merged) -> tuple[list[tuple[Model, list[Cell | None]]], list[tuple[Model, list[Cell | None]]]]:
    """Models and baselines, each with its cells."""
    cells = [(model, [column.cells.get(i) for column in merged.columns]) for i, model in enumerate(merged.models)]
    return [row for row in cells if not row[0].is_baseline], [row for row in cells if row[0].is_baseline]


def flat_table(results: Sequence[Result]) -> list[list[str]]:
    """Results that have a table of their own, with all of their scores; the first row says what they are."""
    measures = list(dict.fromkeys(name for result in results for name in result.scores))
    about = [_about(result) for result in results]
    return [
        ["", "", *measures],
        *(
            [result.name, what, *(number(result.scores[m]) if m in result.scores else ABSENT for m in measures)]
            for result, what in zip(results, about, strict=True)
        ),
    ]


def _about(result: Result) -> str:
    """The target, or the verdict, that a result is about."""
    verdict = result.data.get("verdict")
    return str(result.data.get("target", verdict.get("word", "") if isinstance(verdict, dict) else ""))


def markdown(merged: Merged, *, title: str) -> str:
    """The tables, and what their marks say."""
    models, baselines = rows(merged)
    table = [["model", *(head.words for head in heads(merged.columns))]]
    table += [[model.name, *(_bold(cell) for cell in cells)] for model, cells in models]
    if baselines:
        table += [[f"*{BASELINES}*", *([""] * len(merged.columns))]]
        table += [[model.name, *(_bold(cell) for cell in cells)] for model, cells in baselines]
    legends = [f"**bold**: {BEST_LEGEND}"] if any(c and c.best for _, cells in models for c in cells) else []
    legends += [f"{AHEAD} {AHEAD_LEGEND}"] if any(c and c.ahead for _, cells in baselines for c in cells) else []
    legends += [f"({letter}) {MARK_LEGEND}: {words}" for letter, words in merged.marks.items()]
    parts = [f"# {title}"]
    if merged.columns:
        parts += [_markdown_table(table), "\n".join(f"- {legend}" for legend in legends)]
    for task, results in merged.apart.items():
        parts += [f"## {task_title(task)}", _markdown_table(flat_table(results))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(table: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(word.replace("|", "\\|") for word in row) + " |" for row in table]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(table[0]) - 1), *lines[1:]])


def _bold(cell: Cell | None) -> str:
    if cell is None or not cell.best:
        return marked(cell)
    return f"**{marked(cell)}**"


def marked(cell: Cell | None) -> str:
    """A score with its marks."""
    if cell is None:
        return ABSENT
    return (
        number(cell.value, largest=cell.largest)
        + (f" {AHEAD}" if cell.ahead else "")
        + (f" ({cell.mark})" if cell.mark else "")
    )
