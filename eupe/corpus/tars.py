"""WebDataset tars: members that share a path up to the first dot of its last word are one sample.

Nothing is ever unpacked: a picture is a range of bytes of its tar. Labels come from `.cls` or a `.json`'s `label` or
`class`, captions from `.txt` or a `.json`'s `caption` or `text`.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from eupe.corpus.decode import EXTENSIONS
from eupe.corpus.folder import Known, Row, modified_ns, require_printable
from eupe.corpus.left_out import NO_PICTURE, LeftOut, added
from eupe.errors import CorpusError
from eupe.place import BLOCK_BYTES, Place

MEMBER = re.compile(r"(?P<sample>(?:.*/)?[^./][^./]*)\.(?P<extension>[^/]+)")
SIDECARS = ("cls", "json", "txt")
GZIP = b"\x1f\x8b"


@dataclass
class _Sample:
    picture: Row | None = None
    words: dict[str, bytes] = field(default_factory=dict)


def tar_rows(root: Place, name: str, known: Known) -> tuple[list[Row], LeftOut]:
    """Rows of the index, one for each sample, in the tar's order, and what is left out.

    Args:
        name: of the tar, below the root.
        known: rows of this tar in an earlier index; a picture of the same place in a tar of the same time is not
            hashed again.
    Raises: CorpusError if the tar is not whole and plain, or its samples are not clear; StorageError if an object
        store does not serve it.
    """
    require_printable(str(root / name))
    modified = modified_ns(root, name)
    samples: dict[str, _Sample] = {}
    try:
        with root.open(name) as file:
            _scan(file, root / name, samples, lambda member: _take(file, member, name, samples, known, modified))
    except FileNotFoundError as error:
        raise CorpusError(str(error)) from error
    rows = [
        sample.picture | _words(sample.words, f"{root / name}: {prefix}")
        for prefix, sample in samples.items()
        if sample.picture is not None
    ]
    rows.sort(key=lambda row: int(row["start"]))
    return rows, added({NO_PICTURE: len(samples) - len(rows)})


def _scan(file: BinaryIO, where: Place, samples: dict[str, _Sample], take: Callable[[tarfile.TarInfo], None]) -> None:
    """Hand on the files in a tar.

    Raises: CorpusError, telling how many samples came before, where it breaks off.
    """
    if file.read(len(GZIP)) == GZIP:
        raise CorpusError(f"{where} is gzipped, so that no picture in it can be found by its place; gunzip it first")
    file.seek(0)
    broken: BaseException | None = None
    last: str | None = None
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                last = _sample_name(member)
                if member.issparse():
                    raise CorpusError(f"{where}: member {member.name} is a sparse file; make the tar without --sparse")
                if member.isreg():
                    take(member)
                tar.members.clear()  # type: ignore[attr-defined]  # which would hold every header of the tar
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        broken = error
    if broken is None:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE):
            return
    whole = len(samples) - (broken is not None and last in samples)
    raise CorpusError(
        f"{where} is truncated or damaged ({broken or 'its end mark is missing'}), after {whole} whole samples; make "
        "or fetch it again"
    ) from broken


def _sample_name(member: tarfile.TarInfo) -> str | None:
    match = MEMBER.fullmatch(member.name.removeprefix("./"))
    return match["sample"] if match and member.isreg() else None


def _take(
    file: BinaryIO, member: tarfile.TarInfo, tar: str, samples: dict[str, _Sample], known: Known, modified: int | None
) -> None:
    """Note a member in its sample.

    Raises: CorpusError; EOFError if the tar ends inside it.
    """
    path = member.name.removeprefix("./")
    match = MEMBER.fullmatch(path)
    if match is None:
        return
    key = f"{tar}/{path}"
    require_printable(key)
    sample = samples.setdefault(match["sample"], _Sample())
    extension = match["extension"].lower()
    file.seek(member.offset_data)
    if extension in SIDECARS:
        if extension in sample.words:
            raise CorpusError(f"{key} is in its tar twice; names in a tar must be unique")
        sample.words[extension] = b"".join(_blocks(file, member.size))
    elif f".{extension}" in EXTENSIONS:
        if sample.picture is not None:
            other = sample.picture["key"]
            raise CorpusError(
                f"{key} is in its tar twice; names in a tar must be unique"
                if other == key
                else f"one sample has two pictures, {other} and {key}; give each sample of a tar one, under one name "
                "up to the first dot"
            )
        place = {"file": tar, "start": member.offset_data, "length": member.size}
        row: Row = {"key": key, "num_bytes": member.size, "mtime_ns": modified, **place}
        before = known.get(key)
        if before is not None and all(before[name] == row[name] for name in ("mtime_ns", *place)):
            row["sha256"] = before["sha256"]
        else:
            digest = hashlib.sha256()
            for block in _blocks(file, member.size):
                digest.update(block)
            row["sha256"] = digest.hexdigest()
        sample.picture = row


def _blocks(file: BinaryIO, length: int) -> Iterator[bytes]:
    while length:
        block = file.read(min(length, BLOCK_BYTES))
        if not block:
            raise EOFError("it ends inside a member")
        length -= len(block)
        yield block


def _words(words: dict[str, bytes], where: str) -> Row:
    """Label and caption.

    Raises: CorpusError if they cannot be read.
    """
    texts: dict[str, str] = {}
    for extension, data in words.items():
        try:
            texts[extension] = data.decode()
        except UnicodeDecodeError as error:
            raise CorpusError(f"{where}.{extension} is not UTF-8 text") from error
    try:
        notes = json.loads(texts["json"]) if "json" in texts else {}
    except ValueError as error:
        raise CorpusError(f"{where}.json cannot be read as JSON: {error}") from error
    notes = notes if isinstance(notes, dict) else {}
    label = texts["cls"].strip() if "cls" in texts else _first(notes, "label", "class")
    caption = texts["txt"].strip() if "txt" in texts else _first(notes, "caption", "text")
    return {"label": label, "caption": caption}


def _first(notes: dict[str, Any], *names: str) -> str | None:
    """The first of these entries that is a word or a number."""
    values = (notes[name] for name in names if isinstance(notes.get(name), str | int | float))
    return next((str(value) for value in values), None)
