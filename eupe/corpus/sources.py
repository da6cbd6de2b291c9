"""What `--corpus` may name: a folder of pictures, WebDataset tars, Parquet tables, or an index made before."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

from eupe.corpus.decode import EXTENSIONS
from eupe.corpus.folder import file_names, require_printable
from eupe.corpus.left_out import LeftOut
from eupe.corpus.tables import is_index
from eupe.errors import CorpusError
from eupe.place import Place, Where

TAR = ".tar"
GZIPPED = (".tar.gz", ".tgz")
TABLE = ".parquet"
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")

Kind = Literal["pictures", "tars", "tables", "index"]


@dataclass(frozen=True)
class Source:
    """Where pictures are, before any is read."""

    kind: Kind
    root: Place
    """The folder that keys begin at; of an index, where it lies."""
    files: Sequence[str] = ()
    """Tars, tables or the index, below the root; in the order of their pictures' keys."""
    num_pictures: int = 0
    """Files that are pictures; of a folder of them."""
    left_out: LeftOut = field(default_factory=dict)
    """Files below the root that are neither pictures nor among `files`."""

    def picture_keys(self) -> Iterator[str]:
        """Of a folder of pictures: their paths, sorted.

        Raises: CorpusError; StorageError.
        """
        return (name for name in file_names(self.root) if _kind_of(name) == "pictures")


def _kind_of(name: str) -> Literal["pictures", "tars", "tables"] | None:
    if name.endswith((TAR, *GZIPPED)):
        return "tars"
    if name.endswith(TABLE):
        return "tables"
    return "pictures" if PurePosixPath(name.rpartition("/")[2]).suffix.lower() in EXTENSIONS else None


def find_source(words: Where) -> Source:
    """What there is under a path or URL, by its name; nothing is read but the list of files.

    Raises: CorpusError if there is nothing there, or nothing that is a picture; StorageError if an object store does
        not serve it.
    """
    place = Place.of(words)
    if BRACES.search(place.url) and not (place.is_local and place.local.exists()):
        return _of_pattern(place)
    if place.is_local and place.local.is_dir():
        return find_folder(Place(str(place.local.resolve())))
    kind = _kind_of(place.name)
    if place.is_local and not place.local.exists():
        raise CorpusError(
            f"corpus {words} does not exist; give a folder of pictures, tars, Parquet tables, or an index made by "
            "`eupe index`"
        )
    if kind in ("tars", "tables"):
        return _of_files(place.parent, [place.name])
    if not place.is_local:
        return find_folder(place)
    raise CorpusError(
        f"corpus {words} is neither a folder of pictures nor a tar, a Parquet table or an index (.parquet)"
    )


def corpus_root(words: Where) -> Place:
    """The folder that the keys of a corpus begin at, whether or not it is there.

    Raises: ConfigError for a URL of another kind.
    """
    place = Place.of(words)
    if BRACES.search(place.url) and not (place.is_local and place.local.exists()):
        return _split(place)[0]
    return place.parent if _kind_of(place.name) in ("tars", "tables") and not _is_folder(place) else place


def _is_folder(place: Place) -> bool:
    return place.is_local and place.local.is_dir()


def find_folder(root: Place) -> Source:
    """Raises: CorpusError if it holds no picture, or pictures in more than one way; StorageError."""
    files: dict[str, list[str]] = {"tars": [], "tables": []}
    num_pictures = 0
    for name in file_names(root):
        kind = _kind_of(name)
        if kind == "pictures":
            num_pictures += 1
            require_printable(str(root / name))
        elif kind is not None:
            files[kind].append(name)
    tars, tables = ([name for name in files[kind] if not name.endswith(GZIPPED)] for kind in ("tars", "tables"))
    if num_pictures and tars:
        raise CorpusError(
            f"corpus {root} holds {num_pictures} pictures and {len(tars)} tars ({tars[0]}); put them in folders of "
            "their own, or name the tars: 'FOLDER/{000..099}.tar'"
        )
    if num_pictures:
        return Source("pictures", root, num_pictures=num_pictures)
    tables = [name for name in tables if not is_index(root, name)]
    if files["tars"] and tables:
        raise CorpusError(
            f"corpus {root} holds tars ({files['tars'][0]}) and tables ({tables[0]}); name one kind of them"
        )
    if not files["tars"] and not tables:
        raise CorpusError(f"corpus {root} holds no picture; looked for {', '.join(sorted(EXTENSIONS))} below it")
    return _of_files(root, files["tars"] or tables)


def _of_files(root: Place, names: Sequence[str]) -> Source:
    """Raises: CorpusError for a gzipped tar, or files of more than one kind."""
    for name in names:
        if name.endswith(GZIPPED):
            raise CorpusError(
                f"{root / name} is gzipped, so that no picture in it can be found by its place; gunzip it first"
            )
    kinds = {_kind_of(name) for name in names}
    if kinds == {"tables"} and len(names) == 1 and _index_or_missing(root, names[0]):
        return Source("index", root, names)
    if kinds not in ({"tars"}, {"tables"}):
        raise CorpusError(f"corpus {root} / {', '.join(names[:3])}: give either tars (.tar) or tables (.parquet)")
    root = Place(str(root.local.resolve())) if root.is_local else root
    return Source("tars" if kinds == {"tars"} else "tables", root, sorted(names, key=lambda name: f"{name}/"))


def _index_or_missing(root: Place, name: str) -> bool:
    """What is not there is reported as an index would be."""
    try:
        return is_index(root, name)
    except FileNotFoundError:
        return True


def _split(place: Place) -> tuple[Place, str]:
    """The folder before the first brace, and the pattern below it."""
    before = place.url[: place.url.index("{")].rpartition("/")[0]
    return Place.of(before or "/"), place.url[len(before) + 1 :]


def _of_pattern(place: Place) -> Source:
    root, pattern = _split(place)
    names = list(expand(pattern))
    if len(set(names)) < len(names):
        raise CorpusError(f"corpus {place} names the same file twice")
    there = None if root.is_local else set(root.list())
    missing = [name for name in names if not (root.exists(name) if there is None else name in there)]
    if missing:
        raise CorpusError(
            f"corpus {place}: {len(missing)} of the {len(names)} files do not exist, the first is {root / missing[0]}"
        )
    return _of_files(root, names)


def expand(pattern: str) -> Iterator[str]:
    """`{000..099}` and `{a,b}` as in a shell, each brace multiplied with the others."""
    words = BRACES.split(pattern)
    choices = [_choices(word) if i % 2 else [word] for i, word in enumerate(words)]
    return ("".join(chosen) for chosen in itertools.product(*choices))


def _choices(inner: str) -> list[str]:
    match = RANGE.fullmatch(inner)
    if match is None:
        return inner.split(",")
    first, last = int(match[1]), int(match[2])
    width = len(match[1]) if match[1].startswith("0") or match[2].startswith("0") else 0
    step = 1 if first <= last else -1
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]
