"""The pictures that are judged, and the views of them that a subject sees."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from PIL import Image

from eupe.common.storage import StoragePath
from eupe.corpus.pictures import Inside, decode_image, read_picture
from eupe.corpus.views import NEUTRAL, ViewParams, ViewSpec, draw_view
from eupe.errors import CorpusError

CropFunction = Callable[[int, int], list[ViewParams]]
"""Function from width and height of an upright picture to the views of it that are shown."""

STRIDE = 2 / 3
"""Step between windows, as a share of a window's side (EUPE's and DINOv3's segmentation: 341 of 512)."""


@dataclass(frozen=True)
class Pictures:
    """Pictures by key, with the location of their bytes."""

    root: StoragePath
    keys: tuple[str, ...]
    insides: tuple[Inside | None, ...] = field(default=(), repr=False)
    """Position of each in a tar or table; empty if all are separate files."""
    _digests: dict[int, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    """sha256 of the pictures that `sha256` was asked for."""

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, i: int) -> bytes:
        """Read a picture's bytes.

        Raises: CorpusError naming the picture if it cannot be read.
        """
        try:
            return read_picture(self.root, self.keys[i], self.insides[i] if self.insides else None)
        except CorpusError as error:
            raise CorpusError(f"picture {self.keys[i]} of {self.root} cannot be read: {error}") from error

    def sha256(self, i: int) -> str:
        """Return the sha256 of a picture's bytes as they were read last, by which stores and caches identify it.

        Raises: CorpusError naming the picture if it cannot be read.
        """
        if i not in self._digests:
            self._digests[i] = hashlib.sha256(self.read(i)).hexdigest()
        return self._digests[i]

    def image(self, i: int) -> Image.Image:
        """Decode a picture: upright, 8-bit RGB.

        Raises: CorpusError naming the picture if it cannot be read or decoded.
        """
        try:
            data = self.read(i)
            if i in self._digests:  # the file may have changed since
                self._digests[i] = hashlib.sha256(data).hexdigest()
            image = decode_image(data)
        except CorpusError as error:
            if self.keys[i] in str(error):  # `read` has named it already
                raise
            raise CorpusError(f"picture {self.keys[i]} of {self.root} cannot be read: {error}") from error
        self._sides[i] = image.size
        return image

    def sides(self, i: int) -> tuple[int, int]:
        """Return width and height of the upright picture, decoding it only if it has not been decoded before.

        Raises: as `image`.
        """
        return self._sides[i] if i in self._sides else self.image(i).size

    @cached_property
    def _sides(self) -> dict[int, tuple[int, int]]:
        """Return width and height of the pictures decoded so far; `image` fills it."""
        return {}

    def pick(self, places: Sequence[int]) -> Pictures:
        """Return the pictures at some places."""
        insides = tuple(self.insides[i] for i in places) if self.insides else ()
        return Pictures(self.root, tuple(self.keys[i] for i in places), insides)


def centre(width: int, height: int) -> list[ViewParams]:
    """Return the largest centred square."""
    return [draw_view(ViewSpec(), "", 0, width, height)]


def whole(width: int, height: int) -> list[ViewParams]:
    """Return the whole picture, squashed to a square."""
    return [draw_view(ViewSpec(policy="squash"), "", 0, width, height)]


def windows(width: int, height: int) -> list[ViewParams]:
    """Return squares of the picture's shorter side that cover it, each overlapping the next by a third.

    They are what a sliding window sees after the picture's shorter side is resized to the window's. Source: EUPE, arXiv
    2603.22387, segmentation (512 px, stride 341).
    """
    side = min(width, height)
    stride = max(1, round(side * STRIDE))
    steps = -(-(max(width, height) - side) // stride)
    # the last window ends at the picture's edge, so it may overlap by more than a third
    starts = [min(i * stride, max(width, height) - side) for i in range(steps + 1)]
    corners = [(start, 0) if width >= height else (0, start) for start in starts]
    return [ViewParams((x, y, x + side, y + side), False, NEUTRAL) for x, y in corners]
