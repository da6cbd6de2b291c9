"""What every evaluation leaves: scores, and the protocol and data that they hold for."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eupe.errors import ConfigError, RunError, StorageError
from eupe.reading import parse_json

EVALUATIONS_FILE = "evaluations.jsonl"
MOST_LINE_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class Result:
    """One subject on one task."""

    task: str
    """The verb: `knn`, `segment`, ..."""
    subject: str
    """Store, run or teacher, as it was named."""
    kind: str
    """store, run, teacher or pixels."""
    untrained: bool = False
    """The same architecture with random weights."""
    scores: dict[str, float]
    """By measure; the first is the one that is compared."""
    lower_is_better: bool = False
    """Of the first measure."""
    protocol: dict[str, Any]
    """Every constant that decides the scores, given the subject and the data."""
    data: dict[str, Any]
    """Where it lies, and how much of it there was."""
    notes: list[str] = field(default_factory=list)
    """What was judged by what, and what is odd about the data, a sentence each, for people."""

    @property
    def name(self) -> str:
        """For a table's row."""
        return f"{self.subject}, untrained" if self.untrained else self.subject

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return plain

    @classmethod
    def from_json(cls, plain: Any) -> Result:
        """The inverse of `to_json`.

        Raises: TypeError if it is something else; OverflowError for a score beyond all floats.
        """
        result = cls(**plain)
        words = (result.task, result.subject, result.kind)
        parts = (result.scores, result.protocol, result.data)
        if not isinstance(result.notes, list) or not all(isinstance(note, str) for note in result.notes):
            raise TypeError("its notes are not all words")
        if not all(isinstance(word, str) for word in words) or not all(isinstance(part, dict) for part in parts):
            raise TypeError("task, subject and kind are not all words, or scores, protocol and data not all objects")
        if type(result.untrained) is not bool or type(result.lower_is_better) is not bool:
            raise TypeError("untrained and lower_is_better are not both true or false")
        if not result.scores or not all(type(score) in (int, float) for score in result.scores.values()):
            raise TypeError("its scores are not numbers")
        if "\0" in result.subject:
            raise TypeError("its subject is no name of anything")
        for score in result.scores.values():
            float(score)
        return result


def keep_results(results: Iterable[Result], also: Path | None = None) -> None:
    """Append each result to its run's `evaluations.jsonl`, those of untrained students too, and all to one more file.

    With that file, a run that may not be written, such as a colleague's, goes without.

    A line is written in one piece, so evaluations that run side by side do not mix.

    Raises: StorageError; what was written of a line is taken back.
    """
    refused: list[StorageError] = []
    for result in results:
        places = [] if also is None else [also]
        if result.kind == "run" and (also is None or os.access(result.subject, os.W_OK)):
            places.append(Path(result.subject) / EVALUATIONS_FILE)
        for place in places:
            try:
                _append(place, json.dumps(result.to_json()).encode() + b"\n")
            except OSError as error:
                refused.append(StorageError(f"the result cannot be appended to {place}: {error}"))
    if refused:
        raise refused[0]


def require_place(results: Path | None, runs: Iterable[str] = ()) -> None:
    """Ahead of the work.

    Raises: ConfigError if results cannot be kept there, or with the runs that are judged.
    """
    for run in runs:
        if results is None and not os.access(run, os.W_OK):
            raise ConfigError(f"run {run} may not be written, where its results are kept; give --results FILE.jsonl")
    if results is not None and (results.is_dir() or not results.absolute().parent.is_dir()):
        what = "is a folder" if results.is_dir() else "lies in no folder that is there"
        raise ConfigError(f"--results {results} {what}; give a file of results (.jsonl)")
    if results is not None and results.is_file() and not _holds_results(results):
        raise ConfigError(
            f"--results {results} is there and holds no results, to which one could be added; name another"
        )


def _holds_results(file: Path) -> bool:
    """Tell whether the first line of a file is a result, or there is none."""
    with file.open("rb") as opened:
        line = opened.readline(MOST_LINE_BYTES)
    try:
        return not line.strip() or bool(Result.from_json(parse_json(line)))
    except (ValueError, TypeError, AttributeError, OverflowError):
        return False


def _append(place: Path, line: bytes) -> None:
    """To a file, or to what only takes bytes, such as a pipe.

    Raises: OSError, and leaves no part of the line.
    """
    with place.open("ab", buffering=0) as file:
        if not place.is_file():
            file.write(line)
            return
        with suppress(OSError):  # of a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        whole = place.read_bytes()[-1:] in (b"", b"\n")
        before, line = place.stat().st_size, line if whole else b"\n" + line
        if (written := file.write(line)) < len(line):
            file.truncate(before)
            raise OSError(f"no room for more than {written} of {len(line)} bytes")


def read_results(path: Path) -> list[Result]:
    """Of a run's directory, or of a file of results; none where the run has not been judged. The newest comes last.

    Raises: RunError if there is something else.
    """
    place = path / EVALUATIONS_FILE if path.is_dir() else path
    if path.is_dir() and not place.exists():
        return []
    where, results = str(place), []
    try:
        for number, line in enumerate(place.read_text(encoding="utf-8").splitlines(), start=1):
            where = f"line {number} of {place}"
            results.append(Result.from_json(parse_json(line)))
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise RunError(f"{where} holds no results of evaluations ({error}); remove it, or judge again") from error
    return results


def newest(results: Sequence[Result]) -> list[Result]:
    """The last of every (task, subject, protocol, data), in the order in which they first came."""
    kept: dict[str, Result] = {}
    for result in results:
        plain = result.to_json()
        kept[json.dumps([plain[k] for k in ("task", "subject", "untrained", "protocol", "data")], sort_keys=True)] = (
            result
        )
    return list(kept.values())
