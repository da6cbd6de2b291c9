"""Dense features of runs as colours, on the same pictures for all runs.

Shapes: P pictures, S pixels along a side, h w cells, C = 3 colours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eupe.corpus.index import open_corpus
from eupe.corpus.pictures import insides
from eupe.corpus.views import render_view
from eupe.errors import ConfigError
from eupe.evaluate.pictures import Pictures, centre
from eupe.evaluate.run import not_learned
from eupe.evaluate.subject import open_subjects
from eupe.pages.viz import SHOWN_PX, choose_pictures
from eupe.pages.viz_items import Picture
from eupe.pca import fit_pca
from eupe.place import Where
from eupe.store.layout import DENSE


@dataclass(frozen=True)
class RunMaps:
    """A run's maps of all pictures."""

    name: str
    size: int
    maps_PhwC: NDArray[np.uint8]


@dataclass(frozen=True)
class Maps:
    """Pictures, with the maps of every run."""

    pictures: tuple[Picture, ...]
    views_PSSC: NDArray[np.uint8]
    """Centre crops that all runs saw."""
    runs: tuple[RunMaps, ...]


def draw_maps(runs: Mapping[str, Path], images: Where, *, limit: int) -> Maps:
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
    samples = corpus.samples.select(["key", "label", "sha256"]).to_pylist()
    known = [
        Picture(**sample, held_out=held, inside=inside)
        for sample, held, inside in zip(
            samples, not_learned(samples, list(runs.values())), insides(corpus.samples), strict=True
        )
    ]
    chosen = choose_pictures(known, limit)
    pictures = Pictures(corpus.root, tuple(p.key for p in chosen), tuple(p.inside for p in chosen))
    images_P = [pictures.image(i) for i in range(len(pictures))]
    views = np.stack([render_view(image, centre(image.width, image.height)[0], SHOWN_PX) for image in images_P])
    return Maps(tuple(chosen), views, tuple(_maps(name, run, pictures) for name, run in runs.items()))


def _maps(name: str, run: Path, pictures: Pictures) -> RunMaps:
    (subject,) = open_subjects([str(run)], {})
    size = subject.size(None)
    encoded = subject.encode_views(pictures, kinds=[DENSE], size=size, crop=centre)
    assert encoded.dense is not None
    dense = encoded.dense.float().numpy()
    if not np.isfinite(dense).all():
        raise ConfigError(f"run {run} gives features that are not finite, which have no colours; leave --images out")
    return RunMaps(name, size, fit_pca(dense).rgb(dense))
