"""Faults planted from outside: an environment in which marked pictures are deadly, and writes fail when told to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

PLANTED = Path(__file__).parent / "planted"
MARK = b"POISON:"


def poison(picture: Path, how: str) -> None:
    """Append a word to a picture that decoders in a planted environment die of: `segfault`, `endless`, `greedy`.

    Elsewhere it is the same picture.
    """
    picture.write_bytes(picture.read_bytes() + MARK + how.encode() + b";")


def planted_environment(*, patience: float | None = None, writes: WriteFaults | None = None) -> dict[str, str]:
    """Variables under which every new Python process decodes and writes so.

    Args:
        patience: replaces its limit for one picture, in seconds.
    """
    paths = [str(PLANTED), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    if patience is not None:
        variables["PLANTED_PICTURE_SECONDS"] = str(patience)
    if writes is not None:
        variables |= {"PLANTED_WRITES": str(writes.file), "PLANTED_WRITE_SECONDS": str(writes.seconds)}
    return variables


class WriteFaults:
    """What becomes of the next writes of parts' objects, of all processes of an environment together."""

    def __init__(self, file: Path, *, seconds: float = 0.0) -> None:
        """
        Args:
            file: keeps what is to come.
            seconds: that each write takes longer.
        """
        self.file = file
        self.seconds = seconds

    def plan(self, outcomes: Sequence[str]) -> None:
        """`ok`, or the name of an error (`EIO`), for each of the next writes; all others succeed."""
        unfinished = self.file.with_suffix(".new")
        unfinished.write_text(" ".join(outcomes))
        unfinished.replace(self.file)

    @property
    def spent(self) -> bool:
        """All has come."""
        return not self.file.read_text()
