"""Pictures that expose a wrong model, and samples of the user's own.

The first are generated from seeds: awkward files, smooth pictures, noise, gradients and flat colours.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eupe.common.storage import AnyPath
from eupe.corpus.awkward import picture
from eupe.corpus.index import open_corpus
from eupe.corpus.pictures import insides
from eupe.corpus.views import render_view
from eupe.evaluate.judged_pictures import Pictures, centre
from eupe.teachers.library_check import awkward_views

SMOOTH, NOISY = 4, 2
FLAT = ((0, 0, 0), (255, 255, 255), (200, 30, 90))


def varied_pictures(height: int, width: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """Return varied pictures, uint8 [P, H, W, 3]; another seed gives other pictures, except for black and white."""
    rng = np.random.default_rng(seed)
    across, down = (np.linspace(0, 255, side) for side in (width, height))
    ramp = np.stack(np.broadcast_arrays(across[None, :], down[:, None], 255 - across[None, :]), axis=-1)
    rows = [
        *np.roll(awkward_views(max(height, width)), seed, axis=(1, 3)),
        *(np.asarray(picture(1000 * seed + i, 160, 120)) for i in range(SMOOTH)),
        *rng.integers(0, 256, (NOISY, height, width, 3), dtype=np.uint8),
        ramp.astype(np.uint8),
        ramp[..., rng.permutation(3)][::-1].astype(np.uint8),
        *(np.full((height, width, 3), np.roll(colour, seed), np.uint8) for colour in FLAT),
    ]
    return np.stack([_resized(row, height, width) for row in rows])


def some_pictures(source: AnyPath, size: int, *, most: int) -> NDArray[np.uint8]:
    """Return the centre views of pictures spread evenly over a corpus, uint8 [P, S, S, 3].

    Raises: CorpusError if there are none, or one cannot be read.
    """
    corpus = open_corpus(source)
    pictures = Pictures(corpus.root, tuple(corpus.samples["key"].to_pylist()), tuple(insides(corpus.samples)))
    chosen = np.unique(np.linspace(0, len(pictures) - 1, most).round().astype(int))
    images = (pictures.image(i) for i in chosen.tolist())
    return np.stack([render_view(image, centre(image.width, image.height)[0], size) for image in images])


def _resized(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    if pixels.shape[:2] == (height, width):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
