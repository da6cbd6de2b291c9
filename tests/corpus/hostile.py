"""Hostile files made from seeds, each with the outcome that is right.

What is expected comes from how a file was made, never from Pillow's reading of it: lossless files are written from the
samples that they must give back (PNG, BMP, PPM and GIF by the few lines below, some TIFFs by tifffile), and lossy ones
are compared with torchvision's decoders.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image, ImageChops
from torchvision.io import ImageReadMode, decode_gif, decode_jpeg, decode_webp

from eupe.corpus.awkward import picture
from eupe.corpus.pictures import ORIENTATION

Pixels = NDArray[np.uint8]
"""Upright RGB, [height, width, 3]."""

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
"""PNG's colour types."""
SAMPLES = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
NO_PICTURE = "not a picture of a kind that is read"
TRUNCATED = "(?i)truncated|reached EOF|not a picture|cannot load|decoder error|could not create decoder"
JPEG_TOLERANCE = 2
"""Levels by which two builds of libjpeg may differ."""


@dataclass(frozen=True)
class Hostile:
    """A file, and either the picture that it holds or a part of the reason for which it is refused."""

    name: str
    data: bytes
    pixels: Pixels | None = None
    reason: str = ""
    """A pattern; empty for a picture."""
    tolerance: int = 0
    """Levels by which a lossy picture may differ."""


@cache
def hostile_files() -> tuple[Hostile, ...]:
    """All of them, in a fixed order; the same bytes on every call."""
    makers: tuple[Callable[[], Iterator[Hostile]], ...] = (
        _no_pictures,
        _truncated,
        _damaged_png,
        _transparent_png,
        _deep_and_shallow_png,
        _png_metadata,
        _turned,
        _jpeg_kinds,
        _damaged_jpeg,
        _animations,
        _damaged_webp_and_gif,
        _tiffs,
        _bmp_and_ppm,
        _shapes,
        _bombs,
    )
    files = tuple(file for maker in makers for file in maker())
    assert len({file.name for file in files}) == len(files)
    return files


def pixels_of(image: Image.Image) -> Pixels:
    return np.asarray(image.convert("RGB"))


def grey_pixels(levels: NDArray[Any]) -> Pixels:
    return np.repeat(levels.astype(np.uint8)[..., None], 3, axis=2)


def on_white(colours: NDArray[Any], alpha: NDArray[Any]) -> Pixels:
    """Composited by the definition, [h, w, 3] over white by [h, w]."""
    share = alpha[..., None].astype(float) / 255
    return np.rint(colours * share + 255 * (1 - share)).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes, crc: int | None = None) -> bytes:
    checksum = zlib.crc32(name + body) if crc is None else crc
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def png(
    samples: NDArray[Any],
    colour: int,
    depth: int = 8,
    *,
    extra: bytes = b"",
    tail: bytes = b"",
    size: tuple[int, int] | None = None,
    idat: Callable[[bytes], bytes] = lambda raw: chunk(b"IDAT", zlib.compress(raw)),
) -> bytes:
    """A PNG of [h, w] or [h, w, samples] integers.

    Args:
        extra: chunks before the pixels. tail: chunks behind them.
        size: width and height that are claimed.
        idat: from filtered rows to the chunks that hold them.
    """
    height, width = samples.shape[:2]
    flat = samples.reshape(height, -1)
    if depth == 16:
        rows = flat.astype(">u2").view(np.uint8).reshape(height, -1)
    elif depth == 8:
        rows = flat.astype(np.uint8)
    else:
        bits = (flat[..., None].astype(np.uint8) >> np.arange(depth - 1, -1, -1, dtype=np.uint8)) & 1
        rows = np.packbits(bits.reshape(height, -1), axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">2I5B", *(size or (width, height)), depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + idat(raw) + tail + chunk(b"IEND", b"")


def by_torchvision(data: bytes) -> Pixels:
    """A JPEG's or WebP's RGB pixels as stored, not turned."""
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if data[:4] == b"RIFF":
        return decode_webp(tensor, mode=ImageReadMode.RGB).movedim(0, -1).numpy()  # type: ignore[no-any-return]
    return decode_jpeg(tensor, mode=ImageReadMode.RGB).movedim(0, -1).numpy()  # type: ignore[no-any-return]


def jpeg(name: str, data: bytes, read: bytes | None = None, tolerance: int = JPEG_TOLERANCE) -> Hostile:
    """A JPEG that holds what torchvision reads, perhaps from another file with the same pixels."""
    return Hostile(name, data, by_torchvision(read or data), tolerance=tolerance)


def app1(body: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body


def after_soi(data: bytes, segment: bytes) -> bytes:
    return data[:2] + segment + data[2:]


def sof_at(data: bytes) -> int:
    """Return the offset of the frame header's marker in a baseline or progressive JPEG."""
    return max(data.find(b"\xff\xc0\x00\x11"), data.find(b"\xff\xc2\x00\x11"))


def _no_pictures() -> Iterator[Hostile]:
    yield Hostile("empty.jpg", b"", reason="the file is empty")
    yield Hostile("one-byte.png", b"\x89", reason=NO_PICTURE)
    yield Hostile("zeros.webp", bytes(4096), reason=NO_PICTURE)
    yield Hostile("noise.bmp", np.random.default_rng(0).bytes(4096), reason=NO_PICTURE)
    yield Hostile("html.jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", reason=NO_PICTURE)
    yield Hostile("text.png", b"no picture but text\n" * 9, reason=NO_PICTURE)
    yield Hostile("json.webp", b'{"error": "rate limited"}', reason=NO_PICTURE)
    svg = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect/></svg>'
    yield Hostile("svg.png", svg, reason=NO_PICTURE)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    yield Hostile("eps.jpg", eps, reason=NO_PICTURE)
    pdf = b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n"
    yield Hostile("pdf.jpg", pdf, reason=NO_PICTURE)
    yield Hostile("ico.png", encoded(picture(1, 32, 32), "ICO"), reason=NO_PICTURE)
    yield Hostile("psd.tif", b"8BPS" + bytes(60), reason=NO_PICTURE)
    yield Hostile("zip.jpg", b"PK\x05\x06" + bytes(18), reason=NO_PICTURE)
    yield Hostile("lfs-pointer.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", reason=NO_PICTURE)


def _truncated() -> Iterator[Hostile]:
    image = picture(2, 120, 90)
    wholes = {
        "jpg": encoded(image, "JPEG", quality=90),
        "png": encoded(image, "PNG"),
        "webp": encoded(image, "WEBP", quality=90),
        "gif": encoded(image, "GIF"),
        "bmp": encoded(image, "BMP"),
        "tif": encoded(image, "TIFF"),
        "ppm": encoded(image, "PPM"),
    }
    for extension, whole in wholes.items():
        for place, length in (("start", 6), ("header", 24), ("half", len(whole) // 2), ("end", len(whole) - 200)):
            yield Hostile(f"cut-at-{place}.{extension}", whole[:length], reason=TRUNCATED)
    lzw = encoded(image, "TIFF", compression="tiff_lzw")
    yield Hostile("cut-lzw.tif", lzw[: len(lzw) // 2], reason=TRUNCATED)
    progressive = encoded(image, "JPEG", progressive=True)
    yield Hostile("cut-progressive.jpg", progressive[: len(progressive) * 3 // 4], reason=TRUNCATED)
    whole = wholes["png"]
    yield Hostile("cut-before-the-last-chunk.png", whole[:-12], reason="its last chunk")
    yield Hostile("cut-in-the-last-chunk.png", whole[:-2], reason="its last chunk")


def _damaged_png() -> Iterator[Hostile]:
    pixels = pixels_of(picture(3))

    def bad_crc(raw: bytes) -> bytes:
        return chunk(b"IDAT", zlib.compress(raw), crc=1)

    def one_sample_changed(raw: bytes) -> bytes:
        body = bytearray(zlib.compress(raw, 0))
        body[500] ^= 0xFF
        return chunk(b"IDAT", bytes(body), crc=zlib.crc32(b"IDAT" + zlib.compress(raw, 0)))

    def two_chunks_swapped(raw: bytes) -> bytes:
        body = zlib.compress(raw)
        return chunk(b"IDAT", body[900:]) + chunk(b"IDAT", body[:900])

    yield Hostile("crc-of-pixels.png", png(pixels, RGB, idat=bad_crc), reason="checksum of its chunk b'IDAT'")
    yield Hostile(
        "changed-sample.png", png(pixels, RGB, idat=one_sample_changed), reason="checksum of its chunk b'IDAT'"
    )
    yield Hostile("swapped-chunks.png", png(pixels, RGB, idat=two_chunks_swapped), reason="broken")
    no_stream = png(pixels, RGB, idat=lambda raw: chunk(b"IDAT", b"no zlib stream at all" * 9))
    yield Hostile("no-zlib.png", no_stream, reason="broken")
    short = png(pixels, RGB, idat=lambda raw: chunk(b"IDAT", zlib.compress(raw[: len(raw) // 2])))
    yield Hostile("half-the-rows.png", short, reason="end before the last row")
    row_short = png(pixels, RGB, idat=lambda raw: chunk(b"IDAT", zlib.compress(raw[: -(len(raw) // len(pixels))])))
    yield Hostile("one-row-too-few.png", row_short, reason="end before the last row")
    byte_short = png(pixels, RGB, idat=lambda raw: chunk(b"IDAT", zlib.compress(raw[:-1])))
    yield Hostile("one-byte-too-few.png", byte_short, reason="truncated")
    black = np.zeros_like(pixels)
    yield Hostile("black.png", png(black, RGB), black)
    by_bytes = png(black, RGB, idat=lambda raw: b"".join(chunk(b"IDAT", b) for b in _bytes(zlib.compress(raw))))
    yield Hostile("chunks-of-one-byte.png", by_bytes, black)
    yield Hostile("interlaced.png", _interlaced(pixels), pixels)
    dot = pixels[:1, :1]
    yield Hostile("interlaced-dot.png", _interlaced(dot), dot)
    narrow = pixels[:13, :3]
    yield Hostile("interlaced-narrow.png", _interlaced(narrow), narrow)
    yield Hostile("interlaced-short.png", _interlaced(pixels, 6), reason="end before the last row")
    yield Hostile("no-pixels.png", png(pixels, RGB, idat=lambda raw: b""), reason="b'IDAT' is missing")
    whole = bytearray(png(pixels, RGB))
    whole[29] ^= 1
    yield Hostile("crc-of-header.png", bytes(whole), reason="checksum of its chunk b'IHDR'")
    yield Hostile("no-palette.png", png(pixels[..., 0] % 4, PALETTE), reason="b'PLTE' is missing")
    yield Hostile("depth-3.png", png(pixels[..., 0] % 8, GREY, 3), reason=NO_PICTURE)
    yield Hostile("colour-type-9.png", png(pixels, 9), reason="no colour type 9")
    whole = png(pixels, RGB)
    yield Hostile("no-header.png", whole[:8] + whole[33:], reason="does not begin with a header")


def _bytes(data: bytes) -> Iterator[bytes]:
    return (data[i : i + 1] for i in range(len(data)))


def _interlaced(pixels: Pixels, num_passes: int = 7) -> bytes:
    """Return an RGB PNG that is interlaced by Adam7, with only the first `num_passes` of its seven passes."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    parts = [pixels[y::dy, x::dx] for y, x, dy, dx in passes[:num_passes]]
    raw = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    body = chunk(b"IDAT", zlib.compress(raw))
    header = chunk(b"IHDR", struct.pack(">2I5B", *pixels.shape[1::-1], 8, RGB, 0, 0, 1))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


def _transparent_png() -> Iterator[Hostile]:
    pixels, alpha = pixels_of(picture(4)), np.asarray(picture(5).convert("L"))
    yield Hostile("rgba.png", png(np.dstack([pixels, alpha]), RGBA), on_white(pixels, alpha), tolerance=1)
    grey = pixels[..., 0]
    grey_alpha = on_white(grey_pixels(grey), alpha)
    yield Hostile("grey-alpha.png", png(np.dstack([grey, alpha]), GREY_ALPHA), grey_alpha, tolerance=1)
    wide = np.dstack([pixels, alpha]).astype(np.uint16) << 8 | 0x7F
    yield Hostile("rgba-16.png", png(wide, RGBA, 16), on_white(pixels, alpha), tolerance=1)
    wide = np.dstack([grey, alpha]).astype(np.uint16) << 8 | 0x7F
    yield Hostile("grey-alpha-16.png", png(wide, GREY_ALPHA, 16), grey_alpha, tolerance=1)
    key = tuple(pixels[20, 20].tolist())
    keyed = np.where((pixels == key).all(-1, keepdims=True), 255, pixels).astype(np.uint8)
    yield Hostile("rgb-key.png", png(pixels, RGB, extra=chunk(b"tRNS", struct.pack(">3H", *key))), keyed)
    level = int(grey[20, 20])
    keyed = grey_pixels(np.where(grey == level, 255, grey))
    yield Hostile("grey-key.png", png(grey, GREY, extra=chunk(b"tRNS", struct.pack(">H", level))), keyed)
    for depth in (1, 2, 4):
        few = grey >> (8 - depth)
        scaled = few.astype(int) * 255 // (2**depth - 1)
        keyed = grey_pixels(np.where(few == 1 << (depth - 1), 255, scaled))
        extra = chunk(b"tRNS", struct.pack(">H", 1 << (depth - 1)))
        yield Hostile(f"grey-key-{depth}.png", png(few, GREY, depth, extra=extra), keyed)
    wide = grey.astype(np.uint16) * 257
    wide[20:30, 20:30] = 700
    wide[30:40, 20:30] = 701
    keyed = grey_pixels(np.where(wide == 700, 255, wide >> 8))
    extra = chunk(b"tRNS", struct.pack(">H", 700))
    yield Hostile("grey-key-16.png", png(wide, GREY, 16, extra=extra), keyed)
    colours = pixels.astype(np.uint16) * 257
    colours[20:30, 20:30] = (700, 800, 900)
    extra = chunk(b"tRNS", struct.pack(">3H", 700, 800, 900))
    yield Hostile("rgb-key-16.png", png(colours, RGB, 16, extra=extra), reason="no defined 8-bit meaning")


def _deep_and_shallow_png() -> Iterator[Hostile]:
    pixels = pixels_of(picture(6))
    grey = pixels[..., 0]
    noise = np.random.default_rng(6).integers(0, 256, grey.shape, dtype=np.uint16)
    yield Hostile("grey-16.png", png(grey.astype(np.uint16) << 8 | noise, GREY, 16), grey_pixels(grey))
    yield Hostile("rgb-16.png", png(pixels.astype(np.uint16) << 8 | noise[..., None], RGB, 16), pixels)
    for depth in (1, 2, 4):
        few = grey >> (8 - depth)
        yield Hostile(f"grey-{depth}.png", png(few, GREY, depth), grey_pixels(few.astype(int) * 255 // (2**depth - 1)))
    colours = np.random.default_rng(7).integers(0, 256, (16, 3), dtype=np.uint8)
    extra = chunk(b"PLTE", colours.tobytes())
    few = grey >> 4
    yield Hostile("palette-4.png", png(few, PALETTE, 4, extra=extra), colours[few])
    alpha = np.arange(0, 255, 16, dtype=np.uint8)
    clear = on_white(colours[few], alpha[few])
    yield Hostile(
        "palette-alpha.png", png(few, PALETTE, 8, extra=extra + chunk(b"tRNS", alpha.tobytes())), clear, "", 1
    )


def _png_metadata() -> Iterator[Hostile]:
    pixels = pixels_of(picture(8))
    huge = chunk(b"tEXt", b"Comment\0" + b"x" * 5_000_000)
    yield Hostile("huge-text.png", png(pixels, RGB, extra=huge), pixels)
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(30_000_000)))
    yield Hostile("text-bomb.png", png(pixels, RGB, extra=bomb), pixels)
    yield Hostile("text-bomb-behind.png", png(pixels, RGB, tail=bomb), pixels)
    profile = np.random.default_rng(0).integers(0, 99, 2**21 + 16, np.uint8).tobytes()
    yield Hostile("huge-profile.png", encoded(picture(8), "PNG", icc_profile=profile), pixels)
    unknown = chunk(b"iCCP", b"profile\0\7" + zlib.compress(profile))
    yield Hostile("unknown-compression-of-the-profile.png", png(pixels, RGB, extra=unknown), pixels)
    packet = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"<tiff:Orientation>6<" + profile)
    yield Hostile("huge-packet.png", png(pixels, RGB, extra=chunk(b"iTXt", packet)), pixels)
    packet = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"<tiff:Orientation>6<")
    yield Hostile("turned-by-its-packet.png", png(pixels, RGB, extra=chunk(b"iTXt", packet)), np.rot90(pixels, -1))
    many = b"".join(chunk(b"zTXt", b"c%d\0\0" % i + zlib.compress(bytes(2**20 - 9))) for i in range(70))
    yield Hostile("many-large-texts.png", png(pixels, RGB, extra=many), pixels)
    for kind, options in (("WEBP", {"lossless": True}), ("TIFF", {})):
        data = encoded(picture(8), kind, icc_profile=profile, **options)
        yield Hostile(f"huge-profile.{kind.lower()}", data, pixels)
    plain = encoded(picture(8), "JPEG", quality=95)
    yield jpeg("huge-profile.jpg", encoded(picture(8), "JPEG", quality=95, icc_profile=profile), plain)
    broken = chunk(b"iCCP", b"profile\0\0" + zlib.compress(b"no profile" * 9))
    yield Hostile("garbage-profile.png", png(pixels, RGB, extra=broken), pixels)
    yield Hostile("unknown-chunk.png", png(pixels, RGB, extra=chunk(b"eUpE", bytes(99))), pixels)
    yield Hostile("garbage-behind.png", png(pixels, RGB) + b"garbage" * 99, pixels)
    yield Hostile("garbage-exif.png", png(pixels, RGB, extra=chunk(b"eXIf", b"nonsense" * 9)), pixels)
    yield Hostile("really-png.jpg", png(pixels, RGB), pixels)


UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: np.rot90(p),
}
"""EXIF's orientations in words of NumPy."""


def _turned() -> Iterator[Hostile]:
    image = picture(9, 90, 60)
    stored = by_torchvision(encoded(image, "JPEG", quality=95))
    for orientation, turn in UPRIGHT.items():
        data = encoded(image, "JPEG", quality=95, exif=_exif(orientation))
        yield Hostile(f"orientation-{orientation}.jpg", data, np.ascontiguousarray(turn(stored)), "", JPEG_TOLERANCE)
    pixels = pixels_of(image)
    yield Hostile("orientation-6.png", encoded(image, "PNG", exif=_exif(6)), np.rot90(pixels, -1))
    yield Hostile("orientation-6.webp", encoded(image, "WEBP", lossless=True, exif=_exif(6)), np.rot90(pixels, -1))
    yield Hostile("orientation-6.tif", encoded(image, "TIFF", tiffinfo={ORIENTATION: 6}), np.rot90(pixels, -1))
    plain = encoded(image, "JPEG", quality=95)
    yield jpeg("orientation-0.jpg", encoded(image, "JPEG", quality=95, exif=_exif(0)), plain)
    yield jpeg("orientation-99.jpg", encoded(image, "JPEG", quality=95, exif=_exif(99)), plain)
    yield jpeg("exif-garbage.jpg", after_soi(plain, app1(b"Exif\0\0" + b"\xa5" * 400)), plain)
    yield jpeg("exif-cut.jpg", after_soi(plain, app1(_exif(6).tobytes()[:17])), plain)
    far = bytearray(_exif(6).tobytes())
    far[10:14] = b"\xff\xff\xff\x7f"
    yield jpeg("exif-points-nowhere.jpg", after_soi(plain, app1(bytes(far))), plain)
    words = Image.Exif()
    words[ORIENTATION] = 6
    words[0x010E] = "x" * 60_000
    turned = np.ascontiguousarray(np.rot90(by_torchvision(plain), -1))
    yield Hostile("exif-long.jpg", encoded(image, "JPEG", quality=95, exif=words), turned, "", JPEG_TOLERANCE)
    text = app1(b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0six\0\0\0\0\0")
    yield jpeg("orientation-in-words.jpg", after_soi(plain, text), plain)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def _jpeg_kinds() -> Iterator[Hostile]:
    image = picture(10, 120, 80)
    plain = encoded(image, "JPEG", quality=95)
    yield jpeg("progressive.jpg", encoded(image, "JPEG", quality=95, progressive=True))
    yield jpeg("grey.jpg", encoded(image.convert("L"), "JPEG", quality=95))
    yield jpeg("unsampled.jpg", encoded(image, "JPEG", quality=95, subsampling=0))
    yield jpeg("restarts.jpg", encoded(image, "JPEG", quality=95, restart_marker_rows=1))
    yield jpeg("rgb-stored.jpg", encoded(image, "JPEG", quality=95, keep_rgb=True))
    samples = np.asarray(image.convert("CMYK"))
    inks = Image.fromarray(samples, "CMYK")
    colours = (255 - samples[..., :3].astype(int)) * (255 - samples[..., 3:].astype(int)) // 255
    adobe = encoded(inks, "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in adobe, "Pillow writes CMYK inverted, as Adobe does"
    yield Hostile("cmyk-adobe.jpg", adobe, colours.astype(np.uint8), tolerance=8)
    at = adobe.index(b"\xff\xee")
    bare = adobe[:at] + adobe[at + 2 + int.from_bytes(adobe[at + 2 : at + 4], "big") :]
    yield Hostile("cmyk-bare.jpg", bare, colours.astype(np.uint8), tolerance=8)
    yield Hostile("ycck.jpg", _ycck(image), pixels_of(image), tolerance=12)
    yield jpeg("garbage-behind.jpg", plain + b"garbage" * 999, plain)
    yield jpeg("zip-behind.jpg", plain + b"PK\x05\x06" + bytes(18), plain)
    yield jpeg("html-in-comment.jpg", encoded(image, "JPEG", quality=95, comment=b"<html>" * 99), plain)
    buffer = io.BytesIO()
    image.save(buffer, "MPO", save_all=True, append_images=[picture(11, 120, 80)], quality=95)
    yield jpeg("two-views-mpo.jpg", buffer.getvalue(), plain)
    yield jpeg("garbage-profile.jpg", encoded(image, "JPEG", quality=95, icc_profile=b"no profile" * 99), plain)
    many = b"".join(app1(b"http://ns.adobe.com/xap/1.0/\0" + b" " * 65_000) for _ in range(40))
    yield jpeg("huge-metadata.jpg", after_soi(plain, many), plain)
    yield jpeg("really-jpeg.png", plain, plain)


def _ycck(image: Image.Image) -> bytes:
    """Four components with Adobe's transform 2: YCbCr of the inks, and black inverted: 255 where there is none.

    Pillow cannot write it, so a CMYK file is made of the transformed samples and its marker says what they are.
    """
    ycc = np.asarray(ImageChops.invert(image).convert("YCbCr"))
    stored = np.dstack([ycc, np.full(ycc.shape[:2], 255, np.uint8)])
    data = bytearray(encoded(Image.fromarray(255 - stored, "CMYK"), "JPEG", quality=100, subsampling=0))
    at = data.index(b"Adobe")
    data[at + 11] = 2
    return bytes(data)


def _damaged_jpeg() -> Iterator[Hostile]:
    plain = encoded(picture(12, 120, 80), "JPEG", quality=95)
    at = sof_at(plain)

    def with_bytes(offset: int, values: bytes) -> bytes:
        return plain[: at + offset] + values + plain[at + offset + len(values) :]

    yield Hostile("twelve-bits.jpg", with_bytes(4, b"\x0c"), reason="12|broken|not a picture|cannot")
    yield Hostile("zero-height.jpg", with_bytes(5, b"\0\0"), reason="broken|not a picture|no pixels|cannot")
    yield Hostile("huge-frame.jpg", with_bytes(5, b"\xff\xdc\xff\xdc"), reason="exceed")
    taller = with_bytes(5, struct.pack(">H", 400))
    yield jpeg("taller-than-it-is.jpg", taller)
    yield Hostile("taller-and-cut.jpg", taller[:-2], reason="truncated")
    yield jpeg("end-marker-too-early.jpg", plain[: len(plain) // 2] + b"\xff\xd9")
    yield Hostile("nine-components.jpg", with_bytes(9, b"\x09"), reason="broken|not a picture|cannot|9")
    yield Hostile("lossless-frame.jpg", with_bytes(1, b"\xc3"), reason="broken|not a picture|cannot|Unsupported")
    yield jpeg("no-huffman-tables.jpg", plain.replace(b"\xff\xc4", b"\xff\xfe"), plain)
    yield Hostile("headers-only.jpg", plain[: plain.index(b"\xff\xda")], reason="cannot load")


def _animations() -> Iterator[Hostile]:
    frames = [picture(seed) for seed in (13, 14, 15)]
    first = pixels_of(frames[0])
    rest: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    yield Hostile("moving.png", encoded(frames[0], "PNG", **rest), first)
    yield Hostile("moving-default.png", encoded(frames[0], "PNG", default_image=True, **rest), first)
    yield Hostile("moving.webp", encoded(frames[0], "WEBP", lossless=True, **rest), first)
    colours, indices = _palette(frames[0])
    moving = _gif(colours, indices, frames=3)
    yield Hostile("moving.gif", moving, colours[indices])
    read = decode_gif(torch.frombuffer(bytearray(moving), dtype=torch.uint8))
    assert np.array_equal(read[0].movedim(0, -1).numpy(), colours[indices]), "torchvision reads the same first frame"
    clear = colours[indices].copy()
    clear[indices == 5] = 255
    yield Hostile("clear.gif", _gif(colours, indices, transparent=5), clear)
    small = np.full((*indices.shape, 3), 255, np.uint8)
    small[8:40, 8:40] = colours[indices[:32, :32]]
    small[8:40, 8:40][indices[:32, :32] == 5] = 255
    data = _gif(colours, indices[:32, :32], screen=indices.shape, offset=(8, 8), transparent=5)
    yield Hostile("part-of-the-screen.gif", data, small)


def _palette(image: Image.Image) -> tuple[Pixels, NDArray[np.uint8]]:
    few = image.quantize(16)
    colours = np.array((few.getpalette() or [])[:48], np.uint8)
    return np.resize(colours, (16, 3)), np.asarray(few)


def _gif(
    colours: Pixels,
    indices: NDArray[np.uint8],
    *,
    frames: int = 1,
    transparent: int | None = None,
    screen: tuple[int, ...] | None = None,
    offset: tuple[int, int] = (0, 0),
    codes: int | None = None,
) -> bytes:
    """Return a GIF of 16 colours whose codes are never compressed: a clear code comes before each run of twelve."""
    height, width = screen or indices.shape
    data = b"GIF89a" + struct.pack("<2H3B", width, height, 0x80 | 0x73, 0, 0) + colours.tobytes()
    for frame in range(frames):
        if transparent is not None:
            data += b"\x21\xf9\x04\x01\0\0" + bytes([transparent, 0])
        shape = (*offset[::-1], *indices.shape[::-1])
        data += (
            b"\x2c"
            + struct.pack("<4HB", *shape, 0)
            + b"\x04"
            + _blocks(np.roll(indices, frame).reshape(-1)[:codes])
            + b"\0"
        )
    return data + b";"


def _blocks(indices: NDArray[np.uint8]) -> bytes:
    flat, codes = indices.reshape(-1).tolist(), []
    for start in range(0, len(flat), 12):
        codes += [16, *flat[start : start + 12]]
    bits = np.array([(code >> bit) & 1 for code in [*codes, 17] for bit in range(5)], np.uint8)
    packed = np.packbits(bits, bitorder="little").tobytes()
    return b"".join(bytes([len(packed[i : i + 255])]) + packed[i : i + 255] for i in range(0, len(packed), 255))


def _damaged_webp_and_gif() -> Iterator[Hostile]:
    image = picture(16, 120, 80)
    lossless, lossy = encoded(image, "WEBP", lossless=True), encoded(image, "WEBP", quality=95)
    yield Hostile("lossless.webp", lossless, pixels_of(image))
    yield Hostile("lossy.webp", lossy, by_torchvision(lossy), tolerance=JPEG_TOLERANCE)
    alpha = np.asarray(picture(17, 120, 80).convert("L"))
    rgba = Image.fromarray(np.dstack([pixels_of(image), alpha]))
    yield Hostile(
        "alpha.webp", encoded(rgba, "WEBP", lossless=True, exact=True), on_white(pixels_of(image), alpha), "", 1
    )
    refused = "decoder|not a picture|decode|truncated"
    yield Hostile("corrupt-vp8.webp", lossy[:20] + b"\xff" * 40 + lossy[60:], reason=refused)
    yield Hostile("corrupt-vp8l.webp", lossless[:21] + b"\xff" * 60 + lossless[81:], reason="exceed")
    yield Hostile("riff-too-long.webp", lossy[:4] + struct.pack("<I", 2**31) + lossy[8:], reason=refused)
    yield Hostile("riff-too-short.webp", lossy[:4] + struct.pack("<I", 20) + lossy[8:], reason=refused)
    yield Hostile("sound.webp", b"RIFF" + struct.pack("<I", 36) + b"WAVEfmt " + bytes(28), reason=NO_PICTURE)
    yield Hostile("no-frame.gif", b"GIF89a" + struct.pack("<2H3B", 9, 9, 0, 0, 0) + b";", reason=NO_PICTURE)
    whole = encoded(image, "GIF")
    colours, indices = _palette(image)
    yield Hostile("half-the-codes.gif", _gif(colours, indices, codes=indices.size // 2), reason="truncated")
    yield Hostile("bad-code-size.gif", _with_code_size(whole, 99), reason="broken|truncated|decoder|configuration|bad")


def _with_code_size(data: bytes, size: int) -> bytes:
    at = data.index(b"\x2c", 13 + 3 * 256) + 10
    return data[:at] + bytes([size]) + data[at + 1 :]


def _tiff(samples: NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, samples, **options)
    return buffer.getvalue()


def _tiffs() -> Iterator[Hostile]:
    image = picture(18, 128, 96)
    pixels = pixels_of(image)
    grey = pixels[..., 0]
    wide = grey.astype(np.uint16) << 8 | 0x55
    yield Hostile("plain.tif", _tiff(pixels, photometric="rgb"), pixels)
    yield Hostile("big-endian.tif", _tiff(pixels, photometric="rgb", byteorder=">"), pixels)
    yield Hostile("bigtiff.tif", _tiff(pixels, photometric="rgb", bigtiff=True), pixels)
    yield Hostile("planes.tif", _tiff(pixels.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"), pixels)
    yield Hostile("tiled.tif", _tiff(pixels, photometric="rgb", tile=(32, 32)), pixels)
    yield Hostile("strips.tif", _tiff(pixels, photometric="rgb", rowsperstrip=7), pixels)
    for compression in ("tiff_lzw", "tiff_deflate", "packbits"):
        yield Hostile(f"{compression}.tif", encoded(image, "TIFF", compression=compression), pixels)
    pages = np.stack([pixels, pixels[::-1], pixels[:, ::-1]])
    yield Hostile("pages.tif", _tiff(pages, photometric="rgb"), pixels)
    yield Hostile("white-is-zero.tif", _tiff(grey, photometric="miniswhite"), grey_pixels(255 - grey))
    yield Hostile("grey-16.tif", _tiff(wide, photometric="minisblack"), grey_pixels(grey))
    yield Hostile("grey-16-big.tif", _tiff(wide, photometric="minisblack", byteorder=">"), grey_pixels(grey))
    yield Hostile("rgb-16.tif", _tiff(pixels.astype(np.uint16) << 8 | 0x55, photometric="rgb"), pixels)
    alpha = np.asarray(picture(19, 128, 96).convert("L"))
    rgba = _tiff(np.dstack([pixels, alpha]), photometric="rgb", extrasamples=["unassalpha"])
    yield Hostile("alpha.tif", rgba, on_white(pixels, alpha), tolerance=1)
    meaning = "no defined 8-bit meaning|not a picture"
    yield Hostile("float.tif", _tiff(grey.astype(np.float32), photometric="minisblack"), reason=meaning)
    yield Hostile("signed-16.tif", _tiff(grey.astype(np.int16) - 99, photometric="minisblack"), reason=meaning)
    positive = (wide >> 1).astype(np.int16)
    yield Hostile("signed-16-positive.tif", _tiff(positive, photometric="minisblack"), reason=meaning)
    yield Hostile("grey-32.tif", _tiff(grey.astype(np.uint32), photometric="minisblack"), reason=meaning)
    yield Hostile("signed-32.tif", _tiff(grey.astype(np.int32), photometric="minisblack"), reason=meaning)
    whole = _tiff(pixels, photometric="rgb")
    itself = bytearray(encoded(image, "TIFF"))
    first = struct.unpack("<I", itself[4:8])[0]
    count = struct.unpack("<H", itself[first : first + 2])[0]
    itself[first + 2 + 12 * count : first + 6 + 12 * count] = struct.pack("<I", first)
    yield Hostile("directory-loop.tif", bytes(itself), pixels)
    deflate = bytearray(encoded(image, "TIFF", compression="tiff_deflate"))
    deflate[20:50] = bytes(30)
    yield Hostile("damaged-deflate.tif", bytes(deflate), reason="decoder error")
    yield Hostile("directory-nowhere.tif", whole[:4] + struct.pack("<I", 2**31) + whole[8:], reason=TRUNCATED)


def _bmp(pixels: Pixels, *, size: tuple[int, int] | None = None, bits: int = 24, compression: int = 0) -> bytes:
    """Bottom up, or from the top where the height given is negative."""
    height, width = pixels.shape[:2]
    width, height = size or (width, height)
    rows = pixels[:: 1 if height < 0 else -1, :, ::-1]
    body = b"".join(row.tobytes() + bytes(-row.size % 4) for row in rows)
    header = struct.pack("<I2i2H6I", 40, width, height, 1, bits, compression, len(body), 0, 0, 0, 0)
    return b"BM" + struct.pack("<I2HI", 54 + len(body), 0, 0, 54) + header + body


def _bmp_and_ppm() -> Iterator[Hostile]:
    pixels = pixels_of(picture(20, 67, 50))
    grey = pixels[..., 0]
    height, width = grey.shape
    yield Hostile("odd-width.bmp", _bmp(pixels), pixels)
    yield Hostile("from-the-top.bmp", _bmp(pixels, size=(width, -height)), pixels)
    yield Hostile(
        "negative-width.bmp", _bmp(pixels, size=(-width, height)), reason="not a picture|negative|pixels|size"
    )
    yield Hostile("no-width.bmp", _bmp(pixels, size=(0, height)), reason="not a picture|no pixels|truncated")
    yield Hostile("taller-than-it-is.bmp", _bmp(pixels, size=(width, 5 * height)), reason="truncated")
    yield Hostile("seven-bits.bmp", _bmp(pixels, bits=7), reason="Unsupported|not a picture")
    yield Hostile("compression-99.bmp", _bmp(pixels, compression=99), reason="Unsupported|not a picture")
    size = f"{width} {height}"
    ascii_words = " ".join(map(str, pixels.reshape(-1).tolist()))
    yield Hostile("ascii.ppm", f"P3 # made up\n{size}\n255\n{ascii_words}\n".encode(), pixels)
    yield Hostile("plain.ppm", f"P6\n{size}\n255\n".encode() + pixels.tobytes(), pixels)
    wide = grey.astype(">u2") << 8 | 0x33
    yield Hostile("grey-16.pgm", f"P5\n{size}\n65535\n".encode() + wide.astype(">u2").tobytes(), grey_pixels(grey))
    wide_colours = (pixels.astype(np.uint16) * 257).astype(">u2")
    yield Hostile("rgb-16.ppm", f"P6\n{size}\n65535\n".encode() + wide_colours.tobytes(), pixels)
    bits = np.packbits(grey < 128, axis=1).tobytes()
    yield Hostile("bits.pbm", f"P4\n{size}\n".encode() + bits, grey_pixels(np.where(grey < 128, 0, 255)))
    yield Hostile("no-width.ppm", b"P6\n0 9\n255\n", reason="not a picture|no pixels|truncated")
    yield Hostile("bad-size.ppm", b"P6\nnine 9\n255\n" + bytes(300), reason="not a picture|integer|token|invalid")
    floats = grey.astype("<f4").tobytes()
    yield Hostile("float.ppm", f"Pf\n{size}\n-1.0\n".encode() + floats, reason="no defined 8-bit meaning|not a picture")


def _shapes() -> Iterator[Hostile]:
    dot = np.array([[[9, 99, 199]]], np.uint8)
    yield Hostile("one-pixel.png", png(dot, RGB), dot)
    yield Hostile("one-pixel.gif", _gif(np.resize(dot, (16, 3)), np.zeros((1, 1), np.uint8)), dot)
    line = np.random.default_rng(21).integers(0, 256, (20_000, 1, 3), dtype=np.uint8)
    yield Hostile("one-wide.png", png(line, RGB), line)
    yield Hostile("one-high.png", png(line.swapaxes(0, 1), RGB), line.swapaxes(0, 1))
    yield Hostile("no-height.png", png(dot, RGB, size=(9, 0)), reason="broken|not a picture|no pixels|truncated|cannot")


def _bombs() -> Iterator[Hostile]:
    dot = np.zeros((1, 1, 3), np.uint8)
    yield Hostile("bomb-of-claims.png", png(dot, RGB, size=(2**31 - 1, 2**31 - 1)), reason="exceed|not a picture")
    yield Hostile("bomb-just-above.png", png(dot, RGB, size=(178_956_971, 1)), reason="exceed")
    gif = bytearray(_gif(np.zeros((16, 3), np.uint8), np.zeros((1, 1), np.uint8)))
    gif[6:10] = b"\xff\xff\xff\xff"
    yield Hostile("bomb-of-claims.gif", bytes(gif), reason="exceed")
    huge = _bmp(dot, size=(2**30, 2**30))
    yield Hostile("bomb-of-claims.bmp", huge, reason="exceed")
    yield Hostile("bomb-of-claims.ppm", b"P6\n200000 200000\n255\n" + bytes(99), reason="exceed")
