"""A comparison in words: headings, numbers, and the whole as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eupe.evaluate.latency import TASK as LATENCY
from eupe.evaluate.result import Result
from eupe.report.comparison import Cell, Column, Merged, Model

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
MEASURES = {"miou": "mIoU", "rmse": "RMSE", "pck": "PCK", "ms": "ms per picture"}
ABSENT = "–"
BASELINES = "baselines"
BEST_LEGEND = "the best of the comparable models"
AHEAD_LEGEND = "a baseline that is better than all of them"
MARK_LEGEND = "other features than the column's, so not compared"
AHEAD = "▲"


@dataclass(frozen=True)
class Head:
    """The heading of a column."""

    task: str
    data: str
    """Last part of the data's path, and the size of most models' views; for a cost only the size."""
    measure: str
    """Measure, with an arrow towards better values."""
    apart: tuple[str, ...]
    """Facts that differ from other columns with the same heading."""

    @property
    def words(self) -> str:
        """Return the heading on one line."""
        return ", ".join(word for word in (self.task, self.data, self.measure, *self.apart) if word)


def heads(columns: Sequence[Column]) -> list[Head]:
    """Return the columns' headings; columns with the same one also get the facts in which they differ."""
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
    """Return the facts of a column (data, features, protocol) that not all columns in `alike` share."""
    own = facts(column)
    names = dict.fromkeys(name for other in alike for name in facts(other))
    return tuple(
        f"{name.replace('_', ' ')} {said(own.get(name, ABSENT))}"
        for name in names
        if any(facts(other).get(name) != own.get(name) for other in alike)
    )


def facts(column: Column) -> dict[str, Any]:
    """Return everything that is known about a column's results: data, features and protocol."""
    return {**column.data, **column.features, **column.protocol}


def task_title(task: str) -> str:
    """Return a task's name for people."""
    return TASKS.get(task, task)


def measure_title(measure: str) -> str:
    """Return a measure's name for people."""
    return MEASURES.get(measure, measure.replace("_", " "))


def measure_titles(measures: Sequence[str]) -> list[str]:
    """Return measures' names for people."""
    return [measure_title(measure) for measure in measures]


def score(scores: Mapping[str, float], name: str) -> str:
    """Format a score; a dash if there is none."""
    return number(scores[name]) if name in scores else ABSENT


def is_judged(result: Result, kind: str) -> bool:
    """Return whether a result has scores of a kind of token."""
    return any(name.endswith(f"/{kind}") for name in result.scores)


def number(value: float, *, largest: float | None = None) -> str:
    """Format a number with about four digits.

    Args:
        largest: largest of the numbers that get the same number of decimals; default: `value` alone.
    """
    size = abs(value) if largest is None else largest
    if not math.isfinite(value):
        return str(value)
    if size >= 1e6:
        return f"{value / 1e6:,.2f}M"
    return f"{value:.3f}" if size < 10 else f"{value:,.1f}"


def said(value: Any) -> str:
    """Format a constant of a protocol."""
    if isinstance(value, list):
        return ", ".join(map(said, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def rows(merged: Merged) -> tuple[list[tuple[Model, list[Cell | None]]], list[tuple[Model, list[Cell | None]]]]:
    """Return models and baselines, each with its cells."""
    cells = [(model, [column.cells.get(i) for column in merged.columns]) for i, model in enumerate(merged.models)]
    return [row for row in cells if not row[0].is_baseline], [row for row in cells if row[0].is_baseline]


def flat_table(results: Sequence[Result]) -> list[list[str]]:
    """Return a table of results with all of their scores; the first row is the header."""
    names = measures(results)
    rows = [[result.name, _about(result), *(score(result.scores, name) for name in names)] for result in results]
    return [["", "", *names], *rows]


def measures(results: Iterable[Result]) -> list[str]:
    """Return the names of all measures that results have."""
    return list(dict.fromkeys(name for result in results for name in result.scores))


def _about(result: Result) -> str:
    """Return the target or the verdict that a result is about."""
    verdict = result.data.get("verdict")
    return str(result.data.get("target", verdict.get("word", "") if isinstance(verdict, dict) else ""))


def markdown(merged: Merged, *, title: str) -> str:
    """Return the tables and the meaning of their marks as Markdown."""
    models, baselines = rows(merged)
    table = [["model", *(head.words for head in heads(merged.columns))]]
    table += [[model.name, *(_bold(cell) for cell in cells)] for model, cells in models]
    if baselines:
        table += [[f"*{BASELINES}*", *([""] * len(merged.columns))]]
        table += [[model.name, *(_bold(cell) for cell in cells)] for model, cells in baselines]
    legends = [f"**bold**: {BEST_LEGEND}"] if any(cell.best for cell in merged.cells) else []
    legends += [f"{AHEAD} {AHEAD_LEGEND}"] if any(cell.ahead for cell in merged.cells) else []
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
    """Format a score with its marks."""
    if cell is None:
        return ABSENT
    return (
        number(cell.value, largest=cell.largest)
        + (f" {AHEAD}" if cell.ahead else "")
        + (f" ({cell.mark})" if cell.mark else "")
    )
