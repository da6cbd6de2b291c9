"""The common parts of all pages: one style, and one self-contained HTML file, written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import eupe
from eupe.errors import StorageError
from eupe.files import write_file
from eupe.outputs import MARK, begins_with_mark, require_out
from eupe.place import Where

STYLE = "page_style.html"


def fill_template(template: str, **values: object) -> str:
    """Return a page made from one of this package's templates.

    Args:
        values: HTML for each `$name`; `$style`, which starts with our mark, and `$version` are filled in automatically.
    """
    folder = files("eupe.pages")
    style = f"{MARK}\n{(folder / STYLE).read_text(encoding='utf-8')}".rstrip("\n")
    text = Template((folder / template).read_text(encoding="utf-8"))
    return text.substitute(values, style=style, version=escape(eupe.__version__))


def make_place(out: Path, *, sources: Iterable[Where] = (), overwrite: bool = False) -> Path:
    """Make the folder for a page or figure, and return the path to write it to.

    Args:
        sources, overwrite: see `eupe.outputs.require_out`.
    Raises: ConfigError if what is there may not be replaced; StorageError if the folder cannot be made.
    """
    place = require_out(out, begins_with_mark, sources=sources, overwrite=overwrite).local
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error}") from error
    return place


def write_whole(out: Path, data: bytes) -> int:
    """Write a page or figure whole or not at all, and return its size in bytes.

    Raises: StorageError if it cannot be written.
    """
    try:
        write_file(out, data)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error}") from error
    return len(data)
