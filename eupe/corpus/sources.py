"""Sources that `--corpus` may name: a folder of pictures, tars, Parquet or Arrow tables, or an existing index."""

from __future__ import annotations

import itertools
import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Literal

from eupe.common.files import key_of
from eupe.common.storage import AnyPath, StoragePath
from eupe.corpus.choice import AS_FOUND, Choice
from eupe.corpus.folder import Entry, entries
from eupe.corpus.left_out import (
    BROKEN_LINKS,
    BY_EXCLUDE,
    BY_INCLUDE,
    DERIVED,
    EVERYTHING,
    METADATA,
    NO_TABLE,
    OWN_INDEX,
    LeftOut,
    Patterns,
    left_none,
    not_read,
    told,
)
from eupe.corpus.pictures import EXTENSIONS
from eupe.corpus.table_files import ARROW
from eupe.corpus.tables import is_index, table_kind
from eupe.errors import CorpusError

TAR = ".tar"
GZIPPED = (".tar.gz", ".tgz")
TABLE = ".parquet"
TABLES = (TABLE, ARROW)
SAVED_STATE = "state.json"
"""File in each folder that Hugging Face's `save_to_disk` writes; it lists the Arrow files of the data set."""
MADE_OF_IT = re.compile(r"(.*/)?(cache|tmp)-?[^/]*\.arrow", re.IGNORECASE)
"""Arrow files in which `datasets` caches results computed from a data set."""
METADATA_NAME = re.compile(r"(.*/)?metadata\.(csv|jsonl|parquet)")
"""Metadata files beside pictures, as in Hugging Face's image folders."""
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")

Kind = Literal["pictures", "tars", "tables", "index"]
NAMED: Mapping[Kind, str] = {"pictures": "pictures as files", "tars": "tars", "tables": "tables", "index": "an index"}


@dataclass(frozen=True)
class Source:
    """The location of pictures, before any is read."""

    kind: Kind
    root: StoragePath
    """Folder that keys are relative to; the folder of the file for an index."""
    files: Sequence[str] = ()
    """Paths of the tars, tables or index below the root, in the order of their pictures' keys."""
    num_pictures: int = 0
    """Number of pictures to take from a folder of picture files."""
    left_out: LeftOut = field(default_factory=dict)
    """Counts of the files below the root that are neither pictures nor in `files`, by reason."""
    patterns: Patterns = EVERYTHING
    """Patterns of the pictures to take."""
    metadata: Sequence[str] = ()
    """Paths of a picture folder's metadata files (`METADATA_NAME`), below the root."""
    choice: Choice = AS_FOUND
    """The user's choice among several pictures or labels."""

    def picture_keys(self) -> Iterator[str]:
        """Return the sorted paths of the pictures in a folder of pictures.

        Raises (while iterating): CorpusError or StorageError if the folder cannot be read.
        """
        names = (entry.name for entry in entries(self.root) if _is_picture(entry))
        return (name for name in names if self.patterns.reason(name) is None)


def _is_picture(entry: Entry) -> bool:
    """Return whether a file is a picture by its name; a broken link counts as a picture that cannot be read."""
    return entry.left_out in (None, BROKEN_LINKS) and _kind_of(entry.name) == "pictures"


def _kind_of(name: str) -> Literal["pictures", "tars", "tables"] | None:
    name = name.lower()
    if name.endswith((TAR, *GZIPPED)):
        return "tars"
    if name.endswith(TABLES):
        return "tables"
    return "pictures" if PurePosixPath(name.rpartition("/")[2]).suffix in EXTENSIONS else None


def find_source(words: AnyPath, patterns: Patterns = EVERYTHING) -> Source:
    """Return the source that a path or URL names; files are listed and tables' schemas read, but no pictures.

    Args:
        patterns: the pictures to take; they are not applied to the rows of an index here.
    Raises: CorpusError if nothing is there, or nothing is a picture; StorageError if an object store cannot be read.
    """
    place = StoragePath.of(words)
    if BRACES.search(place.url) and not (place.is_local and place.local.exists()):
        return replace(_of_pattern(place), patterns=patterns)
    if place.is_local and place.local.is_dir():
        return find_folder(place.resolved(), patterns)
    kind = _kind_of(place.name)
    if place.is_local and not place.local.exists():
        raise CorpusError(
            f"corpus {words} does not exist; give a folder of pictures, tars, Parquet tables, or an index made by "
            "`eupe index`"
        )
    if kind in ("tars", "tables"):
        return replace(_of_files(place.parent, [place.name]), patterns=patterns)
    if not place.is_local:
        return find_folder(place, patterns)
    raise CorpusError(
        f"corpus {words} is neither a folder of pictures nor a tar, a Parquet table or an index (.parquet)"
    )


def require_meaning(found: Source) -> None:
    """Raise CorpusError for a choice that has no meaning for this kind of corpus."""
    idle = {
        "--image-key": (found.choice.image_key, "tars", "tars whose samples hold several pictures"),
        "--image-column": (found.choice.image_column, "tables", "tables"),
    }
    for option, (value, kind, meant) in idle.items():
        if value is not None and found.kind not in (kind, "index"):
            raise CorpusError(f"{option} {value} is for {meant}, but {found.root} holds {NAMED[found.kind]}; omit it")


def corpus_root(words: AnyPath) -> StoragePath:
    """Return the folder that the keys of a corpus are relative to, whether or not it exists.

    Raises: ConfigError for a URL of an unsupported kind.
    """
    place = StoragePath.of(words)
    if BRACES.search(place.url) and not (place.is_local and place.local.exists()):
        return _split(place)[0]
    return place.parent if _kind_of(place.name) in ("tars", "tables") and not _is_folder(place) else place


def _is_folder(place: StoragePath) -> bool:
    return place.is_local and place.local.is_dir()


@dataclass(frozen=True)
class _Listing:
    """The files of a folder by what they are, and how many are left out for which reason."""

    files: dict[str, list[str]] = field(default_factory=lambda: {"pictures": [], "tars": [], "tables": []})
    metadata: list[str] = field(default_factory=list)
    """Tables of labels and captions beside pictures."""
    states: list[str] = field(default_factory=list)
    """Files by which a folder of `save_to_disk` is known."""
    num_pictures: int = 0
    first: str = ""
    """The first picture, taken or not."""
    left_out: Counter[str] = field(default_factory=Counter)


def _listed(root: StoragePath, patterns: Patterns) -> _Listing:
    """Go through a folder once.

    Raises: StorageError if it cannot be read.
    """
    found, num_pictures, first = _Listing(), 0, ""
    for entry in entries(root):
        kind, reason = _kind_of(entry.name), entry.left_out
        if _is_picture(entry):
            first = first or entry.name
            reason = patterns.reason(entry.name)
            num_pictures += reason is None
        elif reason is None and METADATA_NAME.fullmatch(entry.name):
            found.metadata.append(entry.name)
        elif reason is None and kind is not None:
            found.files[kind].append(entry.name)
        elif reason is None and entry.name.rpartition("/")[2] == SAVED_STATE:
            found.states.append(entry.name)
            reason = METADATA
        elif reason is None:
            reason = not_read(entry.name)
        found.left_out.update(filter(None, [reason]))
    return replace(found, num_pictures=num_pictures, first=first)


def find_folder(root: StoragePath, patterns: Patterns = EVERYTHING) -> Source:
    """Return the source in a folder, with counts of everything that is left out.

    One kind is taken: pictures, tars or tables. Tables beside pictures are not opened. Tables beside tars are allowed
    if they hold no pictures, as img2dataset writes them.

    Raises: CorpusError if the folder holds no picture, or pictures of more than one kind; StorageError if it cannot be
        read.
    """
    _require_utf8(root)
    found = _listed(root, patterns)
    files, left_out, metadata = found.files, found.left_out, found.metadata
    tars = [name for name in files["tars"] if not _is_gzipped(name)]
    if found.num_pictures and tars:
        raise CorpusError(
            f"corpus {root} holds {found.num_pictures} pictures and {len(tars)} tars ({tars[0]}); put them in separate "
            "folders, or name the tars: 'FOLDER/{000..099}.tar'"
        )
    if found.num_pictures:
        left_out.update([METADATA for _ in metadata] + [not_read(name) for name in files["tars"] + files["tables"]])
        return Source("pictures", root, (), found.num_pictures, left_out, patterns, metadata)
    saved = _saved(root, found.states, files["tables"])
    left_out[DERIVED] += len(files["tables"]) - len(saved)
    files["tables"] = saved + [name for name in metadata if name.endswith(TABLE)]
    tables = {name: _table_reason(root, name, beside_tars=bool(files["tars"])) for name in files["tables"]}
    taken = [name for name, reason in tables.items() if reason is None]
    if files["tars"] and taken:
        raise CorpusError(
            f"corpus {root} holds tars ({files['tars'][0]}) and tables ({taken[0]}); name the files of one kind"
        )
    left_out.update(METADATA for name in metadata if not name.endswith(TABLE))
    unclear = [name for name, reason in tables.items() if reason == NO_TABLE]
    by_patterns = left_out[BY_INCLUDE] + left_out[BY_EXCLUDE]
    if by_patterns and not files["tars"] and not taken:
        raise CorpusError(left_none(by_patterns, root, found.first))
    if not files["tars"] and not taken and not unclear:
        missed = f" (left out: {told(left_out)})" if left_out else ""
        raise CorpusError(
            f"corpus {root} holds no picture{missed}; looked for {', '.join(sorted(EXTENSIONS))} below it"
        )
    # Tables without a known column come last: `--image-column` may name one of theirs.
    names = files["tars"] or taken or unclear
    left_out.update(reason for name, reason in tables.items() if reason is not None and name not in names)
    return replace(_of_files(root, names), left_out=left_out, patterns=patterns)


def _saved(root: StoragePath, states: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the tables that are data sets: in a folder that `save_to_disk` wrote, those that it lists.

    Raises: CorpusError if such a list cannot be read or names missing files, or if there is Arrow beside Parquet;
        StorageError if the storage fails.
    """
    arrows = [name for name in names if _is_arrow(name)]
    if arrows and len(arrows) < len(names):
        other = next(name for name in names if not _is_arrow(name))
        raise CorpusError(
            f"corpus {root} holds Arrow ({arrows[0]}) and Parquet ({other}), perhaps of the same pictures; name the "
            f"files of one kind: 'FOLDER/{{a,b}}{TABLE}'"
        )
    if not arrows:
        return list(names)
    listed: list[str] = []
    folders = {posixpath.dirname(state) for state in states}
    for state in states:
        folder = posixpath.dirname(state)
        try:
            about = json.loads(root.read(state))
            mapped = about.get("_indices_data_files")
            listed += [posixpath.join(folder, file["filename"]) for file in about["_data_files"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorpusError(f"{root / state} is not a valid file list of a `datasets` data set: {error}") from error
        if mapped:
            raise CorpusError(
                f"{root / state} selects rows through a separate list, as `datasets` did before 2.0; save it again: "
                f"load_from_disk({str(root / folder)!r}).flatten_indices().save_to_disk(...)"
            )
    if missing := [name for name in listed if name not in names]:
        raise CorpusError(f"{root / missing[0]}, listed in {SAVED_STATE} next to it, is missing; fetch it again")
    return [
        name
        for name in arrows
        if name in listed or (posixpath.dirname(name) not in folders and not MADE_OF_IT.fullmatch(name))
    ]


def _is_arrow(name: str) -> bool:
    return name.lower().endswith(ARROW)


def _table_reason(root: StoragePath, name: str, *, beside_tars: bool) -> str | None:
    """Return why a table is not taken; None if it holds pictures.

    Args:
        beside_tars: whether the pictures are in tars, so that damaged tables and tables of paths are only counted.
    Raises: CorpusError if the table cannot be read and is not beside tars; StorageError if the storage fails.
    """
    try:
        kind = table_kind(root, name)
    except CorpusError:
        if not beside_tars:
            raise
        return NO_TABLE
    if kind == "index":
        return OWN_INDEX
    return None if kind == "bytes" or (kind == "paths" and not beside_tars) else NO_TABLE


def _is_gzipped(name: str) -> bool:
    return name.lower().endswith(GZIPPED)


def _require_utf8(root: StoragePath) -> None:
    if not root.is_utf8:
        raise CorpusError(f"corpus {root}: the folder's name is not UTF-8 and cannot be stored; rename it")


def _of_files(root: StoragePath, names: Sequence[str]) -> Source:
    """Return the source made of these files.

    Raises: CorpusError for a gzipped tar, or files of more than one kind; StorageError if the storage fails.
    """
    for name in names:
        if _is_gzipped(name):
            raise CorpusError(
                f"{root / name} is gzipped, so pictures in it cannot be read by their offset; gunzip it first"
            )
    kinds = {_kind_of(name) for name in names}
    if kinds == {"tables"} and len(names) == 1 and _index_or_missing(root, names[0]):
        return Source("index", root, names)
    if kinds not in ({"tars"}, {"tables"}):
        raise CorpusError(f"corpus {root} / {', '.join(names[:3])}: give either tars (.tar) or tables (.parquet)")
    root = root.resolved()
    _require_utf8(root)
    # Sorted as `NAME/`, because that is how the pictures' keys begin.
    return Source("tars" if kinds == {"tars"} else "tables", root, sorted(names, key=lambda name: f"{name}/"))


def _index_or_missing(root: StoragePath, name: str) -> bool:
    """Return whether a table is an index; a missing file counts as one, so that reading it reports it as missing."""
    try:
        return is_index(root, name)
    except FileNotFoundError:
        return True


def _split(place: StoragePath) -> tuple[StoragePath, str]:
    """Return the folder before the first brace, and the pattern below it."""
    before = place.url[: place.url.index("{")].rpartition("/")[0]
    return StoragePath.of(before or "/"), place.url[len(before) + 1 :]


def _of_pattern(place: StoragePath) -> Source:
    root, pattern = _split(place)
    names = [key_of(name) for name in expand(pattern)]
    if len(set(names)) < len(names):
        raise CorpusError(f"corpus {place} names the same file twice")
    # In a bucket, one listing is cheaper than a request for each file.
    there = None if root.is_local else set(root.list())
    missing = [name for name in names if not (root.exists(name) if there is None else name in there)]
    if missing:
        raise CorpusError(
            f"corpus {place}: {len(missing)} of the {len(names)} files do not exist, the first is {root / missing[0]}"
        )
    return _of_files(root, names)


def expand(pattern: str) -> Iterator[str]:
    """Return all names that `{000..099}` and `{a,b}` stand for, as in a shell, in all combinations of the braces."""
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
