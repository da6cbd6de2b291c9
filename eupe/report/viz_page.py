"""PCA maps of dense features side by side: stores, runs and teachers on the same views, on one page or figure.

Shapes: P pictures, S pixels along a side, h w cells, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup

from eupe.common.storage import AnyPath
from eupe.corpus.index import open_corpus
from eupe.errors import ConfigError
from eupe.evaluate.subject import StoreSubject, open_subjects
from eupe.report import feature_maps
from eupe.report.charts import Series, colour_stops, line_chart
from eupe.report.feature_maps import ModelColumn, PictureCell
from eupe.report.page import make_place, render_template, write_whole
from eupe.report.png_figure import draw_figure, plan_figure
from eupe.report.training_curves import History, read_history
from eupe.store.layout import DENSE

PAGE, FIGURE = ".html", ".png"
SCRIPT = "viz.js"


@dataclass(frozen=True)
class VizReport:
    """A summary of what was written."""

    out: str
    models: tuple[str, ...]
    pictures: tuple[str, ...]
    """Keys of the pictures, from top to bottom."""
    num_held_out: int
    notes: tuple[str, ...]
    """Sentences on what could not be shown as requested, and why."""
    num_bytes: int


def write_maps(
    models: Sequence[str],
    *,
    images: AnyPath,
    out: Path,
    limit: int = 8,
    weights: Mapping[str, Path] | None = None,
    weights_keys: Mapping[str, str] | None = None,
    size: int | None = None,
    untrained: bool = False,
    foreground: bool = False,
    cell_px: int | None = None,
    overwrite: bool = False,
) -> VizReport:
    """Write one HTML page or one PNG figure with each model's maps of the same pictures.

    Args:
        models: stores, runs' directories, teachers' names and `pixels`, one column each.
        images: folder of pictures, or an index; only pictures that every store has features of are shown.
        out: file name that ends in .html or .png.
        limit: the most pictures to show.
        weights: local weights to use instead of the hub's, for teachers among the models.
        weights_keys: key of a teacher's tensors in a weights file of several models.
        size: side of each model's input in pixels, rounded down to its patch; by default each model's own.
        untrained: also draw every run and teacher with random weights.
        foreground: colour only the foreground, found by each model's own first component.
        cell_px: side of a figure's cells.
        overwrite: replace what is there, whoever made it.
    Raises: ConfigError, CorpusError, StoreError, RunError or TeacherError for what the user can correct; StorageError
        if `out` cannot be written.
    """
    _require_words(out, limit, cell_px)
    opened = feature_maps.with_short_names(open_subjects(models, weights or {}, keys=weights_keys, untrained=untrained))
    stores = [each for each in opened if isinstance(each, StoreSubject)]
    for each in stores:
        each.require(DENSE)
    place = make_place(out, sources=[images], overwrite=overwrite)  # refused before the slow work
    corpus = open_corpus(images)
    runs = {each.name: run for each in opened if not each.untrained and (run := feature_maps.run_of(each))}
    pictures = feature_maps.choose_pictures(feature_maps.list_pictures(corpus, stores, list(runs.values())), limit)
    layout = plan_figure(len(pictures), 1 + len(opened), cell_px) if out.suffix == FIGURE else None
    cached = {each.name: feature_maps.stored(each, pictures, size=size) for each in stores}
    views = feature_maps.open_views(corpus.root, pictures, [(each, cached[each.name]) for each in stores])
    columns = [
        feature_maps.model_column(each, views, cached.get(each.name), size=size, foreground=foreground)
        for each in opened
    ]
    cells = [view.cell(layout.cell if layout else feature_maps.SHOWN_PX) for view in views]
    histories = [] if layout else [(name, read_history(run)) for name, run in runs.items()]
    data: bytes | str = draw_figure(layout, cells, columns) if layout else render_maps(cells, columns, histories)
    return VizReport(
        out=str(out),
        models=tuple(column.name for column in columns),
        pictures=tuple(picture.key for picture in pictures),
        num_held_out=sum(picture.held_out for picture in pictures),
        notes=tuple(f"{column.name}: {column.colours.note}" for column in columns if column.colours.note),
        num_bytes=write_whole(place, data),
    )


def _require_words(out: Path, limit: int, cell_px: int | None) -> None:
    """Raise ConfigError if an option is invalid, or options do not fit together."""
    if limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {limit}")
    if out.suffix not in (PAGE, FIGURE):
        raise ConfigError(f"--out {out} must end in {PAGE} for a page or in {FIGURE} for a figure")
    if cell_px is not None and out.suffix != FIGURE:
        raise ConfigError(f"--cell is for figures, and --out {out} is a page; leave --cell out, or write a {FIGURE}")


def render_maps(
    pictures: Sequence[PictureCell], models: Sequence[ModelColumn], histories: Sequence[tuple[str, History]]
) -> str:
    """Return the whole page; it works without its script, except that patches cannot be compared.

    Args:
        histories: names and histories of the runs among the models.
    """
    names = ", ".join(model.name for model in models)
    kept = feature_maps.channels_to_keep(sum(model.dense_PhwD[..., 0].size for model in models))
    embeddings = [feature_maps.embed(model.dense_PhwD, kept) if kept else None for model in models]
    num_bytes = sum(embedding.codes_PNK.nbytes for embedding in embeddings if embedding)
    script = (files("eupe.report") / "templates" / SCRIPT).read_text(encoding="utf-8") if kept else ""
    ramp = colour_stops("viridis")
    levels = zip(*(bytes.fromhex(stop[1:]) for stop in ramp), strict=True)
    return render_template(
        "viz.html",
        title=f"Dense features of {names}",
        names=names,
        pictures=pictures,
        models=models,
        embeddings=embeddings,
        foreground=any(model.colours.foreground is not None or model.colours.note for model in models),
        component_stops=ramp,
        component_levels={letter: [level / 255 for level in each] for letter, each in zip("RGB", levels, strict=True)},
        similarity_stops=colour_stops("magma"),
        feature_megabytes=num_bytes * 4 / 3 / 1e6,  # as base64
        max_megabytes=feature_maps.MAX_TEXT_BYTES / 1e6,
        trainings=[(name, history, _curves(name, history)) for name, history in histories],
        script=Markup(script),
    )


def _curves(run: str, history: History) -> list[tuple[str, Markup, tuple[Series, ...]]]:
    """Draw the charts of a run, with their titles and curves."""
    loss, cosine = "Training loss", "Validation on held-out pictures"
    charts = []
    if history.losses:
        drawn = line_chart(history.losses, label=f"{loss}: {run}", y_label="loss", x_label="step", allow_log=True)
        charts.append((loss, drawn, history.losses))
    if history.cosines:
        drawn = line_chart(history.cosines, label=f"{cosine}: {run}", y_label="normalised cosine", x_label="step")
        charts.append((cosine, drawn, history.cosines))
    return charts
