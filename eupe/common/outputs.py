"""Files that a command may overwrite: those with our mark, or any that the user allows by `--overwrite`; no source.

The marks: an index has `eupe.root` in its Parquet metadata; embedded texts have `eupe.text` in their safetensors
metadata; a page, a figure or Markdown has a word near its beginning, which earlier versions did not write. Folders
have marks of their own: `zarr.json` of a store, `config.json` of a run, `export.json`, `CACHEDIR.TAG` of kept features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from eupe.common.storage import AnyPath, StoragePath
from eupe.errors import ConfigError, StorageError

MARK = '<meta name="generator" content="eupe">'
"""Mark of pages."""
MARKDOWN_MARK = "<!-- made by eupe -->"
FIGURE_MARK = ("Software", "eupe")
"""Mark of PNG figures, a text chunk."""
HEAD_BYTES = 4096
"""Length of the beginning of a file, in which the mark must be."""


def require_out(
    out: AnyPath, is_ours: Callable[[StoragePath], bool], *, sources: Iterable[AnyPath] = (), overwrite: bool = False
) -> StoragePath:
    """Return the file to write, the target if it is a link, after checking that no one else's file would be lost.

    Args:
        is_ours: function that returns whether an existing file has our mark; may raise OSError, ValueError or an
            EupeError if not.
        sources: files and folders that are read to make it.
        overwrite: True if the user allows an existing file to be replaced.
    Raises: ConfigError if it is a source, a folder, a device, or a file that we did not make; StorageError.
    """
    try:
        return _required(StoragePath.of(out), out, is_ours, [*map(StoragePath.of, sources)], overwrite)
    except OSError as error:  # a name that is too long, a folder without permission
        raise StorageError(f"{out} cannot be written: {error}") from error


def _required(
    place: StoragePath, out: AnyPath, is_ours: Callable[[StoragePath], bool], read: list[StoragePath], overwrite: bool
) -> StoragePath:
    """Return the file as `require_out` does.

    Raises: OSError, too.
    """
    if place.is_local and place.local.is_symlink():
        if not place.local.exists():
            raise ConfigError(f"--out {out} is a broken link; name another file, or remove it")
        place = place.resolved()
    if any(place == source or _is_same(place, source) for source in read):
        raise ConfigError(f"--out {out} is one of the inputs; name another file")
    if place.is_local and place.local.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file in it")
    if place.is_local and place.local.exists() and not place.local.is_file():
        raise ConfigError(f"--out {out} is a pipe or a device; name a file")
    if place.parent.exists(place.name) and not _bears_mark(place, is_ours):
        if any(place.url.startswith(f"{source.resolved().url.rstrip('/')}/") for source in read):
            raise ConfigError(f"--out {out} is inside one of the inputs and was not made by eupe; name another file")
        if not overwrite:
            raise ConfigError(
                f"--out {out} exists, and nothing in it shows that eupe made it; name another file, or replace it with "
                "--overwrite"
            )
    return place


def _is_same(place: StoragePath, source: StoragePath) -> bool:
    both = place.is_local and source.is_local and place.local.exists() and source.local.exists()
    return both and place.local.samefile(source.local)


def _bears_mark(place: StoragePath, is_ours: Callable[[StoragePath], bool]) -> bool:
    try:
        return is_ours(place)
    except StorageError:
        raise
    except Exception:  # libraries raise anything for a file of another kind
        return False


def begins_with_mark(place: StoragePath) -> bool:
    """Return whether a page, a figure or Markdown has our mark."""
    head = place.parent.read_range(place.name, 0, HEAD_BYTES)
    return any(mark.encode() in head for mark in (MARK, MARKDOWN_MARK, "\0".join(FIGURE_MARK)))
