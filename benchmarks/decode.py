"""JPEGs decoded at a reduced scale: the time saved, and the effect on a teacher's features.

python -m benchmarks.decode [--repeats 3]

libjpeg can decode a picture at 1/2, 1/4 or 1/8 of its size in less time than at full size (`Image.draft`). Every
photograph is encoded as a large JPEG in two ways: *enlarged* has no detail at the scale of single pixels; *repeated*,
mirrored side by side until it is large, keeps all of the photograph's detail there. Camera pictures lie in between.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, features

from benchmarks.features import ASSETS, SOURCES
from benchmarks.making import interleaved
from demo.assets import PHOTOGRAPHS, prepare_assets
from eupe.corpus.pictures import decode_image
from eupe.corpus.views import Box, ViewSpec, draw_view, render_view
from eupe.teachers.resolve import resolve_teacher
from eupe.teachers.teacher import Teacher, load_teacher

SHORT_SIDE = 2048
"""Short side of the large JPEGs in pixels; enlarged ones keep the photograph's shape, repeated ones are square."""
QUALITY = 90
OVERSAMPLING = (2, 4)
"""Minimum side of the decoded crop, in multiples of the view's side."""
View = NDArray[np.uint8]


def enlarged(image: Image.Image) -> Image.Image:
    """Return the picture resampled so that its short side is SHORT_SIDE."""
    factor = SHORT_SIDE / min(image.size)
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)


def repeated(image: Image.Image) -> Image.Image:
    """Return the picture mirrored side by side, without resampling, and cut to a square of SHORT_SIDE."""
    pixels = np.asarray(image)
    pair = np.concatenate([pixels, pixels[:, ::-1]], axis=1)
    four = np.concatenate([pair, pair[::-1]], axis=0)
    times = (-(-SHORT_SIDE // four.shape[0]), -(-SHORT_SIDE // four.shape[1]), 1)
    return Image.fromarray(np.ascontiguousarray(np.tile(four, times)[:SHORT_SIDE, :SHORT_SIDE]))


def jpegs(make: Callable[[Image.Image], Image.Image]) -> list[bytes]:
    """Return every photograph of the demo, uncut, as a large JPEG."""
    encoded = []
    for photograph in PHOTOGRAPHS:
        buffer = io.BytesIO()
        make(photograph.read(photograph.file).convert("RGB")).save(buffer, "JPEG", quality=QUALITY)
        encoded.append(buffer.getvalue())
    return encoded


def centre(width: int, height: int) -> Box:
    return draw_view(ViewSpec(), "", 0, width, height)[0]


def full_view(data: bytes, size: int) -> View:
    """Return the centre view as an extraction makes it."""
    image = decode_image(data)
    return render_view(image, centre(*image.size), False, size)


def reduced_view(data: bytes, size: int, least: int) -> View:
    """Return the same view from the smallest scale at which the crop is at least `least` times as large as the view."""
    with Image.open(io.BytesIO(data)) as image:
        box = centre(*image.size)
        scale = draft(image, size, least)
        image.load()
        part = tuple(edge / scale for edge in box)
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=part))  # type: ignore[arg-type]


def draft(image: Image.Image, size: int, least: int) -> int:
    """Make libjpeg decode the picture at a reduced scale, and return the factor of the reduction."""
    width, height = image.size
    most = min(width, height) // (least * size)
    image.draft("RGB", (width // most, height // most))
    return round(width / image.width)


def scale_of(data: bytes, size: int, least: int) -> int:
    with Image.open(io.BytesIO(data)) as image:
        return draft(image, size, least)


def processor_s(work: Callable[[], object]) -> float:
    """Return this thread's processor time for one call; on a shared machine it is steadier than wall time."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


def psnr(a: View, b: View) -> float:
    """Return the PSNR in dB, over all pixels and channels of a view."""
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def tokens(teacher: Teacher, views: list[View]) -> dict[str, torch.Tensor]:
    """Return summary [V, D] and dense [V * cells, D] tokens."""
    made = [teacher(torch.from_numpy(np.stack(views[i : i + 8]))) for i in range(0, len(views), 8)]
    summary = torch.cat([t.summary for t in made if t.summary is not None])
    return {"summary": summary, "dense": torch.cat([t.dense.flatten(0, 2) for t in made])}


def compare(kind: str, data: list[bytes], teacher: Teacher, size: int, repeats: int) -> list[str]:
    """Return one line of the table for each oversampling."""
    full = [full_view(picture, size) for picture in data]
    expected = tokens(teacher, full)
    lines = []
    for least in OVERSAMPLING:
        reduced = [reduced_view(picture, size, least) for picture in data]
        cosines = {
            name: torch.cosine_similarity(expected[name], values, dim=-1).numpy()
            for name, values in tokens(teacher, reduced).items()
        }
        noise = [psnr(a, b) for a, b in zip(full, reduced, strict=True)]
        took = interleaved(
            {
                "full": lambda: processor_s(lambda: [full_view(picture, size) for picture in data]),
                "reduced": lambda least=least: processor_s(lambda: [reduced_view(p, size, least) for p in data]),
            },
            repeats,
        )
        full_ms, reduced_ms = (1000 * statistics.median(took[name]) / len(data) for name in ("full", "reduced"))
        numbers = [f"{np.percentile(c, 5):.5f} ({c.mean():.5f})" for c in cosines.values()]
        scales = ", ".join(sorted({f"1/{scale_of(picture, size, least)}" for picture in data}))
        lines.append(
            f"| {kind} | ≥ {least}× | {scales} | {full_ms:.0f} | {reduced_ms:.0f} | {full_ms / reduced_ms:.1f} | "
            f"{statistics.median(noise):.1f} ({min(noise):.1f}) | {' | '.join(numbers)} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    prepare_assets(ASSETS)
    source = SOURCES["dinov2-s"]
    teacher = load_teacher(
        resolve_teacher(source.teacher),
        weights=ASSETS / source.weights,
        device=torch.device("cpu"),
        dtype=torch.float32,
        sizes=(source.size,),
    )
    libraries = f"pillow {version('pillow')}, libjpeg-turbo {features.version('libjpeg_turbo')}"
    print(f"decode: {len(PHOTOGRAPHS)} photographs, quality {QUALITY}; {os.cpu_count()} cores; {libraries}\n")
    columns = ("JPEG", "decoded crop", "scale", "full, ms", "reduced, ms", "ratio", "PSNR dB, median (least)")
    columns += ("summary cosine, p5 (mean)", "dense cosine, p5 (mean)")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for make in (enlarged, repeated):
        for line in compare(make.__name__, jpegs(make), teacher, source.size, given.repeats):
            print(line, flush=True)


if __name__ == "__main__":
    main()
