"""Permissions that let colleagues read files that a library writes for their owner alone."""

from __future__ import annotations

import os
from pathlib import Path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()
"""Umask, read once while there is one thread: it cannot be read without changing it."""


def share(file: Path) -> None:
    """Give a file the mode of this process's new files; safetensors writes with 0600."""
    file.chmod(0o666 & ~_UMASK)
