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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from eupe.common.kinds import STUDENT_FILE
from eupe.errors import ConfigError, RunError
from eupe.evaluate import agreement, conflict, latency
from eupe.evaluate.open_run import is_run
from eupe.evaluate.result import EVALUATIONS_FILE, Result, newest, read_results
from eupe.evaluate.subject import PIXELS

ORDER = ("knn", "linear", "zeroshot", "retrieval", "vqa", "segment", "depth", "correspond")
"""Order of columns by task; other tasks follow, and costs come last."""
FEATURES = ("size", "dtype", "views", "num_views", "shades")
"""Names of the feature settings in a protocol."""
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
        is_there = os.path.isfile(path / STUDENT_FILE)  # noqa: PTH113 - `Path.is_file` raises for a name that is too long
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

    @property
    def results(self) -> list[Result]:
        """Return the results of all cells."""
        return [cell.result for cell in self.cells.values()]


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

    @property
    def cells(self) -> list[Cell]:
        """Return all scores of the table."""
        return [cell for column in self.columns for cell in column.cells.values()]

    def to_json(self) -> dict[str, Any]:
        """Return the tables as plain JSON."""
        return {
            "models": [asdict(model) for model in self.models],
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


def gather(places: Sequence[Path]) -> list[Result]:
    """Return the newest results of runs and of files of results, in the order given.

    A run is named by its path as given. A run's own file has all of its results, while a file from `--results` may have
    older ones, so the run's own file wins.

    Raises: ConfigError if no place is given, or one has no results; RunError if a run is unfinished, or a file damaged.
    """
    if not places:
        raise ConfigError("nothing to report: name at least one training run, or a file of results (.jsonl)")
    runs = {place.resolve(): place for place in places if place.is_dir()}
    read = {place: [_called_as_given(result, place, runs) for result in _read(place)] for place in places}
    order = list(dict.fromkeys(result.subject for results in read.values() for result in results))
    of_files, of_runs = ([p for p in read if p.is_dir() == is_folder] for is_folder in (False, True))
    # runs last, because `newest` keeps the last of equal results
    found = newest([result for place in (*of_files, *of_runs) for result in read[place]])
    return sorted(found, key=lambda result: order.index(result.subject))


def _read(place: Path) -> list[Result]:
    if not place.exists():
        raise ConfigError(f"{place} does not exist; give training runs, or files of results (.jsonl)")
    if place.is_dir():
        if not is_run(place):
            raise ConfigError(f"{place} is a folder but not a training run; give runs, or files of results (.jsonl)")
        if not (place / STUDENT_FILE).is_file():
            raise RunError(f"run {place} is not finished; finish it with `eupe train ... --resume`, then evaluate it")
    results = read_results(place)
    if not results:
        what = f"run {place} has not been evaluated" if place.is_dir() else f"{place} holds no results"
        raise ConfigError(
            f"{what}; for example, `eupe eval knn` writes some to a run's {EVALUATIONS_FILE} and to --results FILE"
        )
    return results


def _called_as_given(result: Result, place: Path, runs: Mapping[Path, Path]) -> Result:
    """Name a run's result by the run's path as given, because the run may have been moved since it was judged."""
    if place.is_dir():
        return replace(result, subject=str(place))
    if result.kind != "run":
        return result
    return replace(result, subject=str(runs.get(Path(result.subject).resolve(), result.subject)))


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
        parts = [result.task, measure, result.lower_is_better, _task_protocol(result), result.data]
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


def _task_protocol(result: Result) -> dict[str, Any]:
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
    usual = _usual_features([result for i, result in by_place.items() if not models[i].is_baseline] or group)
    cells = {}
    values = [abs(float(result.scores[measure])) for result in group]
    largest = max(filter(math.isfinite, values), default=0.0)
    for i, result in sorted(by_place.items()):
        words = _difference(result, usual)
        mark = marks.setdefault(words, _letter(len(marks))) if words else ""
        cells[i] = Cell(result, float(result.scores[measure]), largest, mark)
    return Column(
        task=group[0].task,
        measure=measure,
        lower_is_better=lower,
        protocol=_task_protocol(group[0]),
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


def _usual_features(results: Sequence[Result]) -> dict[str, Any]:
    """Return the feature settings of most results; ties go to the first."""
    ways = [{name: result.protocol[name] for name in FEATURES if name in result.protocol} for result in results]
    counts = Counter(json.dumps(way, sort_keys=True) for way in ways)
    return max(ways, key=lambda way: counts[json.dumps(way, sort_keys=True)])


def _difference(result: Result, usual: Mapping[str, Any]) -> str:
    """Return in words how a result's feature settings differ from the column's; empty if they do not.

    Only the size counts for raw pixels.
    """
    compared = ("size",) if result.kind == PIXELS else FEATURES
    own = {name: result.protocol[name] for name in compared if name in result.protocol}
    others = {name: usual[name] for name in compared if name in usual}
    ours = [_said(name, value) for name, value in own.items() if others.get(name) != value]
    theirs = [_said(name, value) for name, value in others.items() if own.get(name) != value]
    if not ours and not theirs:
        return ""
    return f"{', '.join(ours) or 'no such setting'}; the others: {', '.join(theirs) or 'no such setting'}"


def _said(name: str, value: Any) -> str:
    return {"size": f"{value} px", "num_views": f"{value} views per picture", "views": f"a store's {value} views"}.get(
        name, f"{name} {value}"
    )


def _letter(number: int) -> str:
    """Return the letter of a mark: a to z, then aa, ab, ..."""
    first, last = divmod(number, len(ascii_lowercase))
    return (ascii_lowercase[first - 1] if first else "") + ascii_lowercase[last]
