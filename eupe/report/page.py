"""The common parts of all pages: templates, pictures in them, one self-contained file, written whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

import eupe
from eupe.common.files import write_file
from eupe.common.outputs import MARK, begins_with_mark, require_out
from eupe.common.storage import AnyPath
from eupe.errors import StorageError

JPEG_QUALITY = 90


def render_template(template: str, **values: object) -> str:
    """Return a page made from one of this package's templates, in which every string that is not Markup is escaped."""
    environment = Environment(
        loader=PackageLoader("eupe.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(mark=Markup(MARK), version=eupe.__version__)
    environment.filters.update(png=png_uri, jpeg=jpeg_uri, base64=_base64, sha256=_sha256, count=count)
    return environment.get_template(template).render(values)


def count(number: int, noun: str) -> str:
    """Return a number of things in words."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _sha256(script: str) -> str:
    """Return the hash by which a content security policy allows a script."""
    return _base64(hashlib.sha256(script.encode()).digest())


def png_uri(pixels: NDArray[np.uint8]) -> str:
    """Encode a small map, without loss."""
    return _data_uri(pixels, "png", optimize=True)


def jpeg_uri(pixels: NDArray[np.uint8]) -> str:
    """Encode a photograph, with loss."""
    return _data_uri(pixels, "jpeg", quality=JPEG_QUALITY)


def _data_uri(pixels: NDArray[np.uint8], kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return f"data:image/{kind};base64,{_base64(buffer.getvalue())}"


def make_place(out: Path, *, sources: Iterable[AnyPath] = (), overwrite: bool = False) -> Path:
    """Make the folder for a page or figure, and return the path to write it to.

    Args:
        sources, overwrite: see `eupe.common.outputs.require_out`.
    Raises: ConfigError if what is there may not be replaced; StorageError if the folder cannot be made.
    """
    place = require_out(out, begins_with_mark, sources=sources, overwrite=overwrite).local
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error}") from error
    return place


def write_whole(out: Path, data: bytes | str) -> int:
    """Write a page or figure whole or not at all, and return its size in bytes.

    Raises: StorageError if it cannot be written.
    """
    if isinstance(data, str):
        data = data.encode(errors="replace")  # file names that are not UTF-8 come as surrogates
    try:
        write_file(out, data)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error}") from error
    return len(data)
