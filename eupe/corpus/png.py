"""Checks of PNG files that Pillow omits: wrong checksums, a missing end or palette, missing pixels."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from eupe.errors import CorpusError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE = 0, 2, 3
"""Colour types."""
SAMPLES = {GREY: 1, RGB: 3, PALETTE: 1, 4: 2, 6: 4}
"""Samples per pixel, by colour type."""
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column, first row, column step and row step of each Adam7 pass."""
INFLATED_AT_ONCE = 2**20
UNSEEN = (b"iCCP", b"tEXt", b"zTXt", b"iTXt")
"""Chunks for which Pillow refuses the whole picture if they are large or inflate to much data."""
ORIENTED = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""Beginnings of text chunks that may hold the EXIF orientation."""
MAX_WORDS = 2**20


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
        bits = self.depth * SAMPLES[self.colour]
        total = 0
        for x0, y0, dx, dy in PASSES if self.interlaced else ((0, 0, 1, 1),):
            columns, rows = -(-(self.width - x0) // dx), -(-(self.height - y0) // dy)
            if columns > 0 and rows > 0:
                total += rows * (1 + -(-columns * bits // 8))
        return total


def read_png(data: bytes) -> Png:
    """Read the chunks of a PNG without decoding them.

    Raises: CorpusError if a checksum is wrong, or a required chunk is missing.
    """
    view, at, chunks = memoryview(data), len(SIGNATURE), []
    kept: list[bytes | memoryview] = [SIGNATURE]
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
    return len(words) <= MAX_WORDS


def _inflates_to_less(compressed: bytes) -> bool:
    try:
        return len(zlib.decompressobj().decompress(compressed, MAX_WORDS)) < MAX_WORDS
    except zlib.error:
        return False


def _checked(chunks: Sequence[tuple[bytes, memoryview]], picture: bytes) -> Png:
    names = [name for name, _ in chunks]
    if names[:1] != [b"IHDR"] or len(chunks[0][1]) != 13:
        raise CorpusError("the PNG is damaged: it does not begin with a header")
    header = chunks[0][1]
    width, height = (int.from_bytes(header[i : i + 4], "big") for i in (0, 4))
    depth, colour, interlacing = header[8], header[9], header[12]
    if colour not in SAMPLES:
        raise CorpusError(f"the PNG is damaged: there is no colour type {colour}")
    for name in (b"PLTE", b"IDAT")[0 if colour == PALETTE else 1 :]:
        if name not in names:
            raise CorpusError(f"the PNG is damaged: its chunk {name!r} is missing")
    pixels = [body for name, body in chunks if name == b"IDAT"]
    return Png(width, height, depth, colour, bool(interlacing), pixels, picture)
