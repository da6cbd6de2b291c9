"""Tars of pictures, made by `tarfile`."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from making import picture


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


def make_tar(path: Path, members: Mapping[str, bytes], *, format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members_of(path: Path) -> dict[str, bytes]:
    found = {}
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None
            found[member.name] = file.read()
    return found


def tars_of(corpus: Path, folder: Path, *, count: int) -> Path:
    """The pictures of class folders, in their order, dealt out to tars, with their class as label."""
    paths = sorted(corpus.rglob("*.png"))
    share = -(-len(paths) // count)
    for i in range(count):
        members = {}
        for path in paths[i * share : (i + 1) * share]:
            name = path.relative_to(corpus).as_posix()
            members[name] = path.read_bytes()
            members[name.replace(".png", ".cls")] = path.parent.name.encode()
        make_tar(folder / f"{i:03d}.tar", members)
    return folder
