"""Pictures that decoders and pipelines get wrong, and files that are no pictures."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from making import picture
from PIL import Image

ORIENTATION = 0x0112


def save_awkward(folder: Path) -> dict[str, Path]:
    """Readable pictures of every awkward kind, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    base = picture(3, width=120, height=80)
    paths = {name: folder / name for name in ("wide.png", "grey.png", "cmyk.jpg", "palette-alpha.png")}
    paths |= {name: folder / name for name in ("turned.jpg", "sixteen-bit.png", "grey-alpha.png", "moving.gif")}
    base.save(paths["wide.png"])
    base.convert("L").save(paths["grey.png"])
    base.convert("CMYK").save(paths["cmyk.jpg"], quality=95)
    transparent_palette(base).save(paths["palette-alpha.png"], transparency=0)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    base.save(paths["turned.jpg"], exif=exif, quality=95)
    ramp = np.linspace(0, 65535, 80 * 120).reshape(80, 120).astype(np.uint16)
    Image.fromarray(ramp).save(paths["sixteen-bit.png"])
    grey_alpha = Image.merge("LA", (base.convert("L"), picture(5, 120, 80).convert("L")))
    grey_alpha.save(paths["grey-alpha.png"])
    picture(6).save(paths["moving.gif"], save_all=True, append_images=[picture(7)])
    return paths


def transparent_palette(image: Image.Image) -> Image.Image:
    """A palette picture in which colour 0 is used."""
    palette = image.quantize(16)
    pixels = np.asarray(palette).copy()
    pixels[:20, :20] = 0
    result = Image.fromarray(pixels, mode="P")
    result.putpalette(palette.getpalette())
    return result


def save_broken(folder: Path) -> dict[str, Path]:
    """Files with a picture's extension that must be refused, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = io.BytesIO()
    picture(1, 300, 200).save(whole, "JPEG")
    contents = {
        "truncated.jpg": whole.getvalue()[: len(whole.getvalue()) // 2],
        "empty.png": b"",
        "text.jpg": b"this is no picture",
        "bomb.png": bomb(),
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in contents}


def bomb() -> bytes:
    """A small file that claims more pixels than the limit."""
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    return buffer.getvalue()
