"""Pictures: where their bytes are, and the one function that reads them, and the one that decodes them.

Extraction and training both decode by `decode_image`, to upright 8-bit RGB, with the checks of PNG files that Pillow
omits.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import socket
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from eupe.common.storage import StoragePath, storage_error
from eupe.corpus.folder import MAX_PICTURE_BYTES
from eupe.corpus.tables import read_row
from eupe.errors import CorpusError, OutageError, StorageError

OUTSIDE = r"^/|(^|/)\.\.(/|$)"
"""Pattern of file names that may lead outside their folder."""
PLACE_COLUMNS = ("file", "start", "length")
"""Columns of an index for the fields of `Inside`; null for a picture that is a file of its own."""


@dataclass(frozen=True)
class Inside:
    """The location of a picture's bytes in a file that holds many."""

    file: str
    """Path of a tar or table, below the corpus's root."""
    start: int
    """First byte in a tar, or row in a table, counted from 0."""
    length: int | None
    """Number of bytes in a tar; None in a table, where the row is enough."""


def insides(samples: pa.Table) -> list[Inside | None]:
    """Return the location for each row of an index; all None if it lacks these columns."""
    if not set(PLACE_COLUMNS) <= set(samples.schema.names):
        return [None] * len(samples)
    columns = (samples[name].to_pylist() for name in PLACE_COLUMNS)
    return [None if file is None else Inside(file, *rest) for file, *rest in zip(*columns, strict=True)]


def read_picture(root: StoragePath, key: str, inside: Inside | None = None) -> bytes:
    """Read a picture's bytes.

    Args:
        inside: None for a picture that is a file of its own, whose path is the key.
    Raises: CorpusError if the picture cannot be read; StorageError if an object store fails; OutageError if the disk
        with the pictures is not available.
    """
    require_below(root, key if inside is None else inside.file)
    try:
        _require_file(root, key if inside is None else inside.file)
        if inside is None:
            require_length(root, key)
            return root.read(key)
        if inside.length is None:
            return read_row(root, inside.file, inside.start, key)
        if inside.length > MAX_PICTURE_BYTES:
            raise CorpusError(too_long(inside.length))
        data = root.read_range(inside.file, inside.start, inside.length)
    except FileNotFoundError as error:
        _require_root(root)  # an unmounted disk is not the picture's fault
        raise CorpusError(str(error)) from error
    except OutageError:
        raise
    except StorageError as error:
        if root.is_local:  # any other failure of a disk concerns only this file
            raise CorpusError(str(error)) from error
        raise
    if len(data) != inside.length:
        raise CorpusError(
            f"{root / inside.file} ends before byte {inside.start + inside.length}, where {key} would end"
        )
    return data


def require_below(root: StoragePath, name: str) -> None:
    """Raise CorpusError if a name, from an index or a list, leads out of its folder.

    Links may lead out of it: they were put there by whoever made the folder of pictures.
    """
    if root.is_local and re.search(OUTSIDE, name):
        raise CorpusError(f"{name} does not lie below {root}; pictures and the files that hold them must lie there")


def require_length(root: StoragePath, key: str) -> None:
    """Check the length of a local file before it is read.

    Raises: CorpusError if it is longer than `MAX_PICTURE_BYTES`; FileNotFoundError; StorageError.
    """
    if root.is_local and (length := root.size(key)) > MAX_PICTURE_BYTES:
        raise CorpusError(too_long(length))


def too_long(length: int) -> str:
    """Return the reason why a picture of this many bytes is not read."""
    return f"{length} bytes are more than a picture has (at most {MAX_PICTURE_BYTES})"


def _require_file(root: StoragePath, key: str) -> None:
    """Check that a local path, if it exists, is a file.

    Raises: CorpusError if it is not; StorageError if it cannot be examined, OutageError if its disk is not available.
    """
    if not root.is_local:
        return
    path = root.path(key)
    try:
        if path.exists() and not path.is_file():
            raise CorpusError(f"{path} is a pipe, a device or a folder, not a file")
    except OSError as error:
        raise storage_error(error, path, "read") from error


def _require_root(root: StoragePath) -> None:
    """Raise OutageError if a local root is missing or empty.

    A single picture may have been removed, but if all are missing, their disk probably is.
    """
    if root.is_local and not (root.local.is_dir() and any(root.local.iterdir())):
        raise OutageError(f"{root} is missing or empty on {socket.gethostname()}; mount it again")


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
"""File suffixes, by decoder; no other decoder is used, and none of these runs an interpreter (EPS, PDF)."""


FEATURES = {"JPEG": "jpg", "WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
"""Pillow feature that a decoder needs; the others are checked for `zlib`, which PNG needs."""


def readable_formats() -> tuple[str, ...]:
    """Return the available decoders: Pillow may be built without some, and HEIF comes from a plugin."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    Image.init()
    return tuple(name for name in SUFFIXES if name in Image.OPEN and features.check(FEATURES.get(name, "zlib")))


FORMATS = readable_formats()
EXTENSIONS = frozenset(suffix for name in FORMATS for suffix in SUFFIXES[name])

MAX_PIXELS = 178_956_970
"""Limit of a picture's pixels (0.5 GB of RGB); larger pictures are refused before they are decoded."""

BACKGROUND = (255, 255, 255)
"""White, on which transparent pixels are composited."""

ORIENTATION = 0x0112
"""EXIF tag that says how to turn a picture upright."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that turns a stored picture upright, by its EXIF orientation."""

# Pillow warns from half of `MAX_PIXELS` on, but pictures up to that limit are accepted.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode_image(data: bytes) -> Image.Image:
    """Decode the first frame of a picture, turned upright by its EXIF orientation, as 8-bit RGB.

    The format is detected from the content, not from the name. HEIC needs the package `pillow-heif`. Grey is repeated
    over the channels. 16-bit samples keep their high byte, except in PPM files, which state their maximum: it scales
    colours to 8 bits, and grey to 16 bits, of which the high byte is kept; both are rounded. Alpha, a transparent
    colour or level, and the part of a GIF's screen that its first frame does not cover are composited on `BACKGROUND`.
    Colour profiles are ignored; CMYK is converted without one, and in a JPEG it is taken as inverted, as Adobe writes
    it. If EXIF is invalid, or its orientation is not 1 to 8, the picture is taken as it is stored.

    In a PNG every checksum is verified and every row must be present. The other formats have no checksums: a file that
    ends too early is refused, but damage that a decoder patches over or cannot see goes unnoticed (in a JPEG, scan data
    that is wrong, or missing before an end marker).

    Raises: CorpusError if the data is not a complete picture of at most `MAX_PIXELS`, or its 8-bit values are not
    defined: floating-point, signed and 32-bit samples, and 16-bit colours of which one is transparent. The message is
    one line, and the same for the same bytes.
    """
    if not data:
        raise CorpusError("the file is empty")
    try:
        png = read_png(data) if data.startswith(PNG_SIGNATURE) else None
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
    except Exception as error:  # decoders can raise anything on a malformed file
        raise CorpusError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def _check_rows(image: Image.Image, png: Png) -> None:
    """Check that no row of a PNG is missing.

    Pillow leaves missing rows at zero, so a picture is checked only if it is interlaced or its last row is zero.

    Raises: CorpusError if rows are missing.
    """
    last_row = image.crop((0, image.height - 1, image.width, image.height))
    if png.interlaced or last_row.getbbox() is None:
        png.require_all_rows()


def _mend_transparency(image: Image.Image, png: Png) -> None:
    """Scale the transparent level of a PNG as Pillow scaled its samples.

    Pillow scales samples of 2 and 4 bits to 8, but not the transparent level; 16-bit colours it reduces to 8 bits.

    Raises: CorpusError for 16-bit colours of which one is transparent.
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
    except Exception:  # invalid EXIF does not say which way is up
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


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE = 0, 2, 3
"""Colour types."""
PNG_SAMPLES = {GREY: 1, RGB: 3, PALETTE: 1, 4: 2, 6: 4}
"""Samples per pixel, by colour type."""
ADAM7_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column, first row, column step and row step of each Adam7 pass."""
INFLATED_AT_ONCE = 2**20
UNSEEN = (b"iCCP", b"tEXt", b"zTXt", b"iTXt")
"""Chunks for which Pillow refuses the whole picture if they are large or inflate to much data."""
ORIENTED = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""Beginnings of text chunks that may hold the EXIF orientation."""
MAX_TEXT_BYTES = 2**20


@dataclass(frozen=True)
class Png:
    """A PNG file whose chunks are complete."""

    width: int
    height: int
    depth: int
    """Bits per sample."""
    colour: int
    interlaced: bool
    pixels: Sequence[memoryview]
    """The compressed stream, in the pieces in which the file holds it."""
    picture: bytes
    """The file without profiles and texts, which do not affect pixels, except texts that may hold the orientation."""

    def require_all_rows(self) -> None:
        """Raise CorpusError if the stream ends before the last row."""
        missing = self._filtered_bytes()
        inflate = zlib.decompressobj()
        for piece in self.pixels:
            data: bytes | memoryview = piece
            # Bounded steps: only the length is needed, and all rows together may be large.
            while missing > 0 and (rows := inflate.decompress(data, min(missing, INFLATED_AT_ONCE))):
                missing -= len(rows)
                data = inflate.unconsumed_tail
        if missing > 0:
            raise CorpusError("the PNG is truncated: its pixels end before the last row")

    def _filtered_bytes(self) -> int:
        """Return the number of bytes of all rows, each with its filter byte."""
        bits = self.depth * PNG_SAMPLES[self.colour]
        total = 0
        for x0, y0, dx, dy in ADAM7_PASSES if self.interlaced else ((0, 0, 1, 1),):
            columns, rows = -(-(self.width - x0) // dx), -(-(self.height - y0) // dy)
            if columns > 0 and rows > 0:
                total += rows * (1 + -(-columns * bits // 8))
        return total


def read_png(data: bytes) -> Png:
    """Read the chunks of a PNG without decoding them.

    Raises: CorpusError if a checksum is wrong, or a required chunk is missing.
    """
    view, at, chunks = memoryview(data), len(PNG_SIGNATURE), []
    kept: list[bytes | memoryview] = [PNG_SIGNATURE]
    while True:
        length = int.from_bytes(view[at : at + 4], "big")
        name, end = bytes(view[at + 4 : at + 8]), at + 8 + length
        if end + 4 > len(data):
            raise CorpusError("the PNG is truncated: it ends before its last chunk does")
        if zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise CorpusError(f"the PNG is damaged: the checksum of its chunk {name!r} is wrong")
        body = view[at + 8 : end]
        if name not in UNSEEN or _may_turn(name, bytes(body)):
            kept.append(view[at : end + 4])
        if name == b"IEND":
            break
        chunks.append((name, body))
        at = end + 4
    return _checked(chunks, b"".join(kept))


def _may_turn(name: bytes, body: bytes) -> bool:
    """Return whether a chunk may hold an orientation that Pillow reads, and is not too large for Pillow."""
    if not body.startswith(ORIENTED):
        return False
    words = body.partition(b"\0")[2]
    if name == b"zTXt":
        return _inflates_to_less(words[1:])
    if name == b"iTXt" and words[:1] == b"\1":
        return _inflates_to_less(words[2:].split(b"\0", 2)[-1])
    return len(words) <= MAX_TEXT_BYTES


def _inflates_to_less(compressed: bytes) -> bool:
    try:
        return len(zlib.decompressobj().decompress(compressed, MAX_TEXT_BYTES)) < MAX_TEXT_BYTES
    except zlib.error:
        return False


def _checked(chunks: Sequence[tuple[bytes, memoryview]], picture: bytes) -> Png:
    names = [name for name, _ in chunks]
    if names[:1] != [b"IHDR"] or len(chunks[0][1]) != 13:
        raise CorpusError("the PNG is damaged: it does not begin with a header")
    header = chunks[0][1]
    width, height = (int.from_bytes(header[i : i + 4], "big") for i in (0, 4))
    depth, colour, interlacing = header[8], header[9], header[12]
    if colour not in PNG_SAMPLES:
        raise CorpusError(f"the PNG is damaged: there is no colour type {colour}")
    for name in (b"PLTE", b"IDAT")[0 if colour == PALETTE else 1 :]:
        if name not in names:
            raise CorpusError(f"the PNG is damaged: its chunk {name!r} is missing")
    pixels = [body for name, body in chunks if name == b"IDAT"]
    return Png(width, height, depth, colour, bool(interlacing), pixels, picture)
