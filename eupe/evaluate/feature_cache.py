"""Tokens kept on disk between evaluations, in a folder of bounded size.

An entry holds one kind of token of one pass. It is a file of NumPy's (`.npz`, never with pickled objects), named after
its key (`feature_key`), written whole or not at all, and every array of it is checked before it is used. Whatever fails
here costs a pass of the encoder, and never the evaluation.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eupe.common.files import UNFINISHED, remove_unfinished, replacing, write_file
from eupe.common.progress import amount
from eupe.corpus.views import NEUTRAL, ViewParams
from eupe.errors import ConfigError
from eupe.evaluate.encode import EncodedViews
from eupe.store.layout import DENSE, SUMMARY

LIMIT_GB = 20.0
TAG_FILE = "CACHEDIR.TAG"
SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55"
"""The first line of such a file, by which programs that make backups leave a folder out (bford.info/cachedir)."""
TAG = f"{SIGNATURE}\n# Features that eupe keeps between evaluations. This folder may be deleted at any time.\n"
ENTRY = re.compile(rf"[0-9a-f]{{64}}\.({SUMMARY}|{DENSE})\.npz(\.[0-9a-f]{{16}}{re.escape(UNFINISHED)})?")
"""Names of entries, and of those that are being written."""
BLOCK_VIEWS = 16
"""Views whose tokens are one array: dense tokens may be larger than the memory (`--scratch`)."""

MakeRoom = Callable[[tuple[int, ...]], Tensor]
"""Function from the shape of dense tokens to a tensor for them."""


class FeatureCache:
    """A folder of entries; the least recently used ones make room for new ones."""

    def __init__(self, folder: Path, *, limit_bytes: float, on_note: Callable[[str], None]) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._on_note = on_note
        self._noted = False

    def encoded_views(
        self,
        key: Callable[[], str],
        kinds: Sequence[str],
        encode: Callable[[], EncodedViews],
        room: MakeRoom,
    ) -> EncodedViews:
        """Return the kept tokens; if a kind is missing, run the encoder and keep its tokens.

        Args:
            key: function that returns the views' key. It is called again after a pass: pictures that were changed
                meanwhile have another key, and their tokens are not kept.
            encode: function that runs the encoder and returns all of `kinds`.
        Raises: what `key` and `encode` raise.
        """
        wanted = key()
        found = {kind: views for kind in kinds if (views := self._find(wanted, kind, room)) is not None}
        missing = [kind for kind in kinds if kind not in found]
        if not missing:
            return replace(found[kinds[0]], **{kind: getattr(found[kind], kind) for kind in kinds})
        found.clear()  # the pass needs the memory
        encoded = encode()
        if key() == wanted:
            for kind in missing:
                self._keep(wanted, kind, encoded)
        return encoded

    def _path(self, key: str, kind: str) -> Path:
        return self._folder / f"{key}.{kind}.npz"

    def _find(self, key: str, kind: str, room: MakeRoom) -> EncodedViews | None:
        """Return what an entry holds; None if there is none, or it is damaged."""
        path = self._path(key, kind)
        try:
            views = _read(path, kind, room)
        except Exception:  # a damaged file makes the libraries raise anything; what `room` raises, a pass raises, too
            return None
        with suppress(OSError):  # the folder of a colleague may be read-only
            os.utime(path)  # the time of the last use; file systems are often mounted without access times
        return views

    def _keep(self, key: str, kind: str, views: EncodedViews) -> None:
        """Write an entry; if that fails, say so once."""
        path = self._path(key, kind)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if not (self._folder / TAG_FILE).exists():
                write_file(self._folder / TAG_FILE, TAG)
            self._make_room(getattr(views, kind).nbytes)
            with replacing(path) as unfinished:
                _write(unfinished, path.name, kind, views)
                self._make_room(0)  # other commands may have written at the same time
        except OSError as error:
            if not self._noted:
                self._noted = True
                self._on_note(
                    f"features are not kept in {self._folder} ({error.strerror or error}); the results are the same, "
                    "but the next evaluation computes them again"
                )

    def _make_room(self, num_bytes: int) -> None:
        """Delete the least recently used entries until there is room for more bytes, and what killed writers left.

        What another command reads is read to its end: only the file's name goes at once.

        Raises: OSError if there is not enough room.
        """
        remove_unfinished(self._folder)
        entries = _entries(self._folder)
        held = sum(size for _, size, _ in entries)
        # the other half of the disk is for those who need it more than a cache does
        most = min(self._limit_bytes, (held + shutil.disk_usage(self._folder).free) / 2)
        for _, size, path in entries:
            if num_bytes > most or held + num_bytes <= most:
                break
            if not path.name.endswith(UNFINISHED):
                path.unlink(missing_ok=True)
                held -= size
        if held + num_bytes > most:
            raise OSError(
                f"there is room for {amount(most)} by --features-gb and half of the free disk, "
                f"not for {amount(held + num_bytes)}"
            )


def open_features(folder: Path, *, limit_gb: float = LIMIT_GB, on_note: Callable[[str], None]) -> FeatureCache:
    """Return the cache in a folder, which is made when the first entry is written.

    Args:
        limit_gb: most that the entries may take together, in 10^9 bytes.
        on_note: called once, with a sentence, if features cannot be kept.
    Raises: ConfigError if it is not a folder, or holds files that eupe did not write.
    """
    if not _may_be_ours(folder):
        raise ConfigError(f"--features {folder} is not a folder of features; give a new or an empty one")
    return FeatureCache(folder, limit_bytes=limit_gb * 1e9, on_note=on_note)


def _may_be_ours(folder: Path) -> bool:
    """Return whether a folder has our mark, is empty, or is missing."""
    tag = folder / TAG_FILE
    try:
        if not folder.exists():
            return True
        if tag.is_file():
            said = tag.read_bytes()
            return said.startswith(SIGNATURE.encode()) and b"eupe" in said
        # a mark may have been left half written
        return folder.is_dir() and all(path.name.endswith(UNFINISHED) for path in folder.iterdir())
    except OSError:  # it cannot be read: nothing will be kept, which a note will say
        return True


def _entries(folder: Path) -> list[tuple[int, int, Path]]:
    """Return time of last use (ns), bytes and path of all entries, the least recently used first."""
    found = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another process has just deleted it
            status = path.lstat()
            if ENTRY.fullmatch(path.name) and stat.S_ISREG(status.st_mode):
                found.append((status.st_mtime_ns, status.st_size, path))
    return sorted(found)


def _write(path: Path, name: str, kind: str, views: EncodedViews) -> None:
    # a crop of `feature_key.CROPS` neither mirrors nor recolours
    assert all(not how.flip and how.photometric == NEUTRAL for how in views.params)
    tokens: Tensor = getattr(views, kind)
    arrays: dict[str, Any] = {
        "name": name,
        "size": views.size,
        "picture": views.picture_V,
        "box": [how.box for how in views.params],
        "shape": tokens.shape,
        **{f"tokens{i}": block.numpy() for i, block in enumerate(torch.split(tokens, BLOCK_VIEWS))},
    }
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _read(path: Path, kind: str, room: MakeRoom) -> EncodedViews:
    """Read an entry.

    Raises: OSError if there is none; anything if it is damaged.
    """
    with zipfile.ZipFile(path) as entry:

        def array(name: str) -> NDArray[Any]:
            # `read` checks the array's CRC-32, which np.load alone does not if a header says that there is less
            return np.load(io.BytesIO(entry.read(f"{name}.npy")), allow_pickle=False)  # type: ignore[no-any-return]

        if array("name") != path.name:
            raise ValueError(f"{path} is another entry, renamed")
        params = [ViewParams((x0, y0, x1, y1), False, NEUTRAL) for x0, y0, x1, y1 in array("box").tolist()]
        shape = tuple(array("shape").tolist())
        tokens = room(shape) if kind == DENSE else torch.empty(shape)
        for i, block in enumerate(torch.split(tokens, BLOCK_VIEWS)):
            block.copy_(torch.from_numpy(array(f"tokens{i}")))
        views = EncodedViews(array("picture"), params, int(array("size")))
    return replace(views, summary=tokens) if kind == SUMMARY else replace(views, dense=tokens)
