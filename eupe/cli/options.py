"""Options that several verbs share, and how their words are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from eupe.cli.flags import info
from eupe.corpus.choice import Choice
from eupe.errors import ConfigError
from eupe.extract.config import WEIGHTS_KEY, ExtractConfig
from eupe.train.config import TrainConfig

Json = Annotated[bool, typer.Option("--json", help="Print one machine-readable line.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the file at --out even if nothing in it shows that eupe made it.")
]
Precision = Annotated[str, info(ExtractConfig, "precision")]
Grid = Annotated[int | None, info(ExtractConfig, "grid")]
PicturesPath = Annotated[str | None, info(TrainConfig, "corpus")]
CorpusPath = Annotated[str, info(ExtractConfig, "corpus")]
Include = Annotated[list[str] | None, info(ExtractConfig, "include")]
Exclude = Annotated[list[str] | None, info(ExtractConfig, "exclude")]
ImageKey = Annotated[str | None, info(Choice, "image_key")]
ImageColumn = Annotated[str | None, info(Choice, "image_column")]
LabelColumn = Annotated[str | None, info(Choice, "label_column")]
LocalWeights = Annotated[list[str] | None, typer.Option("--weights", help="TEACHER=PATH: local weights of a teacher.")]
LocalKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--weights-key", help="TEACHER=KEY: the key of its weights in a file of several models, such as teacher or ema."
    ),
]
Size = Annotated[
    int | None,
    typer.Option(min=1, help="Side of the encoder's input in pixels, rounded down to a multiple of its patch."),
]
WeightsKey = Annotated[str | None, typer.Option(help=WEIGHTS_KEY)]


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


StoredWeights = Annotated[
    Path | None, typer.Option("--weights", help="Local weights: the file that the store was made with.")
]
StoredTeacher = Annotated[
    str | None,
    typer.Option("--teacher", help="The teacher's current name or path. Default: the one recorded in the store."),
]
