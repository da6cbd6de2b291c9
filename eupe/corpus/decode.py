"""From the bytes of a picture to upright 8-bit RGB. Extraction and training both call this function, nothing else."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from eupe.errors import CorpusError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""The decoders a picture may reach; no interpreter (EPS, PDF) among them."""

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})

MAX_PIXELS = 178_956_970
"""Larger pictures are refused before their pixels are decoded (0.5 GB of RGB)."""

BACKGROUND = (255, 255, 255)
"""Transparent pixels are composited on white."""

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode_image(data: bytes) -> Image.Image:
    """Decode one picture: first frame, turned upright by its EXIF orientation, as 8-bit RGB.

    Grey is repeated over the channels, 16-bit samples keep their high byte, CMYK is converted without a colour
    profile, alpha is composited on `BACKGROUND`.

    Raises: CorpusError with the reason, for anything that is not a whole picture of at most `MAX_PIXELS`.
    """
    if not data:
        raise CorpusError("the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise CorpusError(f"{image.width}x{image.height} pixels exceed the limit of {MAX_PIXELS}")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except CorpusError:
        raise
    except UnidentifiedImageError as error:  # Pillow's own words have an address in memory, other ones each time
        raise CorpusError(f"the file is no {', '.join(FORMATS)}") from error
    except Exception as error:  # a hostile file can raise anything from a decoder
        raise CorpusError(f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _wide_grey_to_rgb(image)
    if image.mode == "F":
        raise CorpusError("floating-point samples have no defined 8-bit meaning")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*BACKGROUND, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB")


def _wide_grey_to_rgb(image: Image.Image) -> Image.Image:
    samples = np.asarray(image)
    if samples.min() < 0 or samples.max() > 65535:
        raise CorpusError("32-bit samples have no defined 8-bit meaning")
    return Image.fromarray((samples.astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
