"""Class names and templates as users write them, and whose pictures each name stands for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from eupe.errors import ConfigError

SLOT = "{}"
TEMPLATES = (f"a photo of a {SLOT}.",)
AS_IT_IS = (SLOT,)
"""For captions."""
NAMED = 3
"""How many mismatches a message names."""


@dataclass(frozen=True)
class Classes:
    """What is to be told apart."""

    names: tuple[str, ...]
    """As they stand in a prompt."""
    folders: tuple[str, ...] | None = None
    """Label of the pictures of each; None for names alone."""


def read_classes(path: Path) -> Classes:
    """A name a line, or `FOLDER<TAB>NAME` in all lines; empty lines do not count.

    Raises: ConfigError.
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
    """A template a line, with `{}` where the name goes.

    Raises: ConfigError.
    """
    lines = _lines(path, "templates")
    if without := [line for line in lines if SLOT not in line]:
        raise ConfigError(f"template {without[0]!r} of {path} has no {SLOT} for the class name")
    return tuple(lines)


def folder_classes(labels: Iterable[str]) -> Classes:
    """Folders by their own names, underscores as spaces."""
    folders = tuple(sorted(set(labels)))
    return Classes(tuple(folder.replace("_", " ") for folder in folders), folders)


def class_numbers(classes: Classes, labels: Iterable[str], *, data: str) -> dict[str, int]:
    """Which class the pictures of each folder belong to.

    Names alone are folders' names; or else one for each folder, in the order of the sorted folders.

    Raises: ConfigError naming the first folders without a class.
    """
    folders = sorted(set(labels))
    known = classes.folders
    if known is None:
        by_name = {name.replace("_", " "): i for i, name in reversed(list(enumerate(classes.names)))}
        same = [folder for folder in folders if folder.replace("_", " ") in by_name]
        if not same and len(classes.names) == len(folders):
            return {folder: i for i, folder in enumerate(folders)}
        if not same:
            raise ConfigError(
                f"there are {len(classes.names)} class names and {len(folders)} folders in {data}, and no name is that "
                f"of a folder ({_some(classes.names)} against {_some(folders)}); give one name for each, or lines of "
                "FOLDER<TAB>NAME"
            )
        numbers = {folder: by_name[folder.replace("_", " ")] for folder in same}
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


def _some(words: Iterable[str]) -> str:
    words = list(words)
    return ", ".join(words[:NAMED]) + (", ..." if len(words) > NAMED else "")


def _lines(path: Path, what: str) -> list[str]:
    """Raises: ConfigError if there are none."""
    try:
        lines = [line.strip("\r\n ") for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} cannot be read from {path}: {error}") from error
    if not (kept := [line for line in lines if line.strip()]):
        raise ConfigError(f"{path} holds no {what}")
    return kept
