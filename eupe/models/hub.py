"""Helpers for the libraries that build and load models: their hub, their chatter and their errors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

HUB_SECONDS = 5.0


def at_revision(source: str) -> tuple[str, str]:
    """Split `OWNER/NAME@REVISION` into the repository and the branch, tag or commit; `main` if none is named.

    Args:
        source: a repository, or an existing directory, whose name is never split.
    """
    name, _, revision = (source, "", "") if Path(source).exists() else source.partition("@")
    return name, revision or "main"


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


def named(error: BaseException) -> str:
    """Return the type of a library's error, and its message as `brief` gives it."""
    return f"{type(error).__name__}: {brief(error)}"


def brief(error: BaseException) -> str:
    """Return a library's error message on one line, cut to about 200 characters."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 200 else f"{words[:200]}..."
