"""Digests of weights, and helpers for the libraries that load them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch
from torch import nn

from eupe.common.kinds import WEIGHTS_FILE
from eupe.errors import EupeError, TeacherError
from eupe.models.checkpoints import is_usual, weights_files
from eupe.teachers.spec import TeacherSpec

HUB_SECONDS = 5.0
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


def weights_digest(module: nn.Module) -> str:
    """Return the sha256 over name, dtype, shape and bytes of every tensor of the state dict, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        digest.update(plain.view(-1).view(torch.uint8).numpy())  # as bytes, because NumPy has no bfloat16
    return digest.hexdigest()


def at_revision(source: str) -> tuple[str, str]:
    """Split `OWNER/NAME@REVISION` into the repository and the branch, tag or commit; `main` if none is named.

    Args:
        source: a repository, or an existing directory, whose name is never split.
    """
    name, _, revision = (source, "", "") if Path(source).exists() else source.partition("@")
    return name, revision or "main"


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


@contextmanager
def hub_or_offline(source: str) -> Iterator[None]:
    """Restrict the hub's client to its cache, as HF_HUB_OFFLINE=1 does, if the hub does not answer; this saves retries.

    Args:
        source: what is fetched; nothing changes for a local file or directory.
    Raises: ConnectionError if the hub does not answer and the cache lacks what is fetched.
    """
    from huggingface_hub import constants

    if Path(source).exists() or constants.HF_HUB_OFFLINE or _hub_answers(constants.ENDPOINT):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except OSError as error:
        raise ConnectionError(f"{constants.ENDPOINT} does not answer, and the local cache does not have it") from error
    finally:
        constants.HF_HUB_OFFLINE = False


@cache
def _hub_answers(endpoint: str) -> bool:
    """Return whether anything answers at the endpoint; ask once in a process, with one retry."""
    from huggingface_hub import get_session

    for _ in range(2):
        with suppress(Exception):
            get_session().head(endpoint, timeout=HUB_SECONDS)
            return True
    return False


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turn off the library's reports and progress bars; anything in them that matters is raised as an error."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def quiet_open_clip() -> Iterator[None]:
    """Turn off open_clip's warnings: weights are loaded elsewhere, and failed downloads raise errors anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def brief(error: BaseException) -> str:
    """Return a library's error message on one line, cut to about 200 characters."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 200 else f"{words[:200]}..."


def _sha256_of_files(files: list[Path], *, with_names: bool) -> str:
    digest = hashlib.sha256()
    for file in files:
        if with_names:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()
