"""Feature settings of results, which may differ within a column of a report, and the marks that say so."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from string import ascii_lowercase
from typing import Any

from eupe.evaluate.result import Result
from eupe.evaluate.subject import PIXELS

FEATURES = ("size", "dtype", "views", "num_views", "shades")
"""Names of the feature settings in a protocol."""


def usual_features(results: Sequence[Result]) -> dict[str, Any]:
    """Return the feature settings of most results; ties go to the first."""
    ways = [{name: result.protocol[name] for name in FEATURES if name in result.protocol} for result in results]
    counts = Counter(json.dumps(way, sort_keys=True) for way in ways)
    return max(ways, key=lambda way: counts[json.dumps(way, sort_keys=True)])


def difference(result: Result, usual: Mapping[str, Any]) -> str:
    """Return in words how a result's feature settings differ from the column's; empty if they do not.

    Only the size counts for raw pixels.
    """
    compared = ("size",) if result.kind == PIXELS else FEATURES
    own = {name: result.protocol[name] for name in compared if name in result.protocol}
    others = {name: usual[name] for name in compared if name in usual}
    ours = [_said(name, value) for name, value in own.items() if others.get(name) != value]
    theirs = [_said(name, value) for name, value in others.items() if own.get(name) != value]
    if not ours and not theirs:
        return ""
    return f"{', '.join(ours) or 'no such setting'}; the others: {', '.join(theirs) or 'no such setting'}"


def _said(name: str, value: Any) -> str:
    return {"size": f"{value} px", "num_views": f"{value} views per picture", "views": f"a store's {value} views"}.get(
        name, f"{name} {value}"
    )


def letter(number: int) -> str:
    """Return the letter of a mark: a to z, then aa, ab, ..."""
    first, last = divmod(number, len(ascii_lowercase))
    return (ascii_lowercase[first - 1] if first else "") + ascii_lowercase[last]
