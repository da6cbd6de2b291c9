"""The report of many evaluations: results of runs and of files, as one page without scripts, or as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from eupe.common.outputs import MARKDOWN_MARK
from eupe.common.storage import AnyPath
from eupe.corpus.index import open_corpus
from eupe.errors import ConfigError, EupeError
from eupe.evaluate.agreement import TASK as AGREEMENT
from eupe.evaluate.conflict import TASK as CONFLICT
from eupe.evaluate.latency import TASK as LATENCY
from eupe.evaluate.licences import UNKNOWN, Origin, origins, origins_behind
from eupe.evaluate.open_run import is_run, read_run_spec
from eupe.evaluate.result import Result
from eupe.evaluate.subject import open_subjects
from eupe.evaluate.verdict import JUDGED, MEASURED
from eupe.report import comparison_text, feature_maps
from eupe.report.charts import Spot, scatter_chart
from eupe.report.comparison import Column, Merged, Model, gather, merge
from eupe.report.comparison_text import Head, heads, markdown, rows, task_title
from eupe.report.feature_maps import ModelColumn, PictureCell
from eupe.report.page import count, make_place, render_template, write_whole
from eupe.store import open_store
from eupe.store.layout import KINDS
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.run_adapter import OWN_LICENCE

AGREEMENT_MEASURES = {
    "normalised": "normalised",
    "cosine": "cosine",
    "mean_feature": "mean feature",
    "cka": "CKA",
    "cka_own": "own CKA",
}
CONFLICT_MEASURES = {"cka": "CKA", "r2": "R² A to B", "r2_back": "R² B to A"}
MOST_CHARTS = 6
FEWEST_SPOTS = 2
TITLE = "Models, side by side"
PAGE, MARKDOWN = ".html", ".md"


@dataclass(frozen=True)
class Licence:
    """A teacher behind a model, with its licence."""

    model: str
    teacher: str
    through: str
    """Runs between the two, if any."""
    licence: str

    @property
    def teacher_name(self) -> str:
        """Return the last part of the teacher's path, or its whole name."""
        return Path(self.teacher).name


@dataclass(frozen=True)
class Maps:
    """Pictures, with the maps of every run."""

    pictures: list[PictureCell]
    runs: list[ModelColumn]


@dataclass(frozen=True)
class Report:
    """A report, and where it was written."""

    merged: Merged
    licences: tuple[Licence, ...]
    out: Path | None

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON."""
        out = None if self.out is None else str(self.out)
        return {"out": out, **self.merged.to_json(), "licences": [asdict(each) for each in self.licences]}


def write_report(
    places: Sequence[Path],
    *,
    out: Path | None = None,
    images: AnyPath | None = None,
    limit: int = 6,
    title: str = TITLE,
    overwrite: bool = False,
) -> Report:
    """Merge results, and write them if `out` is given.

    Args:
        places: runs, and files of results.
        out: file name that ends in .html or .md.
        images: pictures of which a page shows the runs' maps.
        limit: the most pictures to show.
        overwrite: replace what is there, whoever made it.
    Raises: ConfigError, RunError, CorpusError, TeacherError; StorageError if `out` cannot be written.
    """
    if out is not None and out.suffix not in (PAGE, MARKDOWN):
        raise ConfigError(f"--out {out} must end in {PAGE} for a page or in {MARKDOWN} for Markdown")
    if images is not None and (out is None or out.suffix != PAGE):
        raise ConfigError(f"--images is for pages: give --out with a name that ends in {PAGE}, or leave it out")
    merged = merge(gather(places))
    place = None
    if out is not None:
        sources = [*places, *([] if images is None else [images])]
        place = make_place(out, sources=sources, overwrite=overwrite)
    found = tuple(licences(merged.models))
    if place is not None and place.suffix == MARKDOWN:
        heading, rest = markdown(merged, title=title).split("\n", 1)
        write_whole(place, f"{heading}\n\n{MARKDOWN_MARK}\n{rest}")
    elif place is not None:
        runs = {m.name: m.run for m in merged.models if m.run is not None and not m.untrained}
        maps = None if images is None else draw_maps(runs, images, limit=limit)
        read = [str(place) for place in places]
        write_whole(place, render_report(merged, title=title, sources=read, licences=found, maps=maps))
    return Report(merged, found, out)


def render_report(
    merged: Merged, *, title: str, sources: Sequence[str], licences: Sequence[Licence], maps: Maps | None
) -> str:
    """Return the whole page.

    Args:
        sources: runs and files that the results came from, as the user named them.
        maps: maps of the runs, if pictures were given.
    """
    named = heads(merged.columns)
    models, baselines = rows(merged)
    tasks = dict.fromkeys(task_title(column.task) for column in merged.columns)
    return render_template(
        "report.html",
        text=comparison_text,
        title=title,
        lead=" · ".join([count(len(models), "model"), *tasks]),
        sources=sources,
        merged=merged,
        heads=named,
        models=models,
        baselines=baselines,
        charts=_charts(merged, named),
        agreement=_judged_alike(merged.apart.get(AGREEMENT, ())),
        agreement_measures=AGREEMENT_MEASURES,
        conflict=merged.apart.get(CONFLICT, ()),
        conflict_measures=CONFLICT_MEASURES,
        verdict_notes=(MEASURED, JUDGED),
        kinds=KINDS,
        maps=maps,
        licences=licences,
    )


def _judged_alike(results: Sequence[Result]) -> list[list[Result]]:
    """Group comparable results: same targets, held-out pictures and settings, except the student's own size."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        protocol = {name: value for name, value in result.protocol.items() if name != "size"}
        data = {name: value for name, value in result.data.items() if name != "path"}
        groups.setdefault(repr((sorted(protocol.items()), sorted(data.items()))), []).append(result)
    return list(groups.values())


def _charts(merged: Merged, named: Sequence[Head]) -> list[tuple[str, Markup]]:
    """Draw quality over latency: a titled chart for each column in which two models or more have both."""
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
        chart = scatter_chart(
            spots, label=label, x_label=x_label, y_label=head.measure, lower_is_better=column.lower_is_better
        )
        drawn.append((what, chart))
    return drawn[:MOST_CHARTS]


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


def draw_maps(runs: Mapping[str, Path], images: AnyPath, *, limit: int) -> Maps:
    """Draw the maps of each run at its own size; pictures that no run was trained on come first.

    Args:
        runs: directories by name.
        limit: the most pictures to show.
    Raises: ConfigError if there is no run to show, `limit` is below 1, or features are not finite; CorpusError,
        RunError, TeacherError.
    """
    if limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {limit}")
    if not runs:
        raise ConfigError("--images shows maps of training runs, but none of the evaluated runs is here")
    corpus = open_corpus(images)
    pictures = feature_maps.choose_pictures(feature_maps.list_pictures(corpus, [], list(runs.values())), limit)
    views = feature_maps.open_views(corpus.root, pictures)
    columns = []
    for name, run in runs.items():
        (subject,) = open_subjects([str(run)], {})
        columns.append(replace(feature_maps.model_column(subject, views), name=name))
    return Maps([view.cell(feature_maps.SHOWN_PX) for view in views], columns)


def licences(models: Sequence[Model]) -> list[Licence]:
    """Return each teacher of every model once; models that are untrained or pixels have none."""
    found = [licence for model in models if not model.is_baseline for licence in _of_model(model)]
    return list(dict.fromkeys(found))


def _of_model(model: Model) -> list[Licence]:
    if model.kind == "run":
        return _of_run(model.name, Path(model.subject))
    try:
        if model.kind == "store":
            teacher = open_store(model.subject).spec.teacher
            if teacher["licence"] == OWN_LICENCE:
                return _said(model.name, origins_behind(str(teacher["name"]), Path(model.subject)))
            return [Licence(model.name, str(teacher["name"]), "", str(teacher["licence"]))]
        return [Licence(model.name, model.name, "", resolve_teacher(model.subject).licence)]
    except EupeError:
        return [Licence(model.name, model.name, "", f"{UNKNOWN}: it is not here")]


def _of_run(name: str, run: Path) -> list[Licence]:
    """Return the licences of a run's teachers, and of the teachers behind those that are runs themselves."""
    if not is_run(run):
        return [Licence(name, str(run), "", f"{UNKNOWN}: the run is not here")]
    return _said(name, origins(run, read_run_spec(run)))


def _said(name: str, found: Sequence[Origin]) -> list[Licence]:
    return [Licence(name, origin.name, origin.way, origin.licence) for origin in found]
