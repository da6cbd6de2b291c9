"""Changes of a view's colours and sharpness: drawn once, stored as parameters, with the same pixels on every machine.

They are applied to the uint8 view in this order: the four factors of the colour jitter in a random order, greyscale,
blur, solarisation. All computation is on integers, or in single IEEE float32 operations whose results are exactly
defined. Operations that need more than a lookup table of levels process the view in strips, which fit the processor's
cache.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PHOTOMETRIC_KERNEL = "numpy-photometric-pillow-luma"

ORDERS = tuple(itertools.permutations(("brightness", "contrast", "saturation", "hue")))
"""Permutations of the four factors, in lexicographic order; `Photometric.order` is an index into them."""

JITTER_PROBABILITY, BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.8, 0.4, 0.4, 0.2, 0.1
GREY_PROBABILITY = 0.2
BLUR_PROBABILITY, BLUR_SIGMA_PX, BLUR_SIDE_PX = 0.5, (0.1, 2.0), 224
SOLARISE_PROBABILITY, SOLARISE_THRESHOLD = 0.2, 128
NUM_DRAWN = 10

ONE = 1 << 16
"""The value 1 in fixed point."""
STRIP_PIXELS = 1 << 14
BLUR_REACH = 3
"""Distance at which the Gaussian is cut off, in standard deviations."""
EXTRA_BITS = 6
"""Bits of a level's fraction that are kept between the two passes of the blur."""


class Photometric(NamedTuple):
    """The parameters as they are stored, float32 [8]; the defaults change nothing."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    """Rotation of the hue in turns of the colour circle, from -0.5 to 0.5."""
    order: float = 0.0
    """Index into `ORDERS`, 0 to 23: the order in which the four above are applied."""
    grey: float = 0.0
    """1 for greyscale, otherwise 0."""
    blur: float = 0.0
    """Standard deviation of the Gaussian as a fraction of the view's side, so that every size loses the same detail."""
    solarise: float = 256.0
    """Levels from this one on are inverted; 256 inverts none."""


NEUTRAL = Photometric()


def draw_photometric(uniforms: Sequence[float]) -> Photometric:
    """Draw parameters, exact in float32, from `NUM_DRAWN` numbers in [0, 1).

    Source: the constants published for BYOL (Grill et al. 2020, appendix B) and DINO (Caron et al. 2021, main_dino.py).
    Deviations: all K views follow one distribution, so blur has a single probability, 0.5 (in the sources 1 and 0.1 for
    the two global crops), and any view may be solarised (in the sources only the second); the blur's width, 0.1 to 2 px
    at 224 px, scales with the view; the numbers come from a hash.
    """
    jitter, brightness, contrast, saturation, hue, order, grey, blur, sigma, solarise = uniforms
    drawn = NEUTRAL
    if jitter < JITTER_PROBABILITY:
        drawn = drawn._replace(
            brightness=1 + BRIGHTNESS * (2 * brightness - 1),
            contrast=1 + CONTRAST * (2 * contrast - 1),
            saturation=1 + SATURATION * (2 * saturation - 1),
            hue=HUE * (2 * hue - 1),
            order=float(int(order * len(ORDERS))),
        )
    if grey < GREY_PROBABILITY:
        drawn = drawn._replace(grey=1.0)
    if blur < BLUR_PROBABILITY:
        low, high = BLUR_SIGMA_PX
        drawn = drawn._replace(blur=(low + sigma * (high - low)) / BLUR_SIDE_PX)
    if solarise < SOLARISE_PROBABILITY:
        drawn = drawn._replace(solarise=float(SOLARISE_THRESHOLD))
    return Photometric(*np.array(drawn, np.float32).tolist())


def are_possible(params: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return which parameter sets of [..., 8] can be applied; one with NaN cannot."""
    brightness, contrast, saturation, hue, order, grey, blur, solarise = np.moveaxis(params, -1, 0)
    factors = np.stack([brightness, contrast, saturation, blur])
    possible: NDArray[np.bool_] = (
        ((factors >= 0) & np.isfinite(factors)).all(axis=0)
        & (np.abs(hue) <= 0.5)
        & np.isin(order, np.arange(len(ORDERS)))
        & np.isin(grey, (0, 1))
        & np.isin(solarise, np.arange(257))
    )
    return possible


def apply_photometric(view: NDArray[np.uint8], params: Photometric) -> NDArray[np.uint8]:
    """Return the changed view, uint8 [S, S, 3]; the view itself if all parameters are neutral."""
    for name in ORDERS[int(params.order)]:
        factor = getattr(params, name)
        if factor != getattr(NEUTRAL, name):
            view = JITTER[name](view, factor)
    if params.grey:
        view = np.repeat(_luma(view)[..., None], 3, axis=-1)
    if params.blur:
        view = _blurred(view, params.blur * len(view))
    if params.solarise < NEUTRAL.solarise:
        levels = np.arange(256)
        view = _replaced(view, np.where(levels < params.solarise, levels, 255 - levels))
    return view


def _replaced(view: NDArray[np.uint8], levels: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the view with each level replaced by its entry in a table of 256."""
    replaced: NDArray[np.uint8] = np.take(levels.astype(np.uint8), view)
    return replaced


def _luma(view: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return ITU-R 601-2 grey levels, uint8 [S, S]; Pillow computes them in integers."""
    return np.asarray(Image.fromarray(view).convert("L"))


def _strips(side: int) -> Iterator[slice]:
    rows = max(1, STRIP_PIXELS // side)
    return (slice(start, min(start + rows, side)) for start in range(0, side, rows))


def _brightened(view: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    return _replaced(view, _blend(0, np.arange(256), factor))


def _contrasted(view: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """Scale the contrast about the mean grey level, rounded to a whole number as in Pillow."""
    grey = _luma(view)
    mean = (2 * int(grey.sum(dtype=np.int64)) + grey.size) // (2 * grey.size)
    return _replaced(view, _blend(mean, np.arange(256), factor))


def _saturated(view: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    grey, saturated = _luma(view), np.empty_like(view)
    for strip in _strips(len(view)):
        origin = grey[strip].astype(np.int32)
        for channel in range(3):
            saturated[strip, :, channel] = _blend(origin, view[strip, :, channel].astype(np.int32), factor)
    return saturated


def _blend(origin: Any, levels: NDArray[Any], factor: float) -> NDArray[Any]:
    """Return origin + factor * (levels - origin), rounded half up and clipped to 0 to 255."""
    fixed = round(factor * ONE)
    blended: NDArray[Any] = np.clip((levels * fixed + origin * (ONE - fixed) + ONE // 2) >> 16, 0, 255)
    return blended


def _hue_turned(view: NDArray[np.uint8], turn: float) -> NDArray[np.uint8]:
    """Rotate the hue in HSV; the largest and the smallest of a pixel's three levels stay the same."""
    turned = np.empty_like(view)
    for strip in _strips(len(view)):
        red, green, blue = (view[strip, :, channel].astype(np.float32) for channel in range(3))
        largest = np.maximum(np.maximum(red, green), blue)
        chroma = largest - np.minimum(np.minimum(red, green), blue)
        divisor = np.maximum(chroma, 1)  # grey has chroma 0, any other colour at least 1
        sextant = np.where(largest == green, (blue - red) / divisor + 2, (red - green) / divisor + 4)
        sextant = np.where(largest == red, (green - blue) / divisor, sextant) + np.float32(6 * (turn % 1))
        sextant = np.where(sextant > 5, sextant - 6, sextant)
        for channel in range(3):
            distance = np.abs(np.abs(sextant - 2 * channel) - 3)
            turned[strip, :, channel] = np.rint(largest - chroma * np.clip(2 - distance, 0, 1))
    return turned


JITTER = {"brightness": _brightened, "contrast": _contrasted, "saturation": _saturated, "hue": _hue_turned}


def _blurred(view: NDArray[np.uint8], sigma_px: float) -> NDArray[np.uint8]:
    """Return the view after a Gaussian blur; pixels beyond an edge repeat the pixel at the edge."""
    weights = _gaussian(sigma_px)
    if (reach := len(weights) - 1) == 0:
        return view
    padded = np.pad(view, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    blurred = np.empty_like(view)
    for strip in _strips(len(view)):
        down = _convolved(padded[strip.start : strip.stop + 2 * reach].astype(np.int32), weights)
        # Levels in 1/64 times 16-bit weights stay below 2**30, so the second pass fits int32.
        down = (down + (1 << (15 - EXTRA_BITS))) >> (16 - EXTRA_BITS)
        across = _convolved(down.swapaxes(0, 1), weights).swapaxes(0, 1)
        blurred[strip] = (across + (1 << (15 + EXTRA_BITS))) >> (16 + EXTRA_BITS)
    return blurred


def _gaussian(sigma_px: float) -> list[int]:
    """Return the weights in fixed point from the centre outwards; the whole kernel, both sides, sums to `ONE`."""
    bells = [math.exp(-0.5 * (d / sigma_px) ** 2) for d in range(math.ceil(BLUR_REACH * sigma_px) + 1)]
    total = 2 * sum(bells) - bells[0]
    outer = [weight for bell in bells[1:] if (weight := round(bell / total * ONE))]
    return [ONE - 2 * sum(outer), *outer]  # the centre absorbs the rounding, so flat areas keep their level


def _convolved(values: NDArray[np.int32], weights: Sequence[int]) -> NDArray[np.int32]:
    """Convolve along the first axis, which gets shorter by the reach at both ends; the result is scaled by `ONE`."""
    reach = len(weights) - 1
    size = len(values) - 2 * reach
    total = values[reach : reach + size] * np.int32(weights[0])
    pair = np.empty_like(total)
    for distance, weight in enumerate(weights[1:], 1):
        np.add(values[reach - distance :][:size], values[reach + distance :][:size], out=pair)
        pair *= weight
        total += pair
    return total
