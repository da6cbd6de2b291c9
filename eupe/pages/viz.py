"""PCA maps of dense features side by side: stores, runs and teachers on the same views, on one page or figure.

Shapes: P pictures, S pixels along a side, h w cells, D channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from eupe.corpus.index import Corpus, open_corpus
from eupe.corpus.pictures import decode_image, insides, read_picture
from eupe.corpus.views import ViewSpec, draw_view
from eupe.encoder import load_card
from eupe.errors import ConfigError, CorpusError
from eupe.evaluate.run import not_learned
from eupe.evaluate.subject import StoreSubject, Subject, open_subjects
from eupe.pages.page import make_place, write_whole
from eupe.pages.viz_figure import draw_figure, plan_figure
from eupe.pages.viz_history import read_history
from eupe.pages.viz_items import Picture, View, dense_of, run_of, stored, with_short_names
from eupe.pages.viz_maps import ModelColumn, PictureCell, colour_maps
from eupe.pages.viz_page import render_page
from eupe.place import Place, Where
from eupe.store import Features
from eupe.store.layout import DENSE

PAGE, FIGURE = ".html", ".png"
SHOWN_PX = 320
"""Side of the views on the page."""


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


Stored = Sequence[tuple[StoreSubject, Features]]
"""Each store, with its features of the chosen pictures."""


def write_maps(
    models: Sequence[str],
    *,
    images: Where,
    out: Path,
    limit: int = 8,
    weights: Mapping[str, Path] | None = None,
    weights_keys: Mapping[str, str] | None = None,
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
        foreground: colour only the foreground, found by each model's own first component.
        cell_px: side of a figure's cells.
        overwrite: replace what is there, whoever made it.
    Raises: ConfigError, CorpusError, StoreError, RunError or TeacherError for what the user can correct; StorageError
        if `out` cannot be written.
    """
    _require_words(out, limit, cell_px)
    opened = with_short_names(open_subjects(models, weights or {}, keys=weights_keys))
    stores = [each for each in opened if isinstance(each, StoreSubject)]
    for each in stores:
        each.require(DENSE)
    place = make_place(out, sources=[images], overwrite=overwrite)  # refused before the slow work
    corpus = open_corpus(images)
    runs = {each.name: run for each in opened if (run := run_of(each))}
    pictures = choose_pictures(_pictures_in_common(corpus, stores, list(runs.values())), limit)
    layout = plan_figure(len(pictures), 1 + len(opened), cell_px) if out.suffix == FIGURE else None
    decoded = [_read_image(corpus.root, picture) for picture in pictures]
    cached = {each.name: stored(each, pictures) for each in stores}
    views = _views(pictures, decoded, [(each, cached[each.name]) for each in stores])
    columns = [_column(each, views, cached.get(each.name), foreground) for each in opened]
    cells = [_cell(view, layout.cell if layout else SHOWN_PX) for view in views]
    if layout:
        data = draw_figure(layout, cells, columns)
    else:
        page = render_page(cells, columns, [(name, read_history(run)) for name, run in runs.items()])
        data = page.encode(errors="replace")  # file names that are not UTF-8 come as surrogates
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


def _pictures_in_common(corpus: Corpus, stores: Sequence[StoreSubject], runs: Sequence[Path]) -> list[Picture]:
    """Return the pictures that every store has features of; those that no run was trained on are held out.

    Raises: ConfigError if there is none.
    """
    rows = corpus.samples.select(["key", "label", "sha256"]).to_pylist()
    for row, inside in zip(rows, insides(corpus.samples), strict=True):
        row["inside"] = inside
    for subject in stores:
        found = [row for row in rows if row["key"] in subject.places]
        if not found:
            raise ConfigError(
                f"store {subject.store.path} has no features of any of the {len(rows)} pictures of {corpus.root} "
                f"that could be shown (one is {rows[0]['key']}; the store has {next(iter(subject.places), 'none')}); "
                "give --images the pictures that every store was extracted from"
            )
        rows = found
    return [Picture(**row, held_out=held) for row, held in zip(rows, not_learned(rows, runs), strict=True)]


def choose_pictures(pictures: Sequence[Picture], limit: int) -> list[Picture]:
    """Choose held-out pictures first, then the others; within each group, one of each label in turn."""
    held_out_first = sorted(pictures, key=lambda picture: not picture.held_out)
    seen: Counter[str | None] = Counter()
    ranked = []
    for picture in held_out_first:
        ranked.append((not picture.held_out, seen[picture.label], picture))
        seen[picture.label] += 1
    return [picture for *_, picture in sorted(ranked, key=lambda rank: rank[:2])][:limit]


def _views(pictures: Sequence[Picture], images: Sequence[Image.Image], cached: Stored) -> list[View]:
    """Return view 0 of each picture in the stores, which must agree on it; without stores, the centre crop.

    Raises: ConfigError if two stores hold different views.
    """
    if cached:
        _require_same_views(pictures, cached)
        drawn = cached[0][1].params
    else:
        drawn = [draw_view(ViewSpec(), "", 0, image.width, image.height) for image in images]
    return [View(*view) for view in zip(pictures, images, drawn, strict=True)]


def _require_same_views(pictures: Sequence[Picture], cached: Stored) -> None:
    first, expected = cached[0]
    for other, got in cached[1:]:
        if (i := expected.first_difference(got)) is not None:
            raise ConfigError(
                f"{first.store.path} and {other.store.path} hold different views of {pictures[i].key}, so they cannot "
                "be compared; extract both with the same --views, --photometric and --seed"
            )


def _read_image(root: Place, picture: Picture) -> Image.Image:
    try:
        return decode_image(read_picture(root, picture.key, picture.inside))
    except CorpusError as error:
        raise CorpusError(f"picture {picture.key} of {root} cannot be read: {error}") from error


def _cell(view: View, side_px: int) -> PictureCell:
    picture = view.picture
    return PictureCell(picture.key, picture.label, picture.held_out, view.render(side_px))


def _column(subject: Subject, views: Sequence[View], cached: Features | None, foreground: bool) -> ModelColumn:
    """Build a model's column: its features and their colours.

    Raises: ConfigError if features are not all finite.
    """
    about = ""
    if isinstance(subject, StoreSubject):
        assert cached is not None and cached.dense is not None
        dense = cached.dense.astype(np.float32)
        about = str(subject.store.spec.teacher["name"])
    else:
        dense = dense_of(subject, views)
        if run := run_of(subject):
            about = load_card(run).arch
    if not np.isfinite(dense).all():
        raise ConfigError(f"{subject.name} gives features that are not finite, which have no colours")
    colours = colour_maps(dense, foreground=foreground)
    return ModelColumn(subject.name, subject.kind, about, subject.size(None), dense, colours)
