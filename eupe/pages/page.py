"""What every page has in common: one style, one HTML file that needs nothing else, written whole or not at all."""

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
    """A page from one of this package's templates.

    Args:
        values: what `$name` stands for, as HTML; `$style`, with our mark ahead of it, and `$version` are
            filled in.
    """
    folder = files("eupe.pages")
    style = f"{MARK}\n{(folder / STYLE).read_text(encoding='utf-8')}".rstrip("\n")
    text = Template((folder / template).read_text(encoding="utf-8"))
    return text.substitute(values, style=style, version=escape(eupe.__version__))


def make_place(out: Path, *, sources: Iterable[Where] = (), overwrite: bool = False) -> Path:
    """Make the folder that a page or figure goes to, and return where it goes.

    Args:
        sources, overwrite: as `eupe.outputs.require_out` takes them.
    Raises: ConfigError if something is there that may not be replaced; StorageError.
    """
    place = require_out(out, begins_with_mark, sources=sources, overwrite=overwrite).local
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error}") from error
    return place


def write_whole(out: Path, data: bytes) -> int:
    """Write a page or figure whole or not at all; returns its bytes.

    Raises: StorageError.
    """
    try:
        write_file(out, data)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error}") from error
    return len(data)
