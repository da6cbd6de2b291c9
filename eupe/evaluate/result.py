"""Results of evaluations: scores, with the protocol and the data that they hold for."""

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

from eupe.common.reading import parse_json
from eupe.errors import ConfigError, RunError, StorageError

EVALUATIONS_FILE = "evaluations.jsonl"
MOST_LINE_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of one subject on one task."""

    task: str
    """Name of the command: `knn`, `segment`, ..."""
    subject: str
    """Store, run or teacher, as the user named it."""
    kind: str
    """store, run, teacher or pixels."""
    untrained: bool = False
    """True if the subject has random weights instead of its own."""
    scores: dict[str, float]
    """Scores by measure; the first is the one that is compared."""
    lower_is_better: bool = False
    """True if lower is better in the first measure."""
    protocol: dict[str, Any]
    """Every constant that decides the scores, given the subject and the data."""
    data: dict[str, Any]
    """Location of the data, and the amount that was used."""
    notes: list[str] = field(default_factory=list)
    """Sentences for people: what was judged by what, and what is odd about the data."""

    @property
    def name(self) -> str:
        """Return the name for a table's row."""
        return f"{self.subject}, untrained" if self.untrained else self.subject

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return plain

    @classmethod
    def from_json(cls, plain: Any) -> Result:
        """Build a result from what `to_json` returned.

        Raises: TypeError if it is something else; OverflowError if a score is too large for a float.
        """
        result = cls(**plain)
        words = (result.task, result.subject, result.kind)
        parts = (result.scores, result.protocol, result.data)
        if not isinstance(result.notes, list) or not all(isinstance(note, str) for note in result.notes):
            raise TypeError("its notes are not all strings")
        if not all(isinstance(word, str) for word in words) or not all(isinstance(part, dict) for part in parts):
            raise TypeError("task, subject and kind are not all strings, or scores, protocol and data not all objects")
        if type(result.untrained) is not bool or type(result.lower_is_better) is not bool:
            raise TypeError("untrained and lower_is_better are not both true or false")
        # not isinstance, which takes a bool for an int
        if not result.scores or not all(type(score) in (int, float) for score in result.scores.values()):
            raise TypeError("its scores are not numbers")
        if "\0" in result.subject:
            raise TypeError("its subject is not a valid name")
        for score in result.scores.values():
            float(score)
        return result


def keep_results(results: Iterable[Result], also: Path | None = None) -> None:
    """Append each result to its run's `evaluations.jsonl`, and all results to the file `also` if there is one.

    Results of untrained students are kept with the run, too. If `also` is given, runs that are not writable, such as a
    colleague's, are skipped. Each line is written in one piece, so lines of concurrent evaluations do not mix.

    Raises: StorageError after all results were tried; a line that was written in part is removed.
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
    """Check that results can be kept, ahead of the work.

    Raises: ConfigError if results cannot be appended to `results`, or if there is no such file and a run is not
        writable.
    """
    for run in runs:
        if results is None and not os.access(run, os.W_OK):
            raise ConfigError(f"run {run} is not writable, so it cannot keep its results; give --results FILE.jsonl")
    if results is not None and (results.is_dir() or not results.absolute().parent.is_dir()):
        what = "is a folder" if results.is_dir() else "is in a folder that does not exist"
        raise ConfigError(f"--results {results} {what}; give a file of results (.jsonl)")
    if results is not None and results.is_file() and not _holds_results(results):
        raise ConfigError(f"--results {results} exists but is not a file of results; choose another name")


def _holds_results(file: Path) -> bool:
    """Return whether the first line of a file is a result, or empty."""
    with file.open("rb") as opened:
        line = opened.readline(MOST_LINE_BYTES)
    try:
        return not line.strip() or bool(Result.from_json(parse_json(line)))
    except (ValueError, TypeError, AttributeError, OverflowError):
        return False


def _append(place: Path, line: bytes) -> None:
    """Append a line to a file, or write it to something that only takes bytes, such as a pipe.

    Raises: OSError; no part of the line is left in the file.
    """
    with place.open("ab", buffering=0) as file:  # unbuffered: a line is one write
        if not place.is_file():
            file.write(line)
            return
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        # under the lock, as another writer moves the end; a file without a final newline must not join two lines
        whole = place.read_bytes()[-1:] in (b"", b"\n")
        before, line = place.stat().st_size, line if whole else b"\n" + line
        if (written := file.write(line)) < len(line):  # the disk is full
            file.truncate(before)
            raise OSError(f"no room for more than {written} of {len(line)} bytes")


def read_results(path: Path) -> list[Result]:
    """Read the results in a run's directory or in a file, newest last; none if the run has not been judged.

    Raises: RunError if the file cannot be read, or holds something else.
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
        raise RunError(
            f"{where} holds no valid result of an evaluation ({error}); remove it, or evaluate again"
        ) from error
    return results


def newest(results: Sequence[Result]) -> list[Result]:
    """Return the last result of every (task, subject, untrained, protocol, data), in order of first appearance."""
    kept: dict[str, Result] = {}  # a key that is set again keeps its place
    for result in results:
        plain = result.to_json()
        kept[json.dumps([plain[k] for k in ("task", "subject", "untrained", "protocol", "data")], sort_keys=True)] = (
            result
        )
    return list(kept.values())
