"""Inputs that a pipeline does not make itself: pictures and files, identified by content as far as that is cheap."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from eupe.common.files import name_of, write_file
from eupe.common.storage import StoragePath
from eupe.corpus.folder import file_names
from eupe.corpus.index import Corpus, read_index
from eupe.corpus.sources import find_source
from eupe.models.checkpoints import DIRECTORY_PATTERNS, weights_files
from eupe.teachers.preprocess import OWN_FILES

WEIGHTS = {Path(pattern).suffix for pattern in DIRECTORY_PATTERNS}
DIGESTS = ".digests.json"
"""File in a pipeline's directory with the digests of known files: path to size, modification time and sha256."""


@dataclass(frozen=True)
class Pictures:
    """A corpus in its present state."""

    stamp: str | None
    """A hash that changes with the pictures: of their hashes for an index, of names, sizes and times for files. None if
    they are not on this machine."""
    keys: Sequence[str] | None = None
    """Keys of the pictures; None if these are unknown without reading the data: tars, tables, object stores."""

    def count(self, *, include: Sequence[str], exclude: Sequence[str], limit: int | None) -> int | None:
        """Return how many of the pictures an extraction takes; None if unknown.

        Raises: CorpusError if it takes none.
        """
        if self.keys is None:
            return None
        corpus = Corpus(StoragePath("/"), pa.table({"key": pa.array(self.keys, pa.string())}))
        return len(corpus.pick(include=include, exclude=exclude, limit=limit))


class Inputs:
    """The corpora and files that a pipeline reads, each inspected once."""

    def __init__(self, out: Path) -> None:
        self._memory = out / DIGESTS
        self._pictures: dict[str, Pictures] = {}
        try:
            self._digests: dict[str, list[int | str]] = json.loads(self._memory.read_text())
        except (OSError, ValueError):
            self._digests = {}

    def keep(self) -> None:
        """Save the digests for the next run."""
        write_file(self._memory, json.dumps(self._digests))

    def pictures(self, words: str) -> Pictures:
        """Return the pictures of a corpus.

        Raises: CorpusError if there is no corpus of that name.
        """
        if words not in self._pictures:
            self._pictures[words] = self._look(words)
        return self._pictures[words]

    def _look(self, words: str) -> Pictures:
        if not StoragePath.of(words).is_local:
            return Pictures(None)
        found = find_source(words)
        if found.kind == "index":
            index = read_index(found.root / found.files[0])
            return Pictures(index.fingerprint, index.samples["key"].to_pylist())
        keys = list(found.picture_keys()) if found.kind == "pictures" else None
        return Pictures(_stamp(found.root.local, found.files if keys is None else [*keys, *found.metadata]), keys)

    def folder(self, words: str) -> str:
        """Return a hash of the names, sizes and times of the files below a local folder; see `file_names`.

        Raises: CorpusError if it cannot be read.
        """
        return _stamp(Path(words), list(file_names(StoragePath.of(words))))

    def content(self, words: str) -> str | None:
        """Return the sha256 of a local file, or of the weights and JSON documents of a folder (a model, run or store).

        Files beside a weights file count with it if they say how the model's pixels are normalised.

        Args:
            words: a path, NAME=PATH, or a teacher's timm:local-dir:PATH; anything else gives None.
        """
        ways = (words, words.partition("=")[2], words.partition("timm:local-dir:")[2])
        path = next((path for path in map(Path, ways) if path.name and path.exists()), None)
        if path is None:
            return None
        if path.is_file():
            beside = [path.with_name(name) for name in OWN_FILES] if path.suffix in WEIGHTS else []
            files = [path, *(file for file in beside if file.is_file())]
            if len(files) == 1:
                return self._digest(path)
        else:
            files = sorted({*path.glob("*.json"), *weights_files(path)})
        parts = [f"{file.name} {self._digest(file)}" for file in files]
        return _sha256("\n".join(parts)) if parts else None

    def _digest(self, file: Path) -> str:
        status = file.stat()
        name, seen = str(file.resolve()), [status.st_size, status.st_mtime_ns]
        if self._digests.get(name, [])[:2] != seen:  # weights are large, so an unchanged file is not read again
            with file.open("rb") as stream:
                self._digests[name] = [*seen, hashlib.file_digest(stream, "sha256").hexdigest()]
        return str(self._digests[name][2])


def _stamp(root: Path, names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        try:
            status = (root / name_of(name)).stat()
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{name}\0unreadable\n".encode())
    return digest.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
