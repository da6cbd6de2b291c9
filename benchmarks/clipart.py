"""Clip art for the study, small: Debian's openclipart-png without links, copies and the few pictures beyond the limit.

python -m benchmarks.clipart /usr/share/openclipart/png --out CLIPART

Links are dropped because they show a picture in a second folder, where it could be learned from as well as judged.
The study's 17 subjects would each decode the whole pictures; a side of 160 px is enough to be judged at 128.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from PIL import Image

from eupe.corpus.pictures import decode_image
from eupe.errors import CorpusError

SIDE = 160
"""Shorter side of the written pictures, in pixels; smaller pictures stay as they are."""


def small(picture: Image.Image) -> Image.Image:
    """Return a picture with a shorter side of at most `SIDE` pixels."""
    scale = SIDE / min(picture.size)
    if scale >= 1:
        return picture
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def main() -> None:
    """Write the pictures and say what was left out."""
    parser = argparse.ArgumentParser(description="Clip art for the study, with a shorter side of at most 160 px.")
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    seen: set[str] = set()
    written = links = copies = 0
    for file in sorted(arguments.source.rglob("*.png")):
        if file.is_symlink():
            links += 1
            continue
        data = file.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if digest in seen:
            copies += 1
            continue
        seen.add(digest)
        try:
            picture = small(decode_image(data))
        except CorpusError as error:
            print(f"left out: {file}: {error}")
            continue
        target = arguments.out / file.relative_to(arguments.source)
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target)
        written += 1
    print(f"{written} pictures; left out besides: {links} links and {copies} copies")


if __name__ == "__main__":
    main()
