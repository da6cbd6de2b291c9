"""What every page has in common: one style, one HTML file that needs nothing else, written whole or not at all."""

from __future__ import annotations

import os
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import eupe
from eupe.errors import StorageError

STYLE = "page_style.html"


def fill_template(template: str, **values: object) -> str:
    """A page from one of this package's templates.

    Args:
        values: what `$name` stands for, as HTML; `$style` and `$version` are filled in.
    """
    folder = files("eupe.pages")
    style = (folder / STYLE).read_text(encoding="utf-8").rstrip("\n")
    text = Template((folder / template).read_text(encoding="utf-8"))
    return text.substitute(values, style=style, version=escape(eupe.__version__))


def make_place(out: Path) -> None:
    """Make the folder that a page or figure goes to.

    Raises: StorageError if it cannot stand at `out`.
    """
    try:
        if out.is_dir():
            raise StorageError(f"{out} cannot be written: it is a folder; name a file in it")
        out.parent.mkdir(parents=True, exist_ok=True)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error}") from error


def write_whole(out: Path, data: bytes) -> int:
    """Write a page or figure whole or not at all; returns its bytes.

    Raises: StorageError.
    """
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(out)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error}") from error
    return len(data)
