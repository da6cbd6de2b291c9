"""Pictures to show, their views, and the features that models of any kind have for these.

Shapes: P pictures, S pixels along a side, h w cells, D channels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from eupe.corpus.pictures import Inside
from eupe.corpus.views import ViewParams, render_view
from eupe.errors import CorpusError
from eupe.evaluate.encode import BATCH, encoded
from eupe.evaluate.subject import EncoderSubject, PixelSubject, StoreSubject, Subject
from eupe.store import Features


@dataclass(frozen=True)
class Picture:
    """A picture that may be shown."""

    key: str
    label: str | None
    sha256: str | None
    held_out: bool
    inside: Inside | None = None
    """Position of its bytes in a tar or table; None if it is a separate file."""


@dataclass(frozen=True)
class View:
    """The part of a picture that all models see."""

    picture: Picture
    image: Image.Image
    params: ViewParams

    def render(self, size: int) -> NDArray[np.uint8]:
        """Return the view as `size` x `size` pixels, uint8 [S, S, 3]."""
        return render_view(self.image, self.params, size)


def stored(subject: StoreSubject, pictures: Sequence[Picture]) -> Features:
    """Read view 0 of each picture, at the store's largest size.

    Raises: CorpusError if a picture is not the one that the store's teacher saw; PartCorruptError.
    """
    for picture in pictures:
        if subject.places[picture.key][1] != picture.sha256:
            raise CorpusError(
                f"picture {picture.key} is not the file whose features {subject.store.path} holds; "
                "give --images the pictures that it was extracted from, or extract again"
            )
    rows = [subject.places[picture.key][0] for picture in pictures]
    return subject.store.read(rows, [0] * len(rows), size=subject.size(None))


def dense_of(subject: EncoderSubject | PixelSubject, views: Sequence[View]) -> NDArray[np.float32]:
    """Return dense tokens [P, h, w, D] at the subject's own size.

    Raises: TeacherError, RunError if the subject cannot be loaded.
    """
    size = subject.size(None)
    parts = (views[i : i + BATCH] for i in range(0, len(views), BATCH))
    tokens = [
        encoded(
            lambda views: subject.encode(views, size=size),
            np.stack([view.render(size) for view in part]),
            of=subject.name,
        ).dense.cpu()
        for part in parts
    ]
    dense: NDArray[np.float32] = torch.cat(tokens).float().numpy()
    return dense


def run_of(subject: Subject) -> Path | None:
    """Return the subject's training run, if it is one."""
    return Path(subject.spec.model) if isinstance(subject, EncoderSubject) and subject.kind == "run" else None


def with_short_names(subjects: Sequence[Subject]) -> list[Subject]:
    """Replace the path of each store and run by its last part, if that is unambiguous."""
    short = [Path(each.name).name if isinstance(each, StoreSubject) or run_of(each) else each.name for each in subjects]
    unique = Counter(short)
    pairs = zip(subjects, short, strict=True)
    return [replace(each, name=name) if unique[name] == 1 else each for each, name in pairs]
