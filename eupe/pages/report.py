"""Results of many evaluations side by side: which are comparable, and which is best.

A column is one measure of one task, on the same data, by the same protocol; results that differ in either are in
another column. Feature settings (size of the views, dtype, whether a store's views were judged) may differ within a
column: such a cell has a mark that says how it differs, and is not compared with any other. If one subject was judged
with several feature settings, each setting has its own column.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eupe.evaluate import agreement, conflict, latency
from eupe.evaluate.result import Result
from eupe.evaluate.subject import PIXELS
from eupe.kinds import CARD_FILE
from eupe.pages.report_features import FEATURES, difference, letter, usual_features

ORDER = ("knn", "linear", "zeroshot", "retrieval", "vqa", "segment", "depth", "correspond")
"""Order of columns by task; other tasks follow, and costs come last."""
APART = (agreement.TASK, conflict.TASK)
"""Tasks whose results have tables of their own, because each row is about something else."""

Identity = tuple[str, str, bool]
"""Identity of a model: subject, kind, whether it is untrained."""


@dataclass(frozen=True)
class Model:
    """A model, which is a row of the table."""

    name: str
    """Short name if that is unambiguous, else the subject."""
    subject: str
    kind: str
    untrained: bool

    @property
    def is_baseline(self) -> bool:
        """Return whether it is a baseline, which no model should be worse than."""
        return self.untrained or self.kind == PIXELS

    @property
    def run(self) -> Path | None:
        """Return the run's directory, if it is a run and its student is there."""
        path = Path(self.subject)
        is_there = os.path.isfile(path / CARD_FILE)  # noqa: PTH113 - `Path.is_file` raises for a name that is too long
        return path if self.kind == "run" and is_there else None


@dataclass(frozen=True)
class Cell:
    """A score in the table."""

    result: Result
    value: float
    largest: float
    """Largest value of the column, which decides how many digits are shown."""
    mark: str = ""
    """A letter of `Merged.marks`, if its feature settings differ from most of the column's."""
    best: bool = False
    """True for the best of several comparable models."""
    ahead: bool = False
    """True for a baseline that is better than every model."""


@dataclass(frozen=True)
class Column:
    """Scores that are comparable, except those with a mark."""

    task: str
    measure: str
    lower_is_better: bool
    protocol: Mapping[str, Any]
    """The protocol without its feature settings."""
    data: Mapping[str, Any]
    features: Mapping[str, Any]
    """Feature settings of the cells without a mark."""
    cells: Mapping[int, Cell]
    """Cells by the model's place."""


@dataclass(frozen=True)
class Merged:
    """All results, merged into tables."""

    models: tuple[Model, ...]
    """Models, baselines last."""
    columns: tuple[Column, ...]
    marks: Mapping[str, str]
    """Meaning of each letter."""
    apart: Mapping[str, tuple[Result, ...]] = field(default_factory=dict)
    """Results with tables of their own, by task; subjects are short names."""

    def to_json(self) -> dict[str, Any]:
        """Return the tables as plain JSON."""
        return {
            "models": [
                {"name": m.name, "subject": m.subject, "kind": m.kind, "untrained": m.untrained} for m in self.models
            ],
            "columns": [
                {
                    "task": column.task,
                    "measure": column.measure,
                    "lower_is_better": column.lower_is_better,
                    "protocol": dict(column.protocol),
                    "data": dict(column.data),
                    "features": dict(column.features),
                    "cells": [_cell_json(column.cells.get(i)) for i in range(len(self.models))],
                }
                for column in self.columns
            ],
            "marks": dict(self.marks),
            **{task: [result.to_json() for result in results] for task, results in self.apart.items()},
        }


def _cell_json(cell: Cell | None) -> dict[str, Any] | None:
    if cell is None:
        return None
    return {
        "value": cell.value,
        "mark": cell.mark,
        "best": cell.best,
        "ahead": cell.ahead,
        "scores": cell.result.scores,
    }


def merge(results: Sequence[Result]) -> Merged:
    """Merge results into a table of models by columns; results of tasks in `APART` stay separate."""
    names = _short_names(results)
    tabled = [result for result in results if result.task not in APART]
    identities = dict.fromkeys((result.subject, result.kind, result.untrained) for result in tabled)
    models = [
        Model(f"{names[subject]}, untrained" if untrained else names[subject], subject, kind, untrained)
        for subject, kind, untrained in identities
    ]
    models.sort(key=lambda model: model.is_baseline)
    places = {(model.subject, model.kind, model.untrained): i for i, model in enumerate(models)}
    marks: dict[str, str] = {}
    columns = [_column(group, places, models, marks) for group in _grouped(tabled)]
    apart = {
        task: tuple(replace(r, subject=names[r.subject]) for r in results if r.task == task)
        for task in APART
        if any(r.task == task for r in results)
    }
    return Merged(tuple(models), tuple(columns), {letter: words for words, letter in marks.items()}, apart)


def _short_names(results: Sequence[Result]) -> dict[str, str]:
    """Return a name for each subject: the last part of its path if that is unambiguous, else the subject."""
    subjects = list(dict.fromkeys(result.subject for result in results))
    short = {
        subject: " ~ ".join(Path(part).name or part for part in subject.split(" ~ ")) if "/" in subject else subject
        for subject in subjects
    }
    count = Counter(short.values())
    return {subject: name if count[name] == 1 else subject for subject, name in short.items()}


def _grouped(results: Sequence[Result]) -> list[list[Result]]:
    """Group results into columns, in the order of their tasks."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        measure = next(iter(result.scores))
        parts = [result.task, measure, result.lower_is_better, task_protocol(result), result.data]
        groups.setdefault(json.dumps(parts, sort_keys=True), []).append(result)
    apart = [part for group in groups.values() for part in _without_clashes(group)]
    return sorted(apart, key=lambda group: _rank(group[0].task))


def _without_clashes(group: Sequence[Result]) -> list[list[Result]]:
    """Split a group that holds a subject more than once: by size, or if that is not enough by all feature settings."""
    for names in ((), ("size",), FEATURES):
        parts: dict[str, list[Result]] = {}
        for result in group:
            way = json.dumps([result.protocol.get(name) for name in names])
            parts.setdefault(way, []).append(result)
        if all(len(part) == len({(r.subject, r.kind, r.untrained) for r in part}) for part in parts.values()):
            break
    return list(parts.values())


def _rank(task: str) -> int:
    if task == latency.TASK:
        return len(ORDER) + 1
    return ORDER.index(task) if task in ORDER else len(ORDER)


def task_protocol(result: Result) -> dict[str, Any]:
    """Return the part of a protocol that is about the task, not the features."""
    return {name: value for name, value in result.protocol.items() if name not in FEATURES}


def _column(
    group: Sequence[Result], places: Mapping[Identity, int], models: Sequence[Model], marks: dict[str, str]
) -> Column:
    """Build the column of a group of results.

    Args:
        marks: letter of each mark by its meaning; new ones are added.
    """
    measure, lower = next(iter(group[0].scores)), group[0].lower_is_better
    by_place = {places[result.subject, result.kind, result.untrained]: result for result in group}
    usual = usual_features([result for i, result in by_place.items() if not models[i].is_baseline] or group)
    cells = {}
    values = [abs(float(result.scores[measure])) for result in group]
    largest = max(filter(math.isfinite, values), default=0.0)
    for i, result in sorted(by_place.items()):
        words = difference(result, usual)
        mark = marks.setdefault(words, letter(len(marks))) if words else ""
        cells[i] = Cell(result, float(result.scores[measure]), largest, mark)
    return Column(
        task=group[0].task,
        measure=measure,
        lower_is_better=lower,
        protocol=task_protocol(group[0]),
        data=group[0].data,
        features=usual,
        cells=_ranked(cells, models, lower),
    )


def _ranked(cells: Mapping[int, Cell], models: Sequence[Model], lower: bool) -> dict[int, Cell]:
    """Flag the best of the models, and the baselines that are ahead of it; cells with a mark are left out."""
    sign = -1.0 if lower else 1.0
    worth = {i: sign * cell.value for i, cell in cells.items() if not cell.mark and math.isfinite(cell.value)}
    rivals = [value for i, value in worth.items() if not models[i].is_baseline]
    if not rivals:
        return dict(cells)
    top = max(rivals)
    return {
        i: replace(
            cell,
            best=i in worth and not models[i].is_baseline and worth[i] == top and len(rivals) > 1,
            ahead=i in worth and models[i].is_baseline and worth[i] > top,
        )
        for i, cell in cells.items()
    }
