"""Consoles, options and output that all verbs of the command line share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from eupe.errors import ConfigError
from eupe.names import shown
from eupe.printing import print_table, report_lines


class _Console(Console):
    """A console that spells out control characters, so that text from outside cannot steer the terminal."""

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(shown(text), **how)


out = _Console(highlight=False, soft_wrap=True)
err = _Console(stderr=True, highlight=False, soft_wrap=True)

Json = Annotated[bool, typer.Option("--json", help="Print one machine-readable line.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the file at --out even if nothing in it shows that eupe made it.")
]
PicturesPath = Annotated[
    str | None,
    typer.Option("--corpus", help="Where the pictures are now. Default: the location recorded in the store."),
]
ImageKey = Annotated[
    str | None,
    typer.Option(
        "--image-key",
        help="For tars whose samples hold several pictures: the picture to take, by its name after the first dot, such "
        "as input.jpg; '*' takes each as its own sample.",
    ),
]
ImageColumn = Annotated[
    str | None,
    typer.Option("--image-column", help="For tables: the picture column; STRUCT.CHILD for a field of a struct."),
]
LabelColumn = Annotated[
    str | None,
    typer.Option(
        "--label-column",
        help="For tables and metadata files: the label column; for tars: the entry of the .json files.",
    ),
]
LocalWeights = Annotated[list[str] | None, typer.Option("--weights", help="TEACHER=PATH: local weights of a teacher.")]
LocalKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--weights-key", help="TEACHER=KEY: the key of its weights in a file of several models, such as teacher or ema."
    ),
]
WEIGHTS_KEY = (
    "Key of the weights in a file of several models (teacher, ema). Default: found automatically if only one fits."
)


def local_weights(words: list[str] | None, subjects: Sequence[str]) -> dict[str, Path]:
    """Parse `--weights TEACHER=PATH` options into paths by teacher.

    Args:
        words: values of the option.
        subjects: words of the command that may name teachers, for the advice in the error message.
    Raises: ConfigError if one has no path.
    """
    pairs = [word.partition("=") for word in words or []]
    if malformed := [name for name, _, path in pairs if not path]:
        teachers = [word for word in subjects if word != "pixels" and "://" not in word and not Path(word).exists()]
        right = "; write " + " or ".join(f"--weights {name}={malformed[0]}" for name in teachers) if teachers else ""
        raise ConfigError(f"--weights takes TEACHER=PATH, got {malformed[0]}{right}")
    return {name: Path(path) for name, _, path in pairs}


def local_keys(words: list[str] | None) -> dict[str, str]:
    """Parse `--weights-key TEACHER=KEY` options into keys by teacher.

    Raises: ConfigError if one has no key.
    """
    pairs = [word.partition("=") for word in words or []]
    if malformed := [name for name, _, key in pairs if not key]:
        raise ConfigError(f"--weights-key takes TEACHER=KEY, got {malformed[0]}")
    return {name: key for name, _, key in pairs}


def require_weights_of_key(weights: Path | None, key: str | None) -> None:
    """Raise ConfigError if there is a key but no weights file."""
    if key is not None and weights is None:
        raise ConfigError(f"--weights-key {key} needs a weights file; give --weights, too")


def escaped(text: str) -> str:
    """Return text from outside with its markup escaped."""
    return escape(text)


def finish(report: dict[str, Any], as_json: bool) -> None:
    """Print the verb's result: one JSON line, or readable lines."""
    if as_json:
        print(json.dumps(report))
        return
    for line in report_lines(report):
        out.print(escaped(line), soft_wrap=True)


def show(table: Table) -> None:
    """Print a table; see `print_table`."""
    print_table(out, table)
