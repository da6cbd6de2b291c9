"""Pictures that decoders and pipelines get wrong, and files that are no pictures."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from eupe.corpus.awkward import awkward_pictures, picture


def save_awkward(folder: Path) -> dict[str, Path]:
    """Readable pictures of every awkward kind, by name."""
    return _save(folder, awkward_pictures())


def save_broken(folder: Path) -> dict[str, Path]:
    """Files with a picture's extension that must be refused, by name."""
    whole = io.BytesIO()
    picture(1, 300, 200).save(whole, "JPEG")
    contents = {
        "truncated.jpg": whole.getvalue()[: len(whole.getvalue()) // 2],
        "empty.png": b"",
        "text.jpg": b"this is no picture",
        "bomb.png": bomb(),
    }
    return _save(folder, contents)


def _save(folder: Path, contents: dict[str, bytes]) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in contents}


def bomb() -> bytes:
    """A small file that claims more pixels than the limit."""
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    return buffer.getvalue()
