"""From the bytes of a picture to upright 8-bit RGB. Extraction and training both call this function, nothing else."""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from eupe.corpus.png import GREY, RGB, SIGNATURE, Png, read_png
from eupe.errors import CorpusError

SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx"),
    "HEIF": (".heic", ".heif", ".hif"),
}
"""Of files, by the decoder that a picture may reach; no interpreter (EPS, PDF) among them."""


FEATURES = {"JPEG": "jpg", "WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
"""What Pillow must be built with; PNG's zlib for all others."""


def readable_formats() -> tuple[str, ...]:
    """Return which of these decoders there are: Pillow may be built without some, and HEIF is a plugin's."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    Image.init()
    return tuple(name for name in SUFFIXES if name in Image.OPEN and features.check(FEATURES.get(name, "zlib")))


FORMATS = readable_formats()
EXTENSIONS = frozenset(suffix for name in FORMATS for suffix in SUFFIXES[name])

MAX_PIXELS = 178_956_970
"""Larger pictures are refused before their pixels are decoded (0.5 GB of RGB)."""

BACKGROUND = (255, 255, 255)
"""Transparent pixels are composited on white."""

ORIENTATION = 0x0112
"""The EXIF tag that says how a picture is to be turned."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a stored picture upright, by its orientation."""

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode_image(data: bytes) -> Image.Image:
    """Decode one picture: first frame, turned upright by its EXIF orientation, as 8-bit RGB.

    The kind is told by content, not by name. HEIC is read where the package `pillow-heif` is installed. Grey is
    repeated over the channels. 16-bit samples keep their high byte, but those of PPM files, which name their maximum,
    are scaled by it and rounded. Alpha, a transparent colour or level, and a GIF's screen where its first frame leaves
    it bare are composited on `BACKGROUND`. Colour profiles are ignored; CMYK is converted without one, and in a JPEG
    taken as inverted, as Adobe writes it. Where EXIF is nonsense, or its orientation is none of 1 to 8, the picture is
    taken as it is stored.

    Of PNGs every checksum is compared and every row must be there. The other kinds have no checksums: what ends too
    early is refused, but damage that their decoders patch over or cannot see (in a JPEG, scan data that is wrong, or
    missing before an end marker) goes unnoticed.

    Raises: CorpusError with the reason, one line that is the same for the same bytes, for anything that is not a whole
    picture of at most `MAX_PIXELS`, and where 8 bits are not defined: floating-point, signed and 32-bit samples, and
    16-bit colours of which one is transparent.
    """
    if not data:
        raise CorpusError("the file is empty")
    try:
        png = read_png(data) if data.startswith(SIGNATURE) else None
        with Image.open(io.BytesIO(data if png is None else png.picture), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise CorpusError(f"{image.width}x{image.height} pixels exceed the limit of {MAX_PIXELS}")
            image.load()
            if png is not None:
                _check_rows(image, png)
                _mend_transparency(image, png)
            return _to_rgb(_upright(image))
    except CorpusError:
        raise
    except UnidentifiedImageError as error:
        raise CorpusError(f"not a picture of a kind that is read ({', '.join(FORMATS)})") from error
    except Exception as error:  # a hostile file can raise anything from a decoder
        raise CorpusError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def _check_rows(image: Image.Image, png: Png) -> None:
    """Pillow leaves rows that are not there at zero; only what ends in zeros is worth a second look.

    Raises: CorpusError.
    """
    last_row = image.crop((0, image.height - 1, image.width, image.height))
    if png.interlaced or last_row.getbbox() is None:
        png.require_all_rows()


def _mend_transparency(image: Image.Image, png: Png) -> None:
    """Pillow spreads samples of 2 and 4 bits over 8, but not the transparent level, and narrows 16-bit colours.

    Raises: CorpusError.
    """
    transparent = image.info.get("transparency")
    if transparent is None:
        return
    if png.colour == GREY and png.depth in (2, 4):
        image.info["transparency"] = transparent * 255 // (2**png.depth - 1)
    if png.colour == RGB and png.depth == 16:
        raise CorpusError("16-bit colours of which one is transparent have no defined 8-bit meaning")


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # nonsense in place of EXIF says nothing of which way is up
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _wide_grey_to_rgb(np.asarray(image), image.info.get("transparency"))
    if image.mode == "I" and image.format == "PPM":
        return _wide_grey_to_rgb(np.asarray(image), None)
    if image.mode in ("I", "F"):
        kind = "floating-point" if image.mode == "F" else "signed and 32-bit"
        raise CorpusError(f"{kind} samples have no defined 8-bit meaning")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*BACKGROUND, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB")


def _wide_grey_to_rgb(samples: NDArray[Any], transparent: int | None) -> Image.Image:
    pixels = np.repeat((samples >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if transparent is not None:
        pixels[samples == transparent] = BACKGROUND
    return Image.fromarray(pixels)
