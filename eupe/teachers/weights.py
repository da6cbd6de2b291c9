"""Weights named by their content, and what is common to the libraries that load them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch
from torch import nn

from eupe.checkpoints import is_usual, weights_files
from eupe.errors import EupeError, TeacherError
from eupe.kinds import WEIGHTS_FILE
from eupe.teachers.spec import TeacherSpec

HUB_SECONDS = 5.0
_BLOCK_BYTES = 1 << 24


def own_weights(spec: TeacherSpec) -> Path | None:
    """Where a teacher that lies in a directory of a run, or of timm's, has its weights; None for all others."""
    if spec.is_local_dir:
        return spec.place
    return spec.place / WEIGHTS_FILE if spec.backend == "run" else None


def file_digest(path: Path, key: str | None = None) -> str:
    """sha256 of a weights file, or of a directory's weights and configuration files, names included, sorted.

    Args:
        key: of the tensors among others in the file; it is part of the digest where it says more than the file does.
    """
    if key is not None and not is_usual(path, key):
        return hashlib.sha256(f"{file_digest(path)} {key.strip('.')}".encode()).hexdigest()
    if path.is_file():
        return _sha256_of_files([path], with_names=False)
    return _sha256_of_files(sorted([*weights_files(path), *path.glob("*.json")]), with_names=True)


def weights_digest(module: nn.Module) -> str:
    """sha256 over the name, dtype, shape and bytes of every tensor of the state dict, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        digest.update(plain.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def at_revision(source: str) -> tuple[str, str]:
    """Split `OWNER/NAME@REVISION` into the repository and the branch, tag or commit; `main` where none is named.

    Args:
        source: also a directory, whatever its name.
    """
    name, _, revision = (source, "", "") if Path(source).exists() else source.partition("@")
    return name, revision or "main"


@contextmanager
def hub_errors(spec: TeacherSpec) -> Iterator[None]:
    """Turns whatever a library raises while it fetches from its hub into one sentence.

    Raises: TeacherError.
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
    """Where the hub does not answer, its client looks in its cache alone, as with HF_HUB_OFFLINE=1, without retries.

    Args:
        source: what is fetched; the hub is not asked about a local file or directory.
    """
    from huggingface_hub import constants

    if Path(source).exists() or constants.HF_HUB_OFFLINE or _hub_answers(constants.ENDPOINT):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except OSError as error:
        raise ConnectionError(f"{constants.ENDPOINT} does not answer, and the cache here lacks it") from error
    finally:
        constants.HF_HUB_OFFLINE = False


@cache
def _hub_answers(endpoint: str) -> bool:
    """Whether anything does, asked once in a process, and a second time where the first got no answer."""
    from huggingface_hub import get_session

    for _ in range(2):
        with suppress(Exception):
            get_session().head(endpoint, timeout=HUB_SECONDS)
            return True
    return False


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """The library's reports and progress bars off: what matters of them is raised."""
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
    """Its warnings off, of weights that are loaded elsewhere and of downloads whose failure is raised as well."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def brief(error: BaseException) -> str:
    """What a library had to say, on one line of bearable length."""
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
