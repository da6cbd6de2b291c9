"""Digests of weights, and what their absence is called."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eupe.common.kinds import WEIGHTS_FILE
from eupe.errors import EupeError, TeacherError
from eupe.models.checkpoints import is_usual, weights_files
from eupe.models.hub import brief, hub_or_offline
from eupe.teachers.spec import TeacherSpec

_BLOCK_BYTES = 1 << 24


def own_weights(spec: TeacherSpec) -> Path | None:
    """Return the path of the weights of a run, or of a directory in timm's layout; None for all other teachers."""
    if spec.is_local_dir:
        return spec.place
    return spec.place / WEIGHTS_FILE if spec.backend == "run" else None


def file_digest(path: Path, key: str | None = None) -> str:
    """Return the sha256 of a weights file, or of a directory's weights and configuration files with names, sorted.

    Args:
        key: key of the tensors in a file of several models; it enters the digest unless they would be found without it.
    """
    if key is not None and not is_usual(path, key):
        return hashlib.sha256(f"{file_digest(path)} {key.strip('.')}".encode()).hexdigest()
    if path.is_file():
        return _sha256_of_files([path], with_names=False)
    return _sha256_of_files(sorted([*weights_files(path), *path.glob("*.json")]), with_names=True)


@contextmanager
def hub_errors(spec: TeacherSpec) -> Iterator[None]:
    """Turn whatever a library raises while it fetches from its hub into a TeacherError of one sentence.

    Errors of eupe's own pass unchanged.
    """
    try:
        with hub_or_offline(spec.model):
            yield
    except EupeError:
        raise
    except Exception as error:
        raise TeacherError(
            f"weights of {spec.name} ({spec.model}) cannot be fetched from the hub ({brief(error)}); "
            f"give --weights PATH"
        ) from error


def _sha256_of_files(files: list[Path], *, with_names: bool) -> str:
    digest = hashlib.sha256()
    for file in files:
        if with_names:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()
