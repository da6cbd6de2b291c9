"""Class names and prompt templates from users' files, and which folder of pictures each name belongs to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from eupe.errors import ConfigError
from eupe.evaluate.splits import INTEGER, order_labels

SLOT = "{}"
TEMPLATES = (f"a photo of a {SLOT}.",)
AS_IT_IS = (SLOT,)
"""Template that leaves a text as it is, for captions."""
NAMED = 3
"""Number of mismatches that a message names."""


@dataclass(frozen=True)
class Classes:
    """The classes to tell apart."""

    names: tuple[str, ...]
    """Names as they appear in a prompt."""
    folders: tuple[str, ...] | None = None
    """Folder of each class's pictures, which is their label; None if only names were given."""


def read_classes(path: Path) -> Classes:
    """Read a file with one class name per line, or with `FOLDER<TAB>NAME` in every line; empty lines are skipped.

    Raises: ConfigError if it cannot be read, holds no names, mixes both forms, or names a folder twice.
    """
    lines = _lines(path, "class names")
    parts = [line.partition("\t") for line in lines]
    if not any(tab for _, tab, _ in parts):
        return Classes(tuple(lines))
    for line, (folder, _, name) in zip(lines, parts, strict=True):
        if not folder.strip() or not name.strip():
            raise ConfigError(f"{path} has FOLDER<TAB>NAME in some lines, but not in {line!r}; give it in all or none")
    folders = tuple(folder.strip() for folder, _, _ in parts)
    if repeated := [folder for folder, times in Counter(folders).items() if times > 1]:
        raise ConfigError(f"{path} names folder {repeated[0]} more than once")
    return Classes(tuple(name.strip() for _, _, name in parts), folders)


def read_templates(path: Path) -> tuple[str, ...]:
    """Read a file with one template per line, with `{}` in place of the class name.

    Raises: ConfigError if it cannot be read, holds no templates, or one lacks `{}`.
    """
    lines = _lines(path, "templates")
    if without := [line for line in lines if SLOT not in line]:
        raise ConfigError(f"template {without[0]!r} of {path} has no {SLOT} for the class name")
    return tuple(lines)


def folder_classes(labels: Iterable[str]) -> Classes:
    """Name each class after its folder, with underscores replaced by spaces."""
    folders = order_labels(labels)
    return Classes(tuple(folder.replace("_", " ") for folder in folders), folders)


def class_numbers(classes: Classes, labels: Iterable[str], *, data: str) -> dict[str, int]:
    """Return the class number of each folder.

    If only names were given, they are matched to folders by name; if none matches, by order, one name per folder.
    Folders are ordered by number if all are integers, else by their characters.

    Raises: ConfigError naming the first folders without a class, or if the order is ambiguous.
    """
    folders = order_labels(labels)
    known = classes.folders
    if known is None:
        numbers = _by_name(classes.names, folders)
        if not numbers:
            _require_order(classes.names, folders, data)
            return {folder: i for i, folder in enumerate(folders)}
    else:
        by_folder = {folder: i for i, folder in enumerate(known)}
        numbers = {folder: by_folder[folder] for folder in folders if folder in by_folder}
    if missing := [folder for folder in folders if folder not in numbers]:
        taken = set(numbers.values())
        left = [name for i, name in enumerate(known or classes.names) if i not in taken]
        beside = f", and {len(left)} classes have no folder ({_some(left)})" if left else ""
        raise ConfigError(
            f"{len(missing)} of the {len(folders)} folders in {data} have no class: {_some(missing)}{beside}; correct "
            "the list of classes"
        )
    return numbers


def _by_name(names: Sequence[str], folders: Iterable[str]) -> dict[str, int]:
    """Return the class number of folders that match a name: exactly, or else in any case; `_` and `-` are spaces."""
    # reversed, so that the first of equal names is the last to be stored, and wins
    numbered = list(reversed(list(enumerate(names))))
    exact = {_plain(name): i for i, name in numbered}
    alike = {_plain(name).casefold(): i for i, name in numbered}
    places = {folder: exact.get(_plain(folder), alike.get(_plain(folder).casefold())) for folder in folders}
    return {folder: place for folder, place in places.items() if place is not None}


def _plain(name: str) -> str:
    return name.replace("_", " ").replace("-", " ")


def _require_order(names: Sequence[str], folders: Sequence[str], data: str) -> None:
    """Raise ConfigError unless the order of both makes clear which name belongs to which folder."""
    what = f"{len(names)} class names and {len(folders)} folders in {data}"
    if len(names) != len(folders):
        raise ConfigError(
            f"there are {what}, and no name matches a folder ({_some(names)} against {_some(folders)}); give one name "
            "per folder, or lines of FOLDER<TAB>NAME"
        )
    if {name.split()[0].rstrip(",:;") for name in names} == set(folders):
        raise ConfigError(
            f"the lines of class names begin with folders ({names[0]!r}), which are not part of the names; put a tab "
            "after the folder: FOLDER<TAB>NAME"
        )
    by_number = sorted(folders, key=lambda folder: [(int(d or 0), w) for d, w in re.findall(r"(\d*)(\D*)", folder)])
    if not all(INTEGER.fullmatch(folder) for folder in folders) and by_number != list(folders):
        first = next(i for i, pair in enumerate(zip(by_number, folders, strict=True)) if pair[0] != pair[1])
        raise ConfigError(
            f"there are {what}, and their order is not clear: number {first + 1} is {folders[first]} if sorted "
            f"as text and {by_number[first]} if sorted by number; give lines of FOLDER<TAB>NAME"
        )


def _some(words: Iterable[str]) -> str:
    words = list(words)
    return ", ".join(words[:NAMED]) + (", ..." if len(words) > NAMED else "")


def _lines(path: Path, what: str) -> list[str]:
    """Read the lines of a file that are not empty.

    Raises: ConfigError if the file cannot be read, or has none.
    """
    try:
        lines = [line.strip("\r\n ") for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} cannot be read from {path}: {error}") from error
    if not (kept := [line for line in lines if line.strip()]):
        raise ConfigError(f"{path} holds no {what}")
    return kept
