"""Weights on disk and in memory: reading them without running code, and naming them by their content."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from eupe.errors import EupeError, TeacherError
from eupe.teachers.spec import TeacherSpec

DIRECTORY_PATTERNS = (
    "model.safetensors",
    "model-*.safetensors",
    "*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*.bin",
    "*.pt",
    "*.pth",
    "*.bin",
)
"""Where a directory's weights are: the first pattern that any file fits, and then every file that fits it."""
HUB_SECONDS = 5.0
_BLOCK_BYTES = 1 << 24


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Every tensor of a weights file, or of all the weights files of one format in a directory, on the CPU.

    Pickled files are read with torch's weights-only unpickler; a state dict under "state_dict" or "model" is unwrapped.

    Raises: TeacherError if there is nothing there, or it is not a state dict.
    """
    state: dict[str, Tensor] = {}
    for file in _found(path):
        state |= _read_file(file)
    return state


def require_readable(path: Path) -> None:
    """Without reading the tensors: raises TeacherError if there are no weights, or files of another kind."""
    for file in _found(path):
        try:
            if file.suffix == ".safetensors":
                with safetensors.safe_open(file, framework="pt"):
                    continue
            with file.open("rb") as stream:
                start = stream.read(2)
        except Exception as error:
            raise TeacherError(f"{file} is not a weights file that can be read ({brief(error)})") from error
        if start != b"PK" and start[:1] != b"\x80":
            raise TeacherError(f"{file} is not a weights file: neither safetensors nor what torch.save writes")


def _found(path: Path) -> list[Path]:
    """Raises: TeacherError if there are no weights."""
    if not path.exists():
        _, equals, after = str(path).partition("=")
        hint = f"; this verb takes the path alone, without TEACHER=: --weights {after}" if equals else ""
        raise TeacherError(f"weights {path} do not exist{hint}")
    if not (files := weights_files(path)):
        raise TeacherError(f"{path} holds no weights: no {', '.join(DIRECTORY_PATTERNS)} in it")
    return files


def weights_files(path: Path) -> list[Path]:
    """A file itself; in a directory the files that hold its model, by the hub's habits of naming, sorted by name."""
    if path.is_file():
        return [path]
    found = (sorted(path.glob(pattern)) for pattern in DIRECTORY_PATTERNS)
    return next((files for files in found if files), [])


def file_digest(path: Path) -> str:
    """sha256 of a weights file, or of a directory's weights and configuration files, names included, sorted."""
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


def _read_file(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise TeacherError(f"{file} is not a weights file that can be read ({brief(error)})") from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise TeacherError(f"{file} is not a state dict: it holds something else than named tensors")
    return loaded


def _sha256_of_files(files: list[Path], *, with_names: bool) -> str:
    digest = hashlib.sha256()
    for file in files:
        if with_names:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()
