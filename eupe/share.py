"""Files that colleagues can read, where a library leaves its own to their owner alone."""

from __future__ import annotations

import os
from pathlib import Path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()
"""Asked for once, while there is one thread: there is no way to ask without changing it."""


def share(file: Path) -> None:
    """Give a file the mode that this process gives new ones; safetensors writes with 0600."""
    file.chmod(0o666 & ~_UMASK)
