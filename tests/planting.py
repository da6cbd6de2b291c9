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


class Outcomes:
    """The planned outcomes of the next attempts, which all processes of an environment share through a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.plan([])

    def plan(self, words: Sequence[str]) -> None:
        """`ok`, or what goes wrong, for each of the next; all others succeed."""
        unfinished = self.file.with_suffix(".new")
        unfinished.write_text(" ".join(words))
        unfinished.replace(self.file)

    @property
    def spent(self) -> bool:
        """All has come."""
        return not self.file.read_text()


def planted_environment(
    *,
    patience: float | None = None,
    writes: Outcomes | None = None,
    write_seconds: float = 0.0,
    loads: Outcomes | None = None,
    narrow: Sequence[str] = (),
) -> dict[str, str]:
    """Variables under which every new Python process decodes, writes and loads so.

    Args:
        patience: replaces its limit for one picture, in seconds.
        writes: of parts' objects; the names of errors (`EIO`).
        write_seconds: that each of them takes longer.
        loads: of teachers; the names of signals that kill the process (`SIGKILL`).
        narrow: rows of the registry whose models are 64 wide and two blocks deep, in whatever library they are:
            DINOv2, CLIP ViT-B/16 of OpenAI or SigLIP.
    """
    paths = [str(PLANTED), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    if patience is not None:
        variables["PLANTED_PICTURE_SECONDS"] = str(patience)
    if writes is not None:
        variables |= {"PLANTED_WRITES": str(writes.file), "PLANTED_WRITE_SECONDS": str(write_seconds)}
    if loads is not None:
        variables["PLANTED_LOADS"] = str(loads.file)
    if narrow:
        variables["PLANTED_NARROW"] = " ".join(narrow)
    return variables
