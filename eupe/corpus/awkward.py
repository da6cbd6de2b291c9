"""Pictures of the kinds that decoders and pipelines get wrong, generated from seeds."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from eupe.corpus.pictures import ORIENTATION


def picture(seed: int, width: int = 80, height: int = 64) -> Image.Image:
    """Return a smooth RGB picture with one sharp-edged rectangle, different for each seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    image.paste(tuple(rng.integers(0, 256, 3).tolist()), (seed % 20, 10, 30 + seed % 20, 30))
    return image


def awkward_pictures() -> dict[str, bytes]:
    """Return one readable file of each awkward kind, by file name."""
    base = picture(3, width=120, height=80)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    ramp = np.linspace(0, 65535, 80 * 120).reshape(80, 120).astype(np.uint16)
    grey_alpha = Image.merge("LA", (base.convert("L"), picture(5, 120, 80).convert("L")))
    return {
        "wide.png": _encoded(base, "PNG"),
        "grey.png": _encoded(base.convert("L"), "PNG"),
        "cmyk.jpg": _encoded(base.convert("CMYK"), "JPEG", quality=95),
        "palette-alpha.png": _encoded(transparent_palette(base), "PNG", transparency=0),
        "turned.jpg": _encoded(base, "JPEG", exif=exif, quality=95),
        "sixteen-bit.png": _encoded(Image.fromarray(ramp), "PNG"),
        "grey-alpha.png": _encoded(grey_alpha, "PNG"),
        "moving.gif": _encoded(picture(6), "GIF", save_all=True, append_images=[picture(7)]),
    }


def transparent_palette(image: Image.Image) -> Image.Image:
    """Return the picture with a palette of 16 colours, with colour 0 in its top left 20 x 20 pixels."""
    palette = image.quantize(16)
    colours = palette.getpalette()
    assert colours is not None
    pixels = np.asarray(palette).copy()
    pixels[:20, :20] = 0
    result = Image.fromarray(pixels)
    result.putpalette(colours)
    return result


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
