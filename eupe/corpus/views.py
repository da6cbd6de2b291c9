"""Views: crops of an upright picture, optionally mirrored and recoloured, rendered at any size with one fixed kernel.

A view is *drawn* from a hash of (seed, key, k), so that every teacher gets the same crops in any order on any machine.
It is *stored* as its parameters, so that replaying it needs no random generator.

Colours and sharpness are changed in the uint8 view, in this order: the four factors of the colour jitter in a random
order, greyscale, blur, solarisation. All computation is on integers, or in single IEEE float32 operations whose results
are exactly defined, so that every machine gets the same pixels. Operations that need more than a lookup table of levels
process the view in strips, which fit the processor's cache.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eupe.common.reading import from_plain, to_plain
from eupe.errors import ConfigError

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels of the upright picture; x1 and y1 are exclusive."""

KERNEL = "pillow-crop-bicubic"
"""Crop, then resize the crop with antialiasing, on 8-bit samples: pixels outside the box have no effect."""

MAX_ATTEMPTS = 10

POLICY = Literal["center", "squash", "rrc"]
PHOTOMETRIC = Literal["none", "eupe"]


class ViewParams(NamedTuple):
    """All parameters of a view of a picture."""

    box: Box
    flip: bool
    photometric: Photometric


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """The rules by which the views of every sample are drawn."""

    policy: POLICY = "center"
    """`center`: the largest centred square. `squash`: the whole picture, whatever its shape. `rrc`: random resized
    crops with a horizontal flip."""
    num_views: int = 1
    seed: int = 0
    scale: tuple[float, float] = (0.08, 1.0)
    """`rrc`: range of the crop's area, as a fraction of the picture's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """`rrc`: range of width / height, drawn log-uniformly."""
    flip: float = 0.5
    """`rrc`: probability of mirroring. Part of the view, because a teacher's map does not flip with its picture."""
    photometric: PHOTOMETRIC = "none"
    """`eupe`: colours and sharpness are changed, too; see `eupe.corpus.views.draw_photometric`."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields that determine the views, and no others."""
        drawn = to_plain(self)
        del drawn["photometric"]
        if self.policy != "rrc":
            seed = {} if self.photometric == "none" else {"seed": self.seed}
            drawn = {"policy": self.policy, "num_views": 1, **seed}
        if self.photometric == "none":
            return {**drawn, "kernel": KERNEL}
        return {**drawn, "photometric": self.photometric, "kernel": f"{KERNEL}+{PHOTOMETRIC_KERNEL}"}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> ViewSpec:
        """Build a specification from the result of `to_json`.

        Raises: ConfigError for views that this version cannot draw.
        """
        fields = from_plain({name: value for name, value in plain.items() if name != "kernel"})
        try:
            spec = cls(**fields)
        except TypeError as error:
            raise ConfigError(f"the stored views cannot be drawn by this version of eupe: {error}") from error
        # Comparing all fields also refuses another kernel, which would render other pixels.
        known = spec.policy in get_args(POLICY) and spec.photometric in get_args(PHOTOMETRIC)
        if not known or spec.to_json() != dict(plain):
            raise ConfigError(
                f"the stored views (policy {spec.policy}, photometric {spec.photometric}, kernel "
                f"{plain.get('kernel')}) cannot be drawn by this version of eupe; use the version that made them"
            )
        return spec


def parse_views(
    text: str, *, seed: int, scale: str | None = None, ratio: str | None = None, photometric: str = "none"
) -> ViewSpec:
    """Parse `center`, `squash` or `rrc:K` from the command line, and the ranges of random crops, `MIN,MAX` each.

    Raises: ConfigError if one of them is invalid.
    """
    match = re.fullmatch(r"rrc:([1-9]\d*)", text)
    if not match and text not in ("center", "squash"):
        raise ConfigError(
            f"--views {text!r} is unknown; give center, squash, or rrc:K with K views per picture (rrc:4)"
        )
    if photometric not in get_args(PHOTOMETRIC):
        raise ConfigError(f"--photometric {photometric!r} is unknown; give none or eupe")
    colours = cast(PHOTOMETRIC, photometric)
    if not match:
        for name, words in (("scale", scale), ("ratio", ratio)):
            if words is not None:
                raise ConfigError(f"--{name} is for random crops only; --views {text} draws none")
        return ViewSpec(policy="squash" if text == "squash" else "center", seed=seed, photometric=colours)
    spec = ViewSpec(policy="rrc", num_views=int(match[1]), seed=seed, photometric=colours)
    if scale is not None:
        spec = replace(spec, scale=_range("--scale", scale, most=1))
    if ratio is not None:
        spec = replace(spec, ratio=_range("--ratio", ratio, most=math.inf))
    return spec


def _range(option: str, words: str, *, most: float) -> tuple[float, float]:
    """Parse `MIN,MAX`.

    Raises: ConfigError unless 0 < MIN <= MAX <= most.
    """
    try:
        low, high = map(float, words.split(","))
        if not 0 < low <= high <= most:
            raise ValueError
    except ValueError as error:
        limit = "" if math.isinf(most) else f" and at most {most:g}"
        raise ConfigError(
            f"{option} takes MIN,MAX with MIN above 0 and MAX at least MIN{limit} ({option} 0.25,1); got {words!r}"
        ) from error
    return low, high


def draw_view(spec: ViewSpec, key: str, k: int, width: int, height: int) -> ViewParams:
    """Draw view `k` of the sample `key`, whose upright picture is `width` x `height` pixels."""
    photometric = NEUTRAL if spec.photometric == "none" else draw_colours(spec.seed, key, k)
    return ViewParams(*_draw_crop(spec, key, k, width, height), photometric)


def draw_colours(seed: int, key: str, k: int, *, whose: str = "") -> Photometric:
    """Draw colours and sharpness of view `k` of the sample `key`; another `whose` gives independent numbers."""
    return draw_photometric((*_uniforms(seed, key, k, f"{whose}jitter"), *_uniforms(seed, key, k, f"{whose}filters")))


def _draw_crop(spec: ViewSpec, key: str, k: int, width: int, height: int) -> tuple[Box, bool]:
    """Draw the box and the flip.

    Source: `rrc` follows torchvision's RandomResizedCrop.get_params. Deviation: a hash replaces the random generator.
    """
    if spec.policy == "center":
        side = min(width, height)
        return _centred(side, side, width, height), False
    if spec.policy == "squash":
        return (0, 0, width, height), False
    for attempt in range(MAX_ATTEMPTS):
        area, ratio, across, down, flip = _uniforms(spec.seed, key, k, attempt)
        target = width * height * (spec.scale[0] + area * (spec.scale[1] - spec.scale[0]))
        low, high = math.log(spec.ratio[0]), math.log(spec.ratio[1])
        aspect = math.exp(low + ratio * (high - low))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            x0, y0 = int(across * (width - w + 1)), int(down * (height - h + 1))
            return (x0, y0, x0 + w, y0 + h), flip < spec.flip
    # No attempt fitted the picture: take its centre, as near to its shape as the ratios allow.
    flip = _uniforms(spec.seed, key, k, MAX_ATTEMPTS)[4]
    w = max(1, min(width, round(height * spec.ratio[1])))
    h = max(1, min(height, round(width / spec.ratio[0])))
    return _centred(w, h, width, height), flip < spec.flip


def _centred(w: int, h: int, width: int, height: int) -> Box:
    x0, y0 = (width - w) // 2, (height - h) // 2
    return x0, y0, x0 + w, y0 + h


def _uniforms(seed: int, key: str, k: int, purpose: int | str) -> tuple[float, ...]:
    """Return five numbers in [0, 1) that depend only on the arguments, on every machine.

    Args:
        purpose: number of an attempt at a crop, or a word.
    """
    digest = hashlib.blake2b(f"{seed}\0{key}\0{k}\0{purpose}".encode(), digest_size=40).digest()
    # 53 bits, which a float64 holds exactly.
    return tuple((word >> 11) * 2.0**-53 for word in struct.unpack("<5Q", digest))


def render_view(image: Image.Image, params: ViewParams, size: int) -> NDArray[np.uint8]:
    """Return the view's pixels, uint8 [size, size, 3]; every teacher and the student get the same ones, bit for bit."""
    view = image.crop(params.box).resize((size, size), Image.Resampling.BICUBIC)
    if params.flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return apply_photometric(np.asarray(view), params.photometric)


def view_digest(view: NDArray[np.uint8]) -> int:
    """Return 64 bits of BLAKE2b over a rendered view; they are equal only if every pixel is equal."""
    return int.from_bytes(hashlib.blake2b(view.tobytes(), digest_size=8).digest(), "little")


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
