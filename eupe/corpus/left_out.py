"""Counts of what a corpus leaves out: each file, tar member or table row is a picture, or is counted by reason.

A reason is a phrase that fits after a number: `broken links`. Text after `: ` is a kind, such as `.heic` in
`files of kinds that are not read: .heic`; kinds are counted separately and reported together under their reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from eupe.common.files import key_of

LeftOut = Mapping[str, int]
"""Counts by reason."""

NO_PICTURE = "samples without a picture"
"""Rows of tables without a picture; older indexes, which had no other reasons, count samples of tars here, too."""
NOT_READ = "files of kinds that are not read"
HIDDEN = "hidden files"
METADATA = "files of metadata"
NO_TABLE = "tables without pictures"
DERIVED = "Arrow files of what was computed from a data set"
OWN_INDEX = "indexes of pictures"
BROKEN_LINKS = "broken links"
LINKS_BACK = "links back to a folder above them"
BY_INCLUDE = "left out by --include"
BY_EXCLUDE = "left out by --exclude"
BY_LIMIT = "left out by --limit"
KIND = re.compile(r"\.(?=.*[a-z])[a-z0-9_~+-]{1,20}/?")
"""A suffix, or a hidden name, that is counted as a kind of its own."""
HEIC = {".heic", ".heif", ".hif"}
TOLD_KINDS = 12
"""Number of kinds that are named for a reason; the others are added up."""


@dataclass(frozen=True)
class Patterns:
    """The shell patterns of `--include` and `--exclude`, matched against whole keys; `*` also matches slashes."""

    include: Sequence[str] = ()
    """Empty for every key."""
    exclude: Sequence[str] = ()

    def reason(self, key: str) -> str | None:
        """Return why a picture is left out; None if it is not."""
        if self.include and not _matches(key, self.include):
            return BY_INCLUDE
        return BY_EXCLUDE if _matches(key, self.exclude) else None


def _matches(key: str, patterns: Sequence[str]) -> bool:
    """Return whether a pattern matches the key; patterns may be written like the key or like the file's name."""
    return any(fnmatchcase(key, pattern) or fnmatchcase(key, key_of(pattern)) for pattern in patterns)


EVERYTHING = Patterns()


def left_none(count: int, root: object, example: str) -> str:
    """Return the error message for patterns that leave no picture."""
    return (
        f"--include and --exclude leave none of the {count} pictures of {root}; they are matched against paths below "
        f"it, like {example}"
    )


def not_read(name: str) -> str:
    """Return the reason for a file whose suffix is not that of a picture."""
    suffix = PurePosixPath(name.rpartition("/")[2]).suffix.lower()
    return f"{NOT_READ}: {suffix if KIND.fullmatch(suffix) else 'other suffixes' if suffix else 'no suffix'}"


def hidden(name: str) -> str | None:
    """Return the reason for a file if its name, or that of a folder on its path, begins with a dot; else None."""
    if "/." not in f"/{name}":
        return None
    *folders, file = name.split("/")
    folder = next((f"{word}/" for word in folders if word.startswith(".")), None)
    kind = folder or PurePosixPath(file).suffix.lower() or file
    return f"{HIDDEN}: {kind if KIND.fullmatch(kind.lower()) else 'other names'}"


def added(*counts: LeftOut) -> dict[str, int]:
    """Return the sums by reason, sorted by reason; zeros are omitted."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return {reason: total[reason] for reason in sorted(total) if total[reason]}


def told(left_out: LeftOut) -> str:
    """Return one line of text: the total, then the count of each reason, with its most common kinds first."""
    groups: dict[str, Counter[str]] = {}
    for reason, count in left_out.items():
        group, _, kind = reason.partition(": ")
        groups.setdefault(group, Counter())[kind] += count
    if not groups:
        return "0"
    words = [_told(group, kinds) for group, kinds in groups.items()]
    if HEIC & groups.get(NOT_READ, Counter()).keys():
        words.append("install pillow-heif to read HEIC")
    return f"{sum(left_out.values())} ({'; '.join(words)})"


def _told(group: str, kinds: Counter[str]) -> str:
    named = sorted(((kind, count) for kind, count in kinds.items() if kind), key=lambda item: (-item[1], item[0]))
    words = [f"{kind} {count}" for kind, count in named[:TOLD_KINDS]]
    if more := named[TOLD_KINDS:]:
        words.append(f"{len(more)} other kinds {sum(count for _, count in more)}")
    return f"{kinds.total()} {group}" + (f": {', '.join(words)}" if words else "")
