"""Processes that a process has started, found in /proc: never those of a test that runs beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def descendants(pid: int) -> Iterator[int]:
    """None of a process that is gone."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return
    for child in children:
        yield int(child)
        yield from descendants(int(child))


def descendants_called(word: bytes, pid: int) -> list[int]:
    """Those that have the word in their command line; Ray's workers bear the names of their actors there."""
    found = []
    for child in descendants(pid):
        try:
            if word in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
