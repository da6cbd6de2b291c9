"""PCA maps of dense features side by side: stores, runs and teachers on the very same views, on one page.

Shapes: P pictures, S pixels along a side, h w cells, D channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from eupe.corpus.decode import decode_image
from eupe.corpus.index import Corpus, open_corpus
from eupe.corpus.pictures import Inside, insides, read_picture
from eupe.corpus.views import ViewParams, ViewSpec, draw_view, render_view
from eupe.device import compute_dtype, pick_device
from eupe.encoder import CARD_FILE, load_card
from eupe.errors import ConfigError, CorpusError, RunError, TeacherError
from eupe.evaluate.page import make_place, write_whole
from eupe.evaluate.run import read_card
from eupe.evaluate.viz_history import read_history
from eupe.evaluate.viz_page import ModelColumn, PictureCell, render_page
from eupe.pca import fit_pca
from eupe.place import Place, Where
from eupe.store import Features, Store, open_store
from eupe.store.layout import DENSE
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.spec import TeacherSpec
from eupe.teachers.teacher import load_teacher
from eupe.train.targets import is_held_out

SHOWN_PX = 320
"""Side of the views on the page."""
BATCH = 8


@dataclass(frozen=True)
class VizReport:
    """What was written."""

    page: str
    models: tuple[str, ...]
    num_pictures: int
    num_held_out: int
    num_bytes: int


@dataclass(frozen=True)
class Picture:
    """A picture that may be shown."""

    key: str
    label: str | None
    sha256: str | None
    held_out: bool
    inside: Inside | None = None
    """Where its bytes are, if it is no file of its own."""


@dataclass(frozen=True)
class View:
    """The part of a picture that all models see."""

    picture: Picture
    image: Image.Image
    params: ViewParams

    def render(self, size: int) -> NDArray[np.uint8]:
        """uint8 [S, S, 3]"""
        return render_view(self.image, self.params, size)


@dataclass(frozen=True)
class StoreItem:
    """Features that were cached: no model is run."""

    name: str
    store: Store

    @property
    def size(self) -> int:
        """The finest of the store's sizes."""
        return max(self.store.spec.sizes)

    @cached_property
    def places(self) -> dict[str, tuple[int, str | None]]:
        """Row and hash of every sample that has features, by key."""
        samples = self.store.samples.select(["key", "row", "sha256", "status"]).to_pylist()
        return {s["key"]: (s["row"], s["sha256"]) for s in samples if s["status"] == "ok"}

    def read(self, pictures: Sequence[Picture]) -> Features:
        """View 0 of each picture.

        Raises: CorpusError if a picture is not the one that the store's teacher saw; PartCorruptError.
        """
        for picture in pictures:
            if self.places[picture.key][1] != picture.sha256:
                raise CorpusError(
                    f"picture {picture.key} is not the file whose features {self.store.path} holds; "
                    "give --images the pictures that it was extracted from, or extract again"
                )
        rows = [self.places[picture.key][0] for picture in pictures]
        return self.store.read(rows, [0] * len(rows), size=self.size)


@dataclass(frozen=True)
class EncoderItem:
    """A run's student, or a teacher: loaded and run."""

    name: str
    spec: TeacherSpec
    weights: Path | None = None

    @property
    def run(self) -> Path | None:
        """The training run that this is, or None for a teacher."""
        return Path(self.spec.model) if self.spec.backend == "run" else None

    def dense(self, views: Sequence[View]) -> NDArray[np.float32]:
        """Dense tokens [P, h, w, D] at the encoder's own size.

        Raises: TeacherError, RunError if it cannot be loaded.
        """
        size, device = self.spec.native_size, pick_device()
        teacher = load_teacher(
            self.spec, weights=self.weights, device=device, dtype=compute_dtype("auto", device), sizes=(size,)
        )
        pixels = torch.from_numpy(np.stack([view.render(size) for view in views]))
        batches = [teacher(pixels[i : i + BATCH]).dense.cpu() for i in range(0, len(pixels), BATCH)]
        dense: NDArray[np.float32] = torch.cat(batches).numpy()
        return dense


Item = StoreItem | EncoderItem
Stored = Sequence[tuple[StoreItem, Features]]
"""What each store holds of the pictures chosen."""


def write_page(
    items: Sequence[str],
    *,
    images: Where,
    out: Path,
    limit: int = 8,
    weights: Mapping[str, Path] | None = None,
) -> VizReport:
    """Write one HTML file that shows what each model makes of the same pictures.

    Args:
        items: stores, runs' directories and teachers' names, one column each.
        images: a folder of pictures, or an index; those that every store has features of may be shown.
        limit: most pictures to show.
        weights: local weights in place of the hub's, for teachers among the items.
    Raises: ConfigError, CorpusError, StoreError, RunError or TeacherError for what the user can mend;
        StorageError if `out` cannot be written.
    """
    if limit < 1:
        raise ConfigError(f"--limit must be at least 1, got {limit}")
    opened = open_items(items, weights or {})
    make_place(out)
    corpus = open_corpus(images)
    stores = [item for item in opened if isinstance(item, StoreItem)]
    runs = {item.name: item.run for item in opened if isinstance(item, EncoderItem) and item.run}
    pictures = choose_pictures(_pictures_in_common(corpus, stores, list(runs.values())), limit)
    decoded = [_read_image(corpus.root, picture) for picture in pictures]
    stored = {item.name: item.read(pictures) for item in stores}
    views = _views(pictures, decoded, [(item, stored[item.name]) for item in stores])
    columns = [_column(item, views, stored.get(item.name)) for item in opened]
    histories = [(name, read_history(run)) for name, run in runs.items()]
    page = render_page([_cell(view) for view in views], columns, histories)
    return VizReport(
        page=str(out),
        models=tuple(column.name for column in columns),
        num_pictures=len(pictures),
        num_held_out=sum(picture.held_out for picture in pictures),
        num_bytes=write_whole(out, page),
    )


def open_items(items: Sequence[str], weights: Mapping[str, Path]) -> list[Item]:
    """Each item as a store, a run or a teacher; loads no weights.

    Raises: ConfigError for none, or one that is none of the three; StoreError, RunError for a damaged one.
    """
    if not items:
        raise ConfigError("nothing to show: name at least one store, training run or teacher")
    opened = [_open_item(item, weights.get(item)) for item in items]
    teachers = {item.name for item in opened if isinstance(item, EncoderItem) and not item.run}
    if misplaced := sorted(set(weights) - teachers):
        raise ConfigError(f"weights are given for {misplaced[0]}, which is no teacher among the items")
    return _with_short_names(opened)


def _open_item(words: str, weights: Path | None) -> Item:
    path, place = Path(words), Place.of(words)
    if not place.is_local or place.exists("zarr.json"):
        store = open_store(place)
        if DENSE not in store.spec.tokens:
            raise ConfigError(f"{place} holds no dense features; extract it with --tokens summary,dense")
        return StoreItem(words, store)
    if _is_run(path) and not (path / CARD_FILE).is_file():
        raise RunError(f"run {path} has no student yet; finish it with `eupe train ... --resume`")
    try:
        return EncoderItem(words, resolve_teacher(words), weights)
    except TeacherError as error:
        raise ConfigError(f"{words} is no store (no zarr.json), run or teacher: {error}") from error


def _is_run(path: Path) -> bool:
    """Whether a training run was begun there; another library's folder may have a `config.json` too."""
    try:
        read_card(path)
    except RunError:
        return False
    return True


def _with_short_names(items: list[Item]) -> list[Item]:
    """A path's last part in place of the path, where that tells the items apart."""
    short = [
        Path(item.name).name if isinstance(item, StoreItem) or Path(item.name).is_dir() else item.name for item in items
    ]
    unique = Counter(short)
    pairs = zip(items, short, strict=True)
    return [replace(item, name=name) if unique[name] == 1 else item for item, name in pairs]


def _pictures_in_common(corpus: Corpus, stores: Sequence[StoreItem], runs: Sequence[Path]) -> list[Picture]:
    """Pictures that every store has features of; held out are those that no run was trained on.

    Raises: ConfigError if there is none.
    """
    held_out_share = min((read_card(run).config["holdout"] for run in runs), default=0.0)
    rows = corpus.samples.select(["key", "label", "sha256"]).to_pylist()
    for row, inside in zip(rows, insides(corpus.samples), strict=True):
        row["inside"] = inside
    for item in stores:
        found = [row for row in rows if row["key"] in item.places]
        if not found:
            raise ConfigError(
                f"store {item.store.path} has features of none of the {len(rows)} pictures of {corpus.root} "
                f"that could be shown (one is {rows[0]['key']}); "
                "give --images the pictures that every store was extracted from"
            )
        rows = found
    return [Picture(**row, held_out=is_held_out(row["key"], held_out_share)) for row in rows]


def choose_pictures(pictures: Sequence[Picture], limit: int) -> list[Picture]:
    """Held-out pictures first; among them, and among the others, one of each label in turn."""
    held_out_first = sorted(pictures, key=lambda picture: not picture.held_out)
    seen: Counter[str | None] = Counter()
    ranked = []
    for picture in held_out_first:
        ranked.append((not picture.held_out, seen[picture.label], picture))
        seen[picture.label] += 1
    return [picture for *_, picture in sorted(ranked, key=lambda rank: rank[:2])][:limit]


def _views(pictures: Sequence[Picture], images: Sequence[Image.Image], stored: Stored) -> list[View]:
    """View 0 of the stores, which must agree on it, or the centre where there is no store.

    Raises: ConfigError if two stores differ.
    """
    if stored:
        _require_same_views(pictures, stored)
        drawn = stored[0][1].params
    else:
        drawn = [draw_view(ViewSpec(), "", 0, image.width, image.height) for image in images]
    return [View(*view) for view in zip(pictures, images, drawn, strict=True)]


def _require_same_views(pictures: Sequence[Picture], stored: Stored) -> None:
    first, expected = stored[0]
    for other, got in stored[1:]:
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


def _cell(view: View) -> PictureCell:
    picture = view.picture
    return PictureCell(picture.key, picture.label, picture.held_out, view.render(SHOWN_PX))


def _column(item: Item, views: Sequence[View], stored: Features | None) -> ModelColumn:
    """A model's features as colours.

    Raises: ConfigError if they are not all numbers.
    """
    if isinstance(item, StoreItem):
        assert stored is not None and stored.dense is not None
        dense = stored.dense.astype(np.float32)
        kind, about, size = "store", str(item.store.spec.teacher["name"]), item.size
    else:
        dense = item.dense(views)
        kind, size = "teacher" if item.run is None else "run", item.spec.native_size
        about = "" if item.run is None else load_card(item.run).arch
    if not np.isfinite(dense).all():
        raise ConfigError(f"{item.name} gives features that are not finite, which have no colours")
    pca = fit_pca(dense)
    return ModelColumn(item.name, kind, about, size, dense.shape[1], dense.shape[-1], pca.explained, pca.rgb(dense))
