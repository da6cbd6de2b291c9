"""Views: crops of an upright picture, optionally mirrored and recoloured, rendered at any size with one fixed kernel.

A view is *drawn* from a hash of (seed, key, k), so that every teacher gets the same crops in any order on any machine.
It is *stored* as its parameters, so that replaying it needs no random generator.
"""

from __future__ import annotations

import hashlib
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eupe.corpus.photometric import NEUTRAL, PHOTOMETRIC_KERNEL, Photometric, apply_photometric, draw_photometric
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
    """`eupe`: colours and sharpness are changed, too; see `eupe.corpus.photometric.draw_photometric`."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields that determine the views, and no others."""
        drawn = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if k != "photometric"}
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
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items() if k != "kernel"}
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
