"""What a corpus leaves out, and why: each file, member of a tar or row of a table is a picture, or is counted here.

A reason is a phrase that a number can stand before: `broken links`. What follows `: ` in it is a kind that is counted
on its own and told together with the others of its reason: `files of kinds that are not read: .heic`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import PurePosixPath

LeftOut = Mapping[str, int]
"""How many, by reason."""

NO_PICTURE = "samples without a picture"
"""Rows of tables that hold none; what indexes of before there were reasons count, of tars as well."""
NOT_READ = "files of kinds that are not read"
BY_INCLUDE = "left out by --include"
BY_EXCLUDE = "left out by --exclude"
BY_LIMIT = "left out by --limit"
TOLD_KINDS = 12
"""Of one reason; more are told together."""


def not_read(name: str) -> str:
    """Return the reason for a file that is no picture by its suffix."""
    return f"{NOT_READ}: {PurePosixPath(name.rpartition('/')[2]).suffix.lower() or 'no suffix'}"


def added(*counts: LeftOut) -> dict[str, int]:
    """Return the sums by reason, in the order of the reasons."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return {reason: total[reason] for reason in sorted(total) if total[reason]}


def told(left_out: LeftOut) -> str:
    """Return one line of words: how many in all, and for each reason how many, the most common kinds first."""
    groups: dict[str, Counter[str]] = {}
    for reason, count in left_out.items():
        group, _, kind = reason.partition(": ")
        groups.setdefault(group, Counter())[kind] += count
    if not groups:
        return "0"
    return f"{sum(left_out.values())} ({'; '.join(_told(group, kinds) for group, kinds in groups.items())})"


def _told(group: str, kinds: Counter[str]) -> str:
    named = sorted(((kind, count) for kind, count in kinds.items() if kind), key=lambda item: (-item[1], item[0]))
    words = [f"{kind} {count}" for kind, count in named[:TOLD_KINDS]]
    if more := named[TOLD_KINDS:]:
        words.append(f"{len(more)} other kinds {sum(count for _, count in more)}")
    return f"{kinds.total()} {group}" + (f": {', '.join(words)}" if words else "")
