"""Options that several verbs share, and how their words are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from eupe.errors import ConfigError

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


PRECISIONS = "bitround:B is fp16 rounded to B bits of mantissa, which compresses better; int8 is one byte per channel"
CorpusPath = Annotated[
    str,
    typer.Option(
        "--corpus",
        help="Folder of pictures (class subfolders become labels), WebDataset tars ('shards/{000..099}.tar'), Parquet "
        "with images, or an index; also s3:// or gs://.",
    ),
]
WeightsKey = Annotated[str | None, typer.Option(help=WEIGHTS_KEY)]
WeightsOfEach = Annotated[
    list[str] | None,
    typer.Option("--weights", help="Local weights instead of the hub's. One per teacher; 'hub' for a teacher without."),
]
KeyOfEach = Annotated[
    list[str] | None,
    typer.Option("--weights-key", help=f"{WEIGHTS_KEY} One per teacher; 'auto' for a teacher without."),
]
Sizes = Annotated[list[int] | None, typer.Option(help="Side of the teacher's input in pixels. May be repeated.")]
Views = Annotated[str, typer.Option(help="center, squash, or rrc:K for K random resized crops per picture.")]
PhotometricKind = Annotated[
    str,
    typer.Option(
        "--photometric", help="eupe: random colour jitter, greyscale, blur and solarisation of each view; or none."
    ),
]
TokenKinds = Annotated[str, typer.Option(help="summary, dense, or both.")]
Grid = Annotated[int | None, typer.Option(help="G: pool dense maps to G x G cells.")]
Scale = Annotated[
    str | None, typer.Option(help="MIN,MAX: a random crop's share of the picture's area. Default: 0.08,1.")
]
Ratio = Annotated[str | None, typer.Option(help="MIN,MAX: a random crop's width over its height. Default: 3/4 to 4/3.")]
FidelityWanted = Annotated[
    float | None,
    typer.Option(help="Instead of --precision: the cheapest one that keeps 95% of tokens at this cosine or above."),
]
Pixels = Annotated[bool, typer.Option("--pixels", help="Also store the views' pixels, to train without the corpus.")]
Limit = Annotated[int | None, typer.Option(help="Number of pictures to take, the first ones of the corpus.")]
Include = Annotated[
    list[str] | None, typer.Option(help="Take only pictures whose key matches, such as 'train/*'. May be repeated.")
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Leave out pictures whose key matches, such as '*.gif'. May be repeated.")
]
Shuffle = Annotated[
    bool, typer.Option("--shuffle", help="Take the pictures in random order; with --limit, a random sample.")
]
StoredWeights = Annotated[
    Path | None, typer.Option("--weights", help="Local weights: the file that the store was made with.")
]
StoredTeacher = Annotated[
    str | None,
    typer.Option("--teacher", help="The teacher's current name or path. Default: the one recorded in the store."),
]
