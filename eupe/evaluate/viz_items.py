"""What may stand in a column: stores, runs and teachers, and the pictures and views that they are asked about.

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

from eupe.corpus.pictures import Inside
from eupe.corpus.views import ViewParams, render_view
from eupe.device import compute_dtype, pick_device
from eupe.encoder import CARD_FILE
from eupe.errors import ConfigError, CorpusError, RunError, TeacherError
from eupe.evaluate.run import is_run
from eupe.place import Place
from eupe.store import Features, Store, open_store
from eupe.store.layout import DENSE
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.spec import TeacherSpec
from eupe.teachers.teacher import load_teacher

BATCH = 8


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
    if is_run(path) and not (path / CARD_FILE).is_file():
        raise RunError(f"run {path} has no student yet; finish it with `eupe train ... --resume`")
    try:
        return EncoderItem(words, resolve_teacher(words), weights)
    except TeacherError as error:
        raise ConfigError(f"{words} is no store (no zarr.json), run or teacher: {error}") from error


def _with_short_names(items: list[Item]) -> list[Item]:
    """A path's last part in place of the path, where that tells the items apart."""
    short = [
        Path(item.name).name if isinstance(item, StoreItem) or Path(item.name).is_dir() else item.name for item in items
    ]
    unique = Counter(short)
    pairs = zip(items, short, strict=True)
    return [replace(item, name=name) if unique[name] == 1 else item for item, name in pairs]
